"""What must not matter does not matter: batching, order, padding, checkpointing, loss scale, evaluation, precision.

And where the method has to turn into another one, it does: AdamW at infinite damping.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from grit import CaptureError, GRITConfig, GRITManager, GritOptimizer, NotAppliedError
from tests.grit.nets import llama_config

RANK, VOCABULARY = 3, 40
TARGETS = ["q_proj", "v_proj", "down_proj"]
LAYERS = 6  # three targets in two blocks


def lora_config():
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")


def randomize(model, seed=5):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape))


def make_model(dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    base = LlamaForCausalLM(llama_config(VOCABULARY)).to(dtype)
    model = get_peft_model(base, lora_config(), **kwargs)
    randomize(model)
    return model.train()


def make_items(lengths, seed=0):
    """Token ids of every item; the first two carry no loss, like a prompt."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in lengths]


def collate(items, length=None, side="right"):
    length = length or max(len(item) for item in items)
    batch = {
        "input_ids": torch.zeros(len(items), length, dtype=torch.long),
        "attention_mask": torch.zeros(len(items), length, dtype=torch.long),
        "labels": torch.full((len(items), length), -100),
        "position_ids": torch.zeros(len(items), length, dtype=torch.long),
    }
    for row, item in enumerate(items):
        place = slice(0, len(item)) if side == "right" else slice(length - len(item), length)
        labels = item.clone()
        labels[:2] = -100
        batch["input_ids"][row, place], batch["labels"][row, place] = item, labels
        batch["attention_mask"][row, place], batch["position_ids"][row, place] = 1, torch.arange(len(item))
    return batch


def loss_tokens(items):
    return sum(len(item) - 2 for item in items)


def settings(**changes):
    values = {
        "mode": "sgd",
        "capture": "hooks",
        "kl_clip": 0.0,
        "kfac_damping": 0.1,
        "kfac_min_samples": 1,
        "grit_cov_update_freq": 1,
        "kfac_update_freq": 1,
        "reprojection": "none",
        "min_lora_rank": 1,
    }
    return GRITConfig(**{**values, **changes})


def torch_optimizer(model, mode, lr):
    weights = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(weights, lr=lr) if mode == "sgd" else torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)


def measured(manager):
    """Layer → Σ_a, Σ_g, tokens."""
    found = {}
    for state, i, pair in manager.layers():
        cov_a, cov_g = state.covariances()
        found[pair.name] = (cov_a[i].clone(), cov_g[i].clone(), float(state["samples"][i]))
    return found


def statistics_of(model, work, config=None, prepare=None):
    """What one step's worth of backward passes (done by `work`) leaves in the statistics."""
    manager = GRITManager(model, config or settings()).open()
    if prepare is not None:
        prepare(manager)
    work(model)
    with torch.no_grad():
        manager.update_statistics()
    manager.close(check=False)
    return measured(manager)


def one_pass(batch, factor=1.0):
    return lambda model: (model(**batch).loss * factor).backward()


def assert_same(got, want, rel, compare_tokens=True):
    assert set(got) == set(want) and len(want) == LAYERS
    for name, (cov_a, cov_g, tokens) in want.items():
        assert tokens > 0 and float(cov_g.norm()) > 0
        for new, old in ((got[name][0], cov_a), (got[name][1], cov_g)):
            error = float((new.double() - old.double()).norm() / old.double().norm())
            assert error < rel, f"{name}: relative error {error:.2e}"
        if compare_tokens:
            assert got[name][2] == tokens


def lora_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def largest_difference(one, other):
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# Infinite damping


def trained(config, batches, wrap=True, lr=0.01):
    model = make_model()
    optimizer = torch_optimizer(model, "adamw", lr)
    manager = GRITManager(model, config) if wrap else None
    if wrap:
        optimizer = GritOptimizer(optimizer, manager)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if wrap:
        assert manager.ready_layers() == LAYERS
        manager.close()
    return lora_weights(model)


def test_infinite_damping_with_grafting_is_adamw():
    batches = [collate(make_items([9, 7, 8], seed=i)) for i in range(10)]
    plain = trained(None, batches, wrap=False)
    damped = settings(mode="adamw", grafting=True, damping_mode="absolute", kfac_damping=1e12)
    assert largest_difference(trained(damped, batches), plain) < 1e-9
    sharp = settings(mode="adamw", grafting=True, kfac_damping=1e-3)
    assert largest_difference(trained(sharp, batches), plain) > 1e-2


