"""What must not matter does not matter: batching, order, padding, checkpointing, loss scale, evaluation, precision."""

import pytest
import torch

from grit import GRITManager, GritOptimizer
from tests.grit.nets import (
    MODES,
    collate,
    covariances,
    inner_for,
    lora_weights,
    make_items,
    quick,
    small_llama,
    trainable,
)

LAYERS = 6  # three targets in two blocks


def loss_tokens(items):
    return sum(len(item) - 2 for item in items)


ITEMS = make_items([9, 6, 7])
BATCH, OTHER = collate(ITEMS), collate(make_items([12, 5], seed=9))


def settings(**changes):
    return quick(**{"mode": "sgd", "capture": "hooks", "kl_clip": 0.0, "kfac_damping": 0.1, **changes})


def statistics_of(model, *batches, work=None, config=None):
    """What one step leaves in the statistics: what work(model, manager) does, and a pass over each batch."""
    manager = GRITManager(model, config or settings()).open()
    if work is not None:
        work(model, manager)
    for batch in batches:
        model(**batch).loss.backward()
    with torch.no_grad():
        manager.update_statistics()
    manager.close(check=False)
    return covariances(manager)


def assert_same(got, want, rel, compare_tokens=True):
    assert set(got) == set(want) and len(want) == LAYERS
    for name, (cov_a, cov_g, tokens) in want.items():
        assert tokens > 0 and float(cov_g.norm()) > 0
        for new, old in ((got[name][0], cov_a), (got[name][1], cov_g)):
            error = float((new.double() - old.double()).norm() / old.double().norm())
            assert error < rel, f"{name}: relative error {error:.2e}"
        if compare_tokens:
            assert got[name][2] == tokens


def largest_difference(one, other):
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# Batching


def told_late(model, manager):
    """A loop that counts its tokens beside the loss must not get the divisor of the batch before."""
    manager.capture.loss_divisor = 1.0
    loss = model(**BATCH).loss
    manager.capture.loss_divisor = float(loss_tokens(ITEMS))
    loss.backward()


def scaled(model, manager):
    manager.capture.loss_scale = 1024.0
    (model(**BATCH).loss * 1024.0).backward()


def between_other_passes(model, manager):
    with torch.no_grad():
        model(**OTHER)
    model(**OTHER)  # with grad, but nobody asks for it
    loss = model(**BATCH).loss
    with torch.no_grad():  # between forward and backward: its mask and labels are not those of the batch
        model.eval()(**OTHER)
    loss.backward()
    with torch.inference_mode():
        model.train()(**OTHER)


@pytest.mark.parametrize("work", [told_late, scaled, between_other_passes])
def test_a_batch_counts_the_same_however_the_loop_goes_about_it(work):
    assert_same(statistics_of(small_llama(), work=work), statistics_of(small_llama(), BATCH), 1e-12)


def test_every_pass_of_an_accumulation_has_its_own_mask():
    """Both forward passes come before both backward passes: the first batch must not meet the second one's mask."""
    parts = [collate(make_items([5, 11], seed=1)), collate(make_items([8, 3], seed=2), length=11)]

    def interleaved(model, manager):
        for loss in [model(**part).loss for part in parts]:
            loss.backward()

    assert_same(statistics_of(small_llama(), work=interleaved), statistics_of(small_llama(), *parts), 1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("equal", [True, False])
def test_accumulation_gives_the_same_updates(mode, equal):
    """Three steps of one batch of 16 and of 4 × 4."""
    lengths = [8] * 16 if equal else [5 + i % 7 for i in range(16)]
    weights = []
    for accumulate in (False, True):
        model = small_llama()
        with GRITManager(model, settings(mode=mode)) as manager:
            optimizer = GritOptimizer(inner_for(mode, trainable(model), 0.02), manager)
            for step in range(3):
                items = make_items(lengths, seed=step)
                if accumulate and equal:
                    manager.capture.accumulation = 4
                elif accumulate:
                    manager.capture.loss_divisor = float(loss_tokens(items))
                for part in [items[i : i + 4] for i in range(0, 16, 4)] if accumulate else [items]:
                    (model(**collate(part)).loss * loss_tokens(part) / loss_tokens(items)).backward()
                optimizer.step()
                optimizer.zero_grad()
        weights.append(lora_weights(model))
    assert largest_difference(*weights) < (1e-9 if equal else 1e-5)
    assert largest_difference(weights[0], lora_weights(small_llama())) > 1e-2


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_matter(side):
    items = make_items([5, 11, 7, 9])
    batch, longer = collate(items), collate(items, length=20, side=side)
    want, got = statistics_of(small_llama(), batch), statistics_of(small_llama(), longer)
    assert_same(got, want, 1e-10)
    assert {tokens for _, _, tokens in got.values()} == {32.0}  # all that is attended to, no padding
    # The test would be empty if padding left no trace by itself.
    unmasked = {name: value for name, value in longer.items() if name not in ("attention_mask", "position_ids")}
    blind = statistics_of(small_llama(), unmasked)
    assert {tokens for _, _, tokens in blind.values()} == {80.0}
    name = next(iter(want))
    assert float((blind[name][0] - want[name][0]).norm() / want[name][0].norm()) > 0.1


# Ways to run the model


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_nothing_and_counts_once(use_reentrant):
    plain = small_llama(torch.float32)
    want = statistics_of(plain, BATCH)
    model = small_llama(torch.float32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    calls = []
    first = next(m for name, m in model.named_modules() if name.endswith("q_proj.lora_A.default"))
    first.register_forward_hook(lambda *_: calls.append(1))
    got = statistics_of(model, BATCH)
    assert len(calls) == 2  # the forward pass really ran twice
    assert_same(got, want, 1e-6)
    assert {tokens for _, _, tokens in got.values()} == {22.0}
    gradients = [{n: p.grad for n, p in m.named_parameters() if "lora_" in n} for m in (plain, model)]
    assert largest_difference(*gradients) < 1e-6


@pytest.mark.parametrize("kind", ["autocast", "backward under autocast too", "bf16 weights"])
def test_bfloat16_keeps_float32_statistics_near_those_of_float32(kind):
    batch, seen = collate(make_items([9, 12, 7, 10])), []
    dtype = torch.bfloat16 if kind == "bf16 weights" else torch.float32
    model, reference = (small_llama(dtype, autocast_adapter_dtype=False) for _ in range(2))
    assert {p.dtype for p in model.parameters()} == {dtype}
    want = statistics_of(reference.float(), batch)
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda m, args, h: seen.append(h.dtype))

    def work(model, manager):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind != "bf16 weights"):
            loss = model(**batch).loss
            if kind == "backward under autocast too":
                loss.backward()
        if kind != "backward under autocast too":
            loss.backward()

    got = statistics_of(model, work=work)
    assert set(seen) == {torch.bfloat16}
    for cov_a, cov_g, _ in got.values():
        assert cov_a.dtype == cov_g.dtype == torch.float32
    assert_same(got, want, 0.1)  # 8 bits of mantissa through a network with large weights: 5 to 7% was measured


def test_normalized_delta_is_that_of_one_token():
    raw_settings = settings(normalize_delta=False)
    whole, raw = statistics_of(small_llama(), BATCH), statistics_of(small_llama(), BATCH, config=raw_settings)
    for name, (cov_a, cov_g, _) in whole.items():
        assert torch.equal(raw[name][0], cov_a)
        assert torch.allclose(raw[name][1] * loss_tokens(ITEMS) ** 2, cov_g, rtol=1e-10)