def test_sgd_mode_at_infinite_damping_is_sgd_with_the_step_over_lambda():
    """Without grafting the inverse is I/λ: learning rate λ·lr gives plain SGD."""
    batch, lam = collate(make_items([9, 7, 8])), 1e12
    grit, plain = make_model(), make_model()
    with GRITManager(grit, settings(damping_mode="absolute", kfac_damping=lam)) as manager:
        optimizer = GritOptimizer(torch_optimizer(grit, "sgd", 0.1 * lam), manager)
        one_pass(batch)(grit)
        optimizer.step()
    one_pass(batch)(plain)
    torch_optimizer(plain, "sgd", 0.1).step()
    assert largest_difference(lora_weights(grit), lora_weights(plain)) < 1e-9
    assert largest_difference(lora_weights(grit), lora_weights(make_model())) > 1e-3


# Batching


def accumulated(parts, factor=1.0, **kwargs):
    def work(model):
        for part in parts:
            (model(**collate(part), **kwargs).loss * factor).backward()

    return work


def quarters(items):
    return [items[i : i + 4] for i in range(0, 16, 4)]


def test_four_quarters_with_divided_loss_give_the_statistics_of_one_batch():
    items = make_items([8] * 16)
    want = statistics_of(make_model(), one_pass(collate(items)))

    def tell(manager):
        manager.capture.accumulation = 4

    got = statistics_of(make_model(), accumulated(quarters(items), 0.25), prepare=tell)
    assert_same(got, want, 1e-10)
    wrong = statistics_of(make_model(), accumulated(quarters(items), 0.25))
    name = next(iter(want))
    assert torch.allclose(wrong[name][1] * 16, want[name][1], rtol=1e-8)  # δ would be 4 times too small


def test_quarters_of_unequal_size_with_mean_losses_give_the_same_statistics():
    """Each pass divides by its own tokens; δ is that of one token's loss all the same."""
    items = make_items([5 + i % 7 for i in range(16)])
    want = statistics_of(make_model(), one_pass(collate(items)))

    def tell(manager):
        manager.capture.accumulation = 4

    got = statistics_of(make_model(), accumulated(quarters(items), 0.25), prepare=tell)
    assert_same(got, want, 1e-6)  # float32 rotary embeddings and norms inside transformers


@pytest.mark.parametrize("told", ["by keyword", "by loss_divisor"])
def test_quarters_of_unequal_size_normalised_by_the_total(told):
    """Statistics as in one batch, whether the model is given num_items_in_batch or the loop divides by itself."""
    items = make_items([5 + i % 7 for i in range(16)])
    total = loss_tokens(items)
    want = statistics_of(make_model(), one_pass(collate(items)))

    def by_hand(model):
        for part in quarters(items):
            (model(**collate(part)).loss * (loss_tokens(part) / total)).backward()

    def tell(manager):
        manager.capture.loss_divisor = float(total)

    if told == "by keyword":
        got = statistics_of(make_model(), accumulated(quarters(items), num_items_in_batch=torch.tensor(total)))
    else:
        got = statistics_of(make_model(), by_hand, prepare=tell)
    assert_same(got, want, 1e-6)


def test_the_divisor_may_be_told_between_forward_and_backward():
    """A loop that counts its tokens beside the loss must not get the divisor of the batch before."""
    items = make_items([9, 6, 7])
    want = statistics_of(make_model(), one_pass(collate(items)))
    manager = GRITManager(model := make_model(), settings()).open()
    manager.capture.loss_divisor = 1.0  # of the batch before
    loss = model(**collate(items)).loss
    manager.capture.loss_divisor = float(loss_tokens(items))
    loss.backward()
    with torch.no_grad():
        manager.update_statistics()
    manager.close(check=False)
    assert_same(measured(manager), want, 1e-12)


@pytest.mark.parametrize("mode", ["sgd", "adamw", "eigen_adamw"])
@pytest.mark.parametrize("equal", [True, False])
def test_accumulation_gives_the_same_updates(mode, equal):
    """Three steps of one batch of 16 and of 4 × 4."""
    lengths = [8] * 16 if equal else [5 + i % 7 for i in range(16)]
    weights = []
    for accumulate in (False, True):
        model = make_model()
        with GRITManager(model, settings(mode=mode)) as manager:
            optimizer = GritOptimizer(torch_optimizer(model, mode, 0.02), manager)
            for step in range(3):
                items = make_items(lengths, seed=step)
                if not accumulate:
                    one_pass(collate(items))(model)
                elif equal:
                    manager.capture.accumulation = 4
                    accumulated(quarters(items), 0.25)(model)
                else:
                    manager.capture.loss_divisor = float(loss_tokens(items))
                    for part in quarters(items):
                        (model(**collate(part)).loss * (loss_tokens(part) / loss_tokens(items))).backward()
                optimizer.step()
                optimizer.zero_grad()
        weights.append(lora_weights(model))
    assert largest_difference(*weights) < (1e-9 if equal else 1e-5)
    assert largest_difference(weights[0], lora_weights(make_model())) > 1e-2


def test_order_of_the_items_in_a_batch_does_not_matter():
    items = make_items([5, 11, 7, 9, 6, 8])
    want = statistics_of(make_model(), one_pass(collate(items)))
    got = statistics_of(make_model(), one_pass(collate([items[i] for i in (3, 0, 5, 1, 4, 2)])))
    assert_same(got, want, 1e-10)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_matter(side):
    items = make_items([5, 11, 7, 9])
    batch, longer = collate(items), collate(items, length=20, side=side)
    want = statistics_of(make_model(), one_pass(batch))
    got = statistics_of(make_model(), one_pass(longer))
    assert_same(got, want, 1e-10)
    assert {tokens for _, _, tokens in got.values()} == {32.0}  # all that is attended to, no padding
    # The test would be empty if padding left no trace by itself.
    unmasked = {name: value for name, value in longer.items() if name != "attention_mask"}
    blind = statistics_of(make_model(), one_pass(unmasked))
    assert {tokens for _, _, tokens in blind.values()} == {80.0}
    name = next(iter(want))
    assert float((blind[name][0] - want[name][0]).norm() / want[name][0].norm()) > 0.1


def test_every_pass_of_an_accumulation_has_its_own_mask():
    """Both forward passes come before both backward passes: the first batch must not meet the second one's mask."""
    parts = [collate(make_items([5, 11], seed=1)), collate(make_items([8, 3], seed=2), length=11)]

    def interleaved(model):
        losses = [model(**part).loss for part in parts]
        for loss in losses:
            loss.backward()

    def in_turn(model):
        for part in parts:
            model(**part).loss.backward()

    want = statistics_of(make_model(), in_turn)
    assert_same(statistics_of(make_model(), interleaved), want, 1e-10)


# Ways to run the model


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_nothing_and_counts_once(use_reentrant):
    batch = collate(make_items([9, 6, 7]))
    plain = make_model(torch.float32)
    want = statistics_of(plain, one_pass(batch))
    model = make_model(torch.float32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    calls = []
    first = next(m for name, m in model.named_modules() if name.endswith("q_proj.lora_A.default"))
    first.register_forward_hook(lambda *_: calls.append(1))
    got = statistics_of(model, one_pass(batch))
    assert len(calls) == 2  # the forward pass really ran twice
    assert_same(got, want, 1e-6)
    assert {tokens for _, _, tokens in got.values()} == {22.0}
    gradients = [{n: p.grad for n, p in m.named_parameters() if "lora_" in n} for m in (plain, model)]
    assert largest_difference(*gradients) < 1e-6


def test_evaluation_between_forward_and_a_checkpointed_backward_does_not_lend_its_mask():
    """Reentrant checkpointing runs the layers again inside the backward pass, when another batch was seen last."""
    batch, other = collate(make_items([9, 6, 7])), collate(make_items([5, 9, 8], seed=9))
    want = statistics_of(make_model(), one_pass(batch))
    model = make_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()

    def work(model):
        loss = model(**batch).loss
        with torch.no_grad():
            model(**other)
        loss.backward()

    assert_same(statistics_of(model, work), want, 1e-10)


@pytest.mark.parametrize("kind", ["autocast", "backward under autocast too", "bf16 weights"])
def test_bfloat16_keeps_float32_statistics_near_those_of_float32(kind):
    batch = collate(make_items([9, 12, 7, 10]))
    if kind == "bf16 weights":
        model = make_model(torch.bfloat16, autocast_adapter_dtype=False)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        reference = make_model(torch.bfloat16, autocast_adapter_dtype=False).float()  # the same rounded weights
    else:
        model, reference = make_model(torch.float32), make_model(torch.float32)
    want = statistics_of(reference, one_pass(batch))
    seen = []
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda m, args, h: seen.append(h.dtype))

    def work(model):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind != "bf16 weights"):
            loss = model(**batch).loss
            if kind == "backward under autocast too":
                loss.backward()
        if kind != "backward under autocast too":
            loss.backward()

    got = statistics_of(model, work)
    assert set(seen) == {torch.bfloat16}
    for cov_a, cov_g, _ in got.values():
        assert cov_a.dtype == cov_g.dtype == torch.float32
    assert_same(got, want, 0.1)  # 8 bits of mantissa through a network with large weights: 5 to 7% was measured


def test_bfloat16_activations_are_summed_in_float32():
    """Σ h hᵀ of 4096 tokens equals a float64 sum of the very same bf16 numbers, where a sum in bf16 would stall."""
    torch.manual_seed(0)
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(8, 8)).to(torch.bfloat16),
        LoraConfig(r=RANK, target_modules=["0"]),
        autocast_adapter_dtype=False,
    )
    randomize(model)
    kept = []

    def keep(module, args, h):
        h.retain_grad()
        kept.append(h)

    model.base_model.model[0].lora_A["default"].register_forward_hook(keep)
    manager = GRITManager(model, settings()).open()
    manager.capture.loss_divisor = 4096.0
    model(torch.randn(4096, 8, dtype=torch.bfloat16)).float().square().mean(0).sum().backward()
    with torch.no_grad():
        manager.update_statistics()
    manager.close(check=False)
    ((cov_a, cov_g, tokens),) = measured(manager).values()
    h, delta = kept[0].detach().double(), kept[0].grad.double() * 4096
    assert tokens == 4096
    assert torch.allclose(cov_a.double(), h.mT @ h / 4096, rtol=1e-5, atol=1e-6 * float(cov_a.norm()))
    assert torch.allclose(cov_g.double(), delta.mT @ delta / 4096, rtol=1e-5, atol=1e-6 * float(cov_g.norm()))


def test_loss_scaling_is_undone():
    batch = collate(make_items([9, 6, 7]))
    want = statistics_of(make_model(), one_pass(batch))

    def tell(manager):
        manager.capture.loss_scale = 1024.0

    assert_same(statistics_of(make_model(), one_pass(batch, 1024.0), prepare=tell), want, 1e-12)


def test_evaluation_and_forward_passes_without_backward_do_not_count():
    batch, other = collate(make_items([9, 6, 7])), collate(make_items([12, 5], seed=9))
    want = statistics_of(make_model(), one_pass(batch))

    def work(model):
        with torch.no_grad():
            model(**other)
        model(**other)  # with grad, but nobody asks for it
        loss = model(**batch).loss
        with torch.no_grad():  # between forward and backward: its mask and labels are not those of the batch
            model.eval()(**other)
        loss.backward()
        with torch.inference_mode():
            model.train()(**other)

    assert_same(statistics_of(make_model(), work), want, 1e-12)


def test_normalised_delta_is_that_of_one_token_whatever_the_batch():
    items = make_items([9, 6, 7])
    tokens = loss_tokens(items)
    whole = statistics_of(make_model(), one_pass(collate(items)))
    raw = statistics_of(make_model(), one_pass(collate(items)), settings(normalize_delta=False))
    for name, (cov_a, cov_g, _) in whole.items():
        assert torch.equal(raw[name][0], cov_a)
        assert torch.allclose(raw[name][1] * tokens**2, cov_g, rtol=1e-10)
    # Items three times over: the same mean, and the same statistics if δ is normalised; else 9 times smaller ones.
    thrice = statistics_of(make_model(), one_pass(collate(items * 3)))
    assert_same(thrice, whole, 1e-6, compare_tokens=False)
    raw_thrice = statistics_of(make_model(), one_pass(collate(items * 3)), settings(normalize_delta=False))
    for name, (_, cov_g, _) in raw.items():
        assert torch.allclose(raw_thrice[name][1] * 9, cov_g, rtol=1e-5)


def test_the_divisor_is_the_number_of_predicted_tokens_where_every_token_is_a_label():
    """Nothing predicts an item's first token: 8 + 5 + 6 of 22 labels carry loss."""
    batch = collate(make_items([9, 6, 7]))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    whole = statistics_of(make_model(), one_pass(batch))
    raw = statistics_of(make_model(), one_pass(batch), settings(normalize_delta=False))
    for name, (_, cov_g, _) in whole.items():
        assert torch.allclose(raw[name][1] * 19**2, cov_g, rtol=1e-10)


def test_absolute_damping_on_raw_delta_is_a_mere_scalar():
    """The silent no-op: a mean loss over 80 tokens leaves Σ_g below 1e-3 of its size, and λ = 0.01 drowns it."""
    batch = collate(make_items([12] * 8))
    cosines = {}
    for normalize in (True, False):
        model = make_model()
        config = settings(normalize_delta=normalize, damping_mode="absolute", kfac_damping=1e-2)
        manager = GRITManager(model, config).open()
        one_pass(batch)(model)
        raw = {pair.name: pair.a.grad.clone() for pair in manager.pairs()}
        with torch.no_grad():
            manager.update_statistics()
            manager.update_and_invert_factors()
            manager.precondition_gradients()
        cosines[normalize] = [
            float(torch.cosine_similarity(raw[pair.name].flatten(), pair.a.grad.flatten(), dim=0))
            for pair in manager.pairs()
        ]
        manager.close(check=False)
    assert min(cosines[False]) > 1 - 1e-3
    assert max(cosines[True]) < 1 - 1e-2
    assert min(cosines[True]) < 0.8


# When and of what statistics are taken


@pytest.mark.parametrize("mode", ["adamw", "sgd"])
@pytest.mark.parametrize("capture", ["hooks", "gradients"])
def test_statistics_change_only_at_their_steps(capture, mode):
    """Every third; in mode sgd at every step at first, while B grows away from 0."""
    model = make_model()
    config = settings(grit_cov_update_freq=3, capture=capture, kfac_update_freq=100, mode=mode)
    manager = GRITManager(model, config).open()
    optimizer = GritOptimizer(torch_optimizer(model, mode, 0.01), manager)
    changed, before = [], measured(manager)
    due = [step % 3 == 0 or (mode == "sgd" and step < 12) for step in range(17)]
    for step in range(17):
        one_pass(collate(make_items([9, 6, 7], seed=step)))(model)
        if capture == "hooks":
            counted = [bool(sums.tokens.any()) for sums in manager.capture.sums]
            assert counted == [due[step]] * len(counted)
        optimizer.step()
        optimizer.zero_grad()
        after = measured(manager)
        parts = [not torch.equal(after[n][k], before[n][k]) for n in after for k in (0, 1)]
        parts += [after[n][2] != before[n][2] for n in after]
        assert all(parts) or not any(parts)
        changed.append(all(parts))
        before = after
    manager.close()
    assert changed == due


def with_two_adapters():
    model = make_model()
    model.add_adapter("other", lora_config())
    randomize(model, seed=77)
    model.set_adapter("other")
    return model


def test_of_two_adapters_only_the_trained_one_has_statistics():
    model, batch = with_two_adapters(), collate(make_items([9, 6, 7]))
    got = statistics_of(model, one_pass(batch))
    assert len(got) == LAYERS and all(name.endswith("[other]") for name in got)
    # The same adapter alone gives the same numbers.
    alone = make_model()
    weights = lora_weights(model)
    with torch.no_grad():
        for name, p in alone.named_parameters():
            if "lora_" in name:
                p.copy_(weights[name.replace(".default.", ".other.")])
    want = statistics_of(alone, one_pass(batch))
    assert_same({name.removesuffix("[other]"): value for name, value in got.items()}, want, 1e-12)


def test_an_active_frozen_adapter_takes_part_but_has_no_statistics():
    model, batch = with_two_adapters(), collate(make_items([9, 6, 7]))
    inactive = statistics_of(model, one_pass(batch))
    model.base_model.set_adapter(["default", "other"])
    both = statistics_of(model, one_pass(batch))
    assert len(both) == 2 * LAYERS
    for name, p in model.named_parameters():
        if ".default." in name:
            p.requires_grad_(False)
    got = statistics_of(model, one_pass(batch))
    assert set(got) == set(inactive)
    for name, (cov_a, cov_g, tokens) in got.items():
        assert torch.equal(cov_a, both[name][0]) and tokens == 22
        assert torch.allclose(cov_g, both[name][1], rtol=1e-10)
        assert not torch.allclose(cov_g, inactive[name][1], rtol=0.01)  # the frozen one changes the loss


# Hooks


def count_hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_hooks_come_off_when_the_block_ends():
    model = make_model()
    before = count_hooks(model)
    with GRITManager(model, settings()) as manager:
        optimizer = GritOptimizer(torch_optimizer(model, "sgd", 0.01), manager)
        assert count_hooks(model) == before + LAYERS + 1
        manager.open()  # a second time: no second set
        assert count_hooks(model) == before + LAYERS + 1
        one_pass(collate(make_items([5, 6])))(model)
        optimizer.step()
    assert count_hooks(model) == before


@pytest.mark.parametrize("where", ["before", "in the forward pass", "after the backward pass"])
def test_hooks_come_off_when_an_exception_ends_the_block(where):
    """The exception itself comes out, not a complaint of GRIT about what could not be done because of it."""
    model = make_model()
    before = count_hooks(model)
    with pytest.raises(ZeroDivisionError if where != "in the forward pass" else (TypeError, ValueError)):
        with GRITManager(model, settings()):
            if where == "in the forward pass":
                model(input_ids=None, labels="nonsense")
            if where == "after the backward pass":
                one_pass(collate(make_items([5, 6])))(model)
            raise ZeroDivisionError
    assert count_hooks(model) == before


def test_hooks_come_off_when_the_block_ends_with_grits_own_complaint():
    model = make_model()
    before = count_hooks(model)
    with pytest.raises(NotAppliedError, match="GritOptimizer"):
        with GRITManager(model, settings()):
            one_pass(collate(make_items([5, 6])))(model)
    assert count_hooks(model) == before
    with pytest.raises(CaptureError, match="hooks reported nothing"):
        with GRITManager(model, settings()) as manager:
            optimizer = GritOptimizer(torch_optimizer(model, "sgd", 0.01), manager)
            for p in model.parameters():  # gradients from nowhere, as fused kernels leave them
                p.grad = torch.ones_like(p) if p.requires_grad else None
            optimizer.step()
    assert count_hooks(model) == before


def test_nothing_of_a_closed_manager_counts_any_more():
    """A graph made before `close` may still run backward: its statistics are nobody's, and nothing breaks."""
    model = make_model()
    manager = GRITManager(model, settings()).open()
    loss = model(**collate(make_items([5, 6]))).loss
    manager.close(check=False)
    loss.backward()
    assert all(not bool(state["samples"].any()) for state in manager.states)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# Quantized base


@pytest.mark.slow
def test_statistics_on_a_four_bit_base(tmp_path):
    """NF4 by bitsandbytes, on the CPU: every layer reports, everything is finite, and the step applies."""
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(0)
    wide = llama_config(VOCABULARY)
    wide.hidden_size, wide.intermediate_size = 64, 128
    LlamaForCausalLM(wide).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"}
    )
    model = get_peft_model(prepare_model_for_kbit_training(base, use_gradient_checkpointing=False), lora_config())
    randomize(model)
    model.train()
    assert {type(m.base_layer).__name__ for m in model.modules() if hasattr(m, "base_layer")} == {"Linear4bit"}
    before = lora_weights(model)
    with GRITManager(model, settings(mode="eigen_adamw", capture="auto")) as manager:
        optimizer = GritOptimizer(torch_optimizer(model, "adamw", 0.01), manager)
        for step in range(3):
            one_pass(collate(make_items([9, 6, 7], seed=step)))(model)
            optimizer.step()
            optimizer.zero_grad()
        assert set(manager.capture_kinds().values()) == {"hooks"} and manager.unreported() == []
        for cov_a, cov_g, tokens in measured(manager).values():
            assert tokens == 66 and cov_a.dtype == cov_g.dtype == torch.float32
            for cov in (cov_a, cov_g):
                assert bool(torch.isfinite(cov).all()) and float(cov.trace()) > 0
        assert manager.ready_layers() == LAYERS
    after = lora_weights(model)
    assert all(bool(torch.isfinite(w).all()) and not torch.equal(w, before[n]) for n, w in after.items())
