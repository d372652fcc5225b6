"""What GRIT says about its effect is what it does; and what it must leave alone stays to the bit."""

import copy
import logging
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F  # noqa: N812

from grit import GRITConfig, GRITManager, GritOptimizer, NonFiniteGradientsError
from tests.grit.nets import lora, quick, trainable

MODES = ["eigen_adamw", "adamw", "sgd"]


def sides(model):
    """The A and the B weights."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [p for n, p in named if "lora_A" in n], [p for n, p in named if "lora_B" in n]


def make_inner(mode, weights, lr=0.01, **kwargs):
    return torch.optim.SGD(weights, lr, momentum=0.9) if mode == "sgd" else torch.optim.AdamW(weights, lr, **kwargs)


def backward(model, i=0, n=32, scale=1.0):
    generator = torch.Generator().manual_seed(100 + i)
    x, y = torch.randn(n, 8, generator=generator), torch.randn(n, 5, generator=generator)
    dtype = trainable(model)[0].dtype
    (scale * F.mse_loss(model(x.to(dtype)), y.to(dtype))).backward()


def train(model, optimizer, steps, start=0, **kwargs):
    for i in range(start, start + steps):
        backward(model, i, **kwargs)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in trainable(model)]


def wrapped(model, config, **kwargs):
    return GritOptimizer(make_inner(config.mode, trainable(model), **kwargs), GRITManager(model, config))


def equal(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def worst(one, other):
    """Largest relative difference of two lists of tensors."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(one, other, strict=True))


def effects(manager):
    return [r for r in manager.history if r["kind"] == "effect"]


def said(caplog, text):
    return [r for r in caplog.records if r.name == "grit" and text in r.getMessage()]


# Effect and its report


@pytest.mark.parametrize("grafting", [True, False])
def test_a_constant_factor_is_reported_as_no_effect(grafting, caplog):
    """λ = 10⁶: every inverse is 10⁻⁶·I. AdamW (ε below the scaled gradients) walks the same way as without."""
    model, plain = lora(), lora()
    config = quick(mode="adamw", damping_mode="absolute", kfac_damping=1e6, grafting=grafting)
    with caplog.at_level(logging.INFO, "grit"):
        optimizer = wrapped(model, config, eps=1e-20)
        ours = train(model, optimizer, 6)
    theirs = train(plain, torch.optim.AdamW(trainable(plain), 0.01, eps=1e-20), 6)
    assert worst(ours, theirs) < 1e-4
    records = effects(optimizer.manager)
    assert len(records) == 6
    for record in records:
        assert record["effective"] is False
        assert record["ready_layers"] == record["layers"] == 3
        assert "damping" in record["reason"] and "constant factor" in record["reason"]
        assert ("grafting removes" if grafting else "AdamW cancels") in record["reason"]
        assert record["damping_share"] > 1e5
        assert record["cosine_min"] == pytest.approx(1.0, abs=1e-9)
    assert len(said(caplog, "no effective change: every preconditioner is a multiple of the identity")) == 6
    assert all(r.levelno == logging.WARNING for r in said(caplog, "no effective change"))
    assert not said(caplog, "applied")
    optimizer.manager.close()


@pytest.mark.parametrize("grafting", [True, False])
def test_the_same_setup_with_relative_damping_is_reported_as_applied(grafting, caplog):
    model, plain = lora(), lora()
    with caplog.at_level(logging.INFO, "grit"):
        optimizer = wrapped(model, quick(mode="adamw", grafting=grafting))
        ours = train(model, optimizer, 6)
    theirs = train(plain, torch.optim.AdamW(trainable(plain), 0.01), 6)
    assert worst(ours, theirs) > 1e-2
    for record in effects(optimizer.manager):
        assert record["effective"] is True and "reason" not in record
        assert record["cosine_min"] < record["cosine_median"] < 0.99
        assert record["damping_share"] == pytest.approx(1e-3, rel=1e-3)
    lines = said(caplog, "preconditioning applied to 3 of 3 layers; cosine of raw and natural gradient")
    assert len(lines) == 6
    assert not said(caplog, "no effective change")
    optimizer.manager.close()


def test_the_reported_cosines_are_those_of_the_gradients():
    model = lora(dtype=torch.float64)
    optimizer = wrapped(model, quick(mode="adamw", grafting=False))
    train(model, optimizer, 2)
    backward(model, 2)
    raw = [p.grad.clone() for p in trainable(model)]
    optimizer.step()
    cosines = [
        float(F.cosine_similarity(a.flatten(), p.grad.flatten(), 0)) for a, p in zip(raw, trainable(model), strict=True)
    ]
    record = effects(optimizer.manager)[-1]
    assert record["cosine_min"] == pytest.approx(min(cosines), rel=1e-9)
    assert record["cosine_median"] == pytest.approx(sorted(cosines)[2], rel=1e-9)  # the lower of the middle two
    assert record["max_one_minus_cosine"] == pytest.approx(1 - min(cosines), rel=1e-9)
    optimizer.manager.close()


def test_a_constant_factor_under_sgd_is_an_effect():
    """SGD does not cancel a factor, so there the same preconditioner changes the step, and the report says so."""
    model = lora()
    optimizer = wrapped(model, quick(mode="sgd", damping_mode="absolute", kfac_damping=1e6, kl_clip=0.0))
    train(model, optimizer, 2)
    assert [r["effective"] for r in effects(optimizer.manager)] == [True, True]
    optimizer.manager.close()


def test_paper_values_under_a_mean_loss_leave_b_a_mere_scalar():
    """Σ_g of a mean loss is far below λ = 10⁻³: B gets 10³·∇B. A, which Σ_a acts on in that pairing, is changed."""
    model = lora()
    changes = {"grit_cov_update_freq": 1, "kfac_update_freq": 1, "reprojection": "none", "log_freq": 1}
    config = GRITConfig.paper(**changes, lambda_kfac=0.0, lambda_reproj=0.0, adaptive_schedule=False)
    optimizer = wrapped(model, config)
    train(model, optimizer, 3, n=512, scale=0.1)
    backward(model, 3, n=512, scale=0.1)
    a, b = sides(model)
    raw_a, raw_b = [p.grad.clone() for p in a], [p.grad.clone() for p in b]
    optimizer.step()
    for raw, p in zip(raw_b, b, strict=True):
        assert 1 - float(F.cosine_similarity(raw.double().flatten(), p.grad.double().flatten(), 0)) < 1e-6
        torch.testing.assert_close(p.grad, raw * 1e3, rtol=1e-2, atol=1e-2 * float(raw.abs().max()) * 1e3)
    for raw, p in zip(raw_a, a, strict=True):
        assert float(F.cosine_similarity(raw.double().flatten(), p.grad.double().flatten(), 0)) < 0.99
    spectra = [r for r in optimizer.manager.history if r["kind"] == "spectra"][-1]["layers"]
    assert all(layer["damping_share_g"] > 1e2 and layer["damping_share_a"] < 1 for layer in spectra.values())
    optimizer.manager.close()


@pytest.mark.parametrize("mode", MODES)
def test_factors_that_are_not_ready_change_nothing_and_it_is_said(mode, caplog):
    model, plain = lora(), lora()
    with caplog.at_level(logging.INFO, "grit"):
        optimizer = wrapped(model, quick(mode=mode, kfac_min_samples=1000, kl_clip=0.0))
        ours = train(model, optimizer, 4)
    theirs = train(plain, make_inner(mode, trainable(plain)), 4)
    assert worst(ours, theirs) < 1e-6 if mode == "eigen_adamw" else equal(ours, theirs)
    assert [r["reason"] for r in effects(optimizer.manager)] == [
        f"no factor is ready ({32 * i} of 1000 samples)" for i in range(1, 5)
    ]
    assert len(said(caplog, "no effective change: no factor is ready")) == 4
    assert not said(caplog, "applied")
    optimizer.manager.close()


@pytest.mark.parametrize("mode", MODES)
def test_before_the_warmup_is_over_training_is_plain_to_the_bit_and_it_is_said(mode, caplog):
    model, plain = lora(), lora()
    with caplog.at_level(logging.INFO, "grit"):
        optimizer = wrapped(model, quick(mode=mode, ng_warmup_steps=5))
        reference = make_inner(mode, trainable(plain))
        for i in range(5):
            ours, theirs = train(model, optimizer, 1, i), train(plain, reference, 1, i)
            assert worst(ours, theirs) < 1e-6 if mode == "eigen_adamw" else equal(ours, theirs)
        assert len(said(caplog, "no effective change: natural-gradient warm-up until step 5")) == 5
        assert not said(caplog, "applied")
        ours, theirs = train(model, optimizer, 1, 5), train(plain, reference, 1, 5)
    assert worst(ours, theirs) > 1e-4
    assert [r["effective"] for r in effects(optimizer.manager)] == [False] * 5 + [True]
    assert len(said(caplog, "preconditioning applied")) == 1
    optimizer.manager.close()


def test_eigenbases_are_applied_and_reported(caplog):
    model, plain = lora(), lora()
    with caplog.at_level(logging.INFO, "grit"):
        optimizer = wrapped(model, quick())
        ours = train(model, optimizer, 4)
    assert worst(ours, train(plain, torch.optim.AdamW(trainable(plain), 0.01), 4)) > 1e-3
    assert all(r["effective"] and r["max_basis_rotation"] > 0.1 for r in effects(optimizer.manager))
    assert len(said(caplog, "preconditioning applied to 3 of 3 layers; largest basis rotation")) == 4
    optimizer.manager.close()


def test_diagonal_factors_have_no_effect_on_adam_and_it_is_said(caplog):
    """Eigenbases that only reorder and flip axes: Adam does not see them."""
    model = lora()
    with caplog.at_level(logging.INFO, "grit"):
        optimizer = wrapped(model, quick(grit_cov_update_freq=100, kfac_update_freq=1))
        manager = optimizer.manager
        train(model, optimizer, 1)
        for state in manager.states:
            for name in ("ema_a", "ema_g"):
                state.t[name] = torch.diag_embed(torch.tensor([2.0, 5.0, 1.0, 3.0])).repeat(len(state.group), 1, 1)
        caplog.clear()
        train(model, optimizer, 1, 1)
    record = effects(manager)[-1]
    assert record["effective"] is False and "permutation of the axes" in record["reason"]
    assert len(said(caplog, "no effective change")) == 1 and not said(caplog, "applied")
    manager.close()


# Equal to AdamW where it has to be


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("weight_decay", "betas", "eps"), [(0.0, (0.9, 0.999), 1e-8), (0.1, (0.8, 0.95), 1e-3)])
def test_with_identity_bases_the_step_is_torchs_adamw(dtype, tolerance, weight_decay, betas, eps):
    options = {"weight_decay": weight_decay, "betas": betas, "eps": eps}
    model, plain = lora(dtype=dtype), lora(dtype=dtype)
    optimizer = wrapped(model, quick(ng_warmup_steps=100), **options)
    reference = torch.optim.AdamW(trainable(plain), 0.01, **options)
    start = [p.detach().clone() for p in trainable(model)]
    for i in range(10):
        # The same gradients for both, so that rounding does not grow through the model.
        backward(plain, i)
        for p, q in zip(trainable(model), trainable(plain), strict=True):
            p.grad = q.grad.clone()
        optimizer.step()
        reference.step()
        reference.zero_grad()
    moved = [p.detach() - s for p, s in zip(trainable(model), start, strict=True)]
    expected = [p.detach() - s for p, s in zip(trainable(plain), start, strict=True)]
    # A change is a difference of weights, so it is known to the weights' last digit only.
    for a, b, w in zip(moved, expected, start, strict=True):
        assert float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), float(w.abs().max()))
        assert float(b.abs().max()) > 0.02
    optimizer.manager.close()


def test_layers_without_gradient_and_groups_of_their_own_step_as_in_torchs_adamw():
    """`first` and `second` are one stack, but have their own learning rate, betas, ε, decay, and step counts."""
    model, plain = lora(dtype=torch.float64), lora(dtype=torch.float64)

    def groups(net):
        parts = {"first": [], "second": [], "head": []}
        for name, p in net.named_parameters():
            if p.requires_grad:
                parts[name.split(".")[2]].append(p)
        return [
            {"params": parts["first"], "lr": 1e-2, "weight_decay": 0.1},
            {"params": parts["second"], "lr": 3e-2, "betas": (0.5, 0.9), "eps": 1e-3},
            {"params": parts["head"]},
        ]

    optimizer = GritOptimizer(
        torch.optim.AdamW(groups(model), 5e-3), GRITManager(model, quick(ng_warmup_steps=100, capture="gradients"))
    )
    reference = torch.optim.AdamW(groups(plain), 5e-3)
    absent = {0: [0, 1], 1: [], 2: [2, 3], 3: [0, 1, 2, 3], 4: [], 5: [4, 5]}
    for i in range(6):
        backward(plain, i)
        for j, (p, q) in enumerate(zip(trainable(model), trainable(plain), strict=True)):
            if j in absent[i]:
                q.grad = None
            p.grad = None if q.grad is None else q.grad.clone()
        optimizer.step()
        reference.step()
        reference.zero_grad()
    assert worst([p.detach() for p in trainable(model)], [p.detach() for p in trainable(plain)]) < 1e-13
    optimizer.manager.close()


@pytest.mark.parametrize("how", ["modules_to_save", "own layer"])
@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_other_weights_are_stepped_by_the_inner_optimizer_as_plain_adamw_would(how, ratio):
    extra = nn.Linear(5, 3)
    model = lora(targets=("first", "second"), modules_to_save=["head"] if how == "modules_to_save" else None)
    others = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    assert len(others) == (2 if how == "modules_to_save" else 0)
    if how == "own layer":
        others = list(extra.parameters())
    lora_weights = [p for n, p in model.named_parameters() if "lora_" in n]
    options = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    optimizer = GritOptimizer(
        torch.optim.AdamW([*lora_weights, *others], **options), GRITManager(model, quick(lr_ratio_b=ratio))
    )
    copies = [p.detach().clone().requires_grad_() for p in others]
    reference = torch.optim.AdamW(copies, **options)
    generator = torch.Generator().manual_seed(3)
    for i in range(5):
        optimizer.zero_grad()
        backward(model, i)
        for p, q in zip(others, copies, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        before = [p.detach().clone() for p in lora_weights]
        optimizer.step()
        reference.step()
        assert equal([p.detach() for p in others], [q.detach() for q in copies]), i
        assert all(p.grad is not None for p in lora_weights)
        assert not any(torch.equal(p, b) for p, b in zip(lora_weights, before, strict=True))
    assert not any(p in optimizer.optimizer.state for p in lora_weights)  # stepped once, in the eigenbasis
    optimizer.manager.close()


# lr_ratio_b


@pytest.mark.parametrize("mode", MODES)
def test_lr_ratio_b_is_the_ratio_under_every_schedule(mode):
    model = lora()
    optimizer = wrapped(model, quick(mode=mode, lr_ratio_b=4.0))
    a, b = sides(model)
    rate = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert len(rate) == len(a) + len(b) == sum(len(g["params"]) for g in optimizer.param_groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 7 if step < 6 else 3 / step)
    for i in range(10):
        base = 0.01 * ((i + 1) / 7 if i < 6 else 3 / i)
        assert [rate[id(p)]["lr"] for p in a] == [pytest.approx(base)] * 3
        assert [rate[id(p)]["lr"] for p in b] == [pytest.approx(4 * base)] * 3
        train(model, optimizer, 1, i)
        schedule.step()
    optimizer.manager.close()


@pytest.mark.parametrize("mode", ["adamw", "eigen_adamw"])
def test_lr_ratio_b_is_what_adamw_does_with_two_groups(mode):
    model, plain = lora(), lora()
    optimizer = wrapped(model, quick(mode=mode, lr_ratio_b=4.0, ng_warmup_steps=100), weight_decay=0.1)
    a, b = sides(plain)
    reference = torch.optim.AdamW([{"params": a}, {"params": b, "lr": 0.04}], 0.01, weight_decay=0.1)
    ours, theirs = train(model, optimizer, 5), train(plain, reference, 5)
    assert equal(ours, theirs) if mode == "adamw" else worst(ours, theirs) < 1e-6
    optimizer.manager.close()


# Clipping, grafting, trust region


def spy(inner):
    """Record the norm of the gradients that reach the inner optimizer, and which they are."""
    seen = []
    original = inner.step

    def step(*args, **kwargs):
        gradients = [p.grad for g in inner.param_groups for p in g["params"] if p.grad is not None]
        seen.append(float(torch.nn.utils.get_total_norm(gradients)))
        return original(*args, **kwargs)

    inner.step = step
    return seen


@pytest.mark.parametrize("limit", ["config", "argument"])
@pytest.mark.parametrize("mode", ["adamw", "sgd"])
def test_clipping_comes_after_preconditioning(mode, limit):
    """Raw norms are below the limit, natural ones far above: clipping before would let them through."""
    model = lora()
    inner = make_inner(mode, trainable(model))
    seen = spy(inner)
    config = quick(mode=mode, grafting=False, kl_clip=0.0, max_grad_norm=3.0 if limit == "config" else None)
    optimizer = GritOptimizer(inner, GRITManager(model, config), max_grad_norm=3.0 if limit == "argument" else 7.0)
    natural, raw = [], []
    for i in range(4):
        train(model, optimizer, 1, i)
        natural.append(optimizer.manager.metrics()["grit/gradient_norm_natural"])
        raw.append(optimizer.manager.metrics()["grit/gradient_norm_raw"])
    assert min(natural) > 30 and max(raw) < 3
    assert seen == [pytest.approx(3.0, rel=1e-5)] * 4
    optimizer.manager.close()


@pytest.mark.parametrize("mode", ["adamw", "sgd"])
def test_without_a_limit_or_below_it_nothing_is_clipped(mode):
    for config_limit, argument in ((None, None), (0.0, 0.5), (1e9, None)):
        model = lora()
        inner = make_inner(mode, trainable(model))
        seen = spy(inner)
        config = quick(mode=mode, grafting=False, kl_clip=0.0, max_grad_norm=config_limit)
        optimizer = GritOptimizer(inner, GRITManager(model, config), max_grad_norm=argument)
        backward(model)
        optimizer.step()
        assert seen == [pytest.approx(optimizer.manager.metrics()["grit/gradient_norm_natural"], rel=1e-6)]
        assert seen[0] > 10
        optimizer.manager.close()


@pytest.mark.parametrize("regularised", [False, True])
def test_in_the_eigenbasis_the_moments_hold_the_clipped_gradient(regularised):
    """After one step m = (1 − β₁)·clipped gradient, rotated: its norm tells what was let through."""
    model = lora()
    config = quick(max_grad_norm=0.1, lambda_kfac=10.0 if regularised else 0.0)
    optimizer = wrapped(model, config)
    backward(model)
    assert float(torch.nn.utils.get_total_norm([p.grad for p in trainable(model)])) > 0.11
    optimizer.step()
    moments = [state[name] for state in optimizer.manager.states for name in ("m_a", "m_b")]
    assert float(torch.nn.utils.get_total_norm(moments)) == pytest.approx(0.1 * 0.1, rel=1e-5)
    optimizer.manager.close()


def test_step_weights_along_diagonal_factors_are_an_effect_and_reported_as_one():
    model, plain = lora(), lora()
    optimizer = wrapped(model, quick(grit_cov_update_freq=100, eigen_power=0.5))
    manager, reference = optimizer.manager, torch.optim.AdamW(trainable(plain), 0.01)
    train(model, optimizer, 1)
    for state in manager.states:
        for name in ("ema_a", "ema_g"):
            state.t[name] = torch.diag_embed(torch.tensor([5.0, 3.0, 2.0, 1.0])).repeat(len(state.group), 1, 1)
    for p, q in zip(trainable(model), trainable(plain), strict=True):
        q.data.copy_(p.data)
    start = train(plain, reference, 0)
    ours, theirs = train(model, optimizer, 1, 1), train(plain, reference, 1, 1)
    assert (
        worst([a - s for a, s in zip(ours, start, strict=True)], [a - s for a, s in zip(theirs, start, strict=True)])
        > 0.1
    )
    record = effects(manager)[-1]
    assert record["effective"] is True and record["max_basis_rotation"] < 1e-6
    assert record["max_weight_change"] == pytest.approx((1 / 2.75 + 1e-3) ** -0.25 - 1, rel=1e-5)
    manager.close()


@pytest.mark.parametrize("pairing", ["kfac", "paper"])
def test_grafting_keeps_each_tensors_norm_and_changes_its_direction(pairing):
    model, bare = lora(), lora()
    optimizer = wrapped(model, quick(mode="adamw", pairing=pairing))
    ungrafted = wrapped(bare, quick(mode="adamw", pairing=pairing, grafting=False))
    for i in range(3):
        for net in (model, bare):
            net.zero_grad()
            for p, q in zip(trainable(net), trainable(model), strict=True):
                p.data.copy_(q.data)
            backward(net, i)
        raw = [p.grad.clone() for p in trainable(model)]
        optimizer.step()
        ungrafted.step()
        for before, p, q in zip(raw, trainable(model), trainable(bare), strict=True):
            assert float(p.grad.norm()) == pytest.approx(float(before.norm()), rel=1e-6)
            assert float(F.cosine_similarity(before.flatten(), p.grad.flatten(), 0)) < 0.99
            assert float(F.cosine_similarity(q.grad.flatten(), p.grad.flatten(), 0)) > 1 - 1e-6
            assert not float(q.grad.norm()) == pytest.approx(float(before.norm()), rel=1e-2)
    optimizer.manager.close()
    ungrafted.manager.close()


def test_the_trust_region_limits_the_step_in_the_fisher_metric_and_clipping_does_not_shorten_it_twice():
    """ν = √(κ/(lr²·⟨∇, F⁻¹∇⟩)) scales the natural gradient; a clip that it already meets leaves it as it is."""
    kappa, lr = 1e-4, 0.5

    def natural(**changes):
        model = lora(dtype=torch.float64)
        inner = torch.optim.SGD(trainable(model), lr)
        seen = spy(inner)
        optimizer = GritOptimizer(inner, GRITManager(model, quick(mode="sgd", **changes)))
        backward(model)
        raw = [p.grad.clone() for p in trainable(model)]
        optimizer.step()
        optimizer.manager.close()
        return raw, [p.grad.clone() for p in trainable(model)], seen[0]

    raw, free, norm = natural(kl_clip=0.0)
    length = sum(float((g * n).sum()) for g, n in zip(raw, free, strict=True))
    nu = math.sqrt(kappa / (lr**2 * length))
    assert nu < 0.1
    _, held, held_norm = natural(kl_clip=kappa)
    for a, b in zip(held, free, strict=True):
        torch.testing.assert_close(a, nu * b, rtol=1e-9, atol=0)
    assert natural(kl_clip=1e9)[2] == pytest.approx(norm, rel=1e-12)
    for limit in (held_norm * 1.5, held_norm * 0.5):
        assert natural(kl_clip=kappa, max_grad_norm=limit)[2] == pytest.approx(min(limit, held_norm), rel=1e-5)


# Determinism


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("capture", ["auto", "gradients"])
def test_two_runs_are_equal_to_the_bit(mode, capture):
    """Reprojection, adaptive intervals and regularisers included."""

    def once():
        model = lora()
        config = quick(
            mode=mode,
            capture=capture,
            reprojection="balanced",
            reprojection_freq=3,
            rank_adaptation_threshold=0.8,
            lambda_kfac=1e-3,
            lambda_reproj=1e-3,
            max_grad_norm=1.0,
            rank_shrink="events",
        )
        optimizer = wrapped(model, config)
        weights = train(model, optimizer, 8)
        optimizer.manager.close()
        return weights, optimizer.manager.state_dict()

    (one, state_one), (two, state_two) = once(), once()
    assert equal(one, two)
    assert state_one["history"] == state_two["history"]
    for name, layer in state_one["layers"].items():
        assert all(torch.equal(t, state_two["layers"][name][k]) for k, t in layer.items())
    assert any(r.shape[0] < 4 for r in one)  # ranks did shrink on the way


# Convergence


def regression(seed):
    """Inputs whose variance spans 10⁴ along directions that lie across the axes, y = rotated unit-variance causes
    + noise; LoRA of full rank, so the best loss is that of least squares."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    d, n = 6, 256
    base = nn.Sequential(nn.Linear(d, d, bias=False))
    model = get_peft_model(base, LoraConfig(r=d, lora_alpha=d, target_modules=["0"])).double()
    layer = model.base_model.model[0]
    layer.base_layer.weight.data.zero_()
    layer.lora_A["default"].weight.data.copy_(torch.linalg.qr(normal(d, d))[0])
    causes, across = normal(n, d), torch.linalg.qr(normal(d, d))[0]
    x = causes * torch.logspace(0, -2, d, dtype=torch.float64) @ across.T
    y = causes @ torch.linalg.qr(normal(d, d))[0] + normal(n, d)
    best = 0.5 * float((x @ torch.linalg.lstsq(x, y).solution - y).square().sum()) / n
    return model, x, y, best


def excess_loss(seed, inner_class, lr, mode=None, steps=60):
    """Loss above least squares after some full-batch steps."""
    model, x, y, best = regression(seed)
    kwargs = {"momentum": 0.9} if inner_class is torch.optim.SGD else {"weight_decay": 0.0}
    optimizer = inner_class(trainable(model), lr, **kwargs)
    if mode:
        optimizer = GritOptimizer(optimizer, GRITManager(model, quick(mode=mode, kl_clip=0.01, log_freq=1000)))
        optimizer.manager.capture.loss_divisor = len(x)

    def loss():
        return 0.5 * (model(x) - y).square().sum() / len(x)

    try:
        for _ in range(steps):
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
    except NonFiniteGradientsError:
        return float("inf")
    finally:
        if mode:
            optimizer.manager.close(check=False)
    end = float(loss().detach()) - best
    return end if math.isfinite(end) else float("inf")


@pytest.mark.parametrize(
    ("inner_class", "mode", "rates", "our_rates", "factor"),
    [
        (torch.optim.AdamW, "eigen_adamw", (0.03, 0.1, 0.3, 1.0), (0.03, 0.1, 0.3, 1.0), 0.6),
        (torch.optim.SGD, "sgd", (0.01, 0.03, 0.1, 0.3), (0.01, 0.03, 0.1, 0.3), 0.1),
    ],
)
def test_on_an_ill_conditioned_problem_grit_ends_lower_than_its_rival_at_any_rate(
    inner_class, mode, rates, our_rates, factor
):
    theirs = [excess_loss(0, inner_class, lr) for lr in rates]
    ours = [excess_loss(0, inner_class, lr, mode) for lr in our_rates]
    print(f"{inner_class.__name__} {theirs}, {mode} {ours}")
    assert min(theirs) not in (theirs[0], theirs[-1])  # the rival's best rate is inside the grid
    assert min(ours) < factor * min(theirs)


def test_state_is_shared_with_the_wrapped_optimizer_after_loading_too():
    model = lora()
    optimizer = wrapped(model, quick(mode="adamw"))
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    again = lora()
    other = wrapped(again, quick(mode="adamw"))
    other.load_state_dict(saved)
    assert other.param_groups is other.optimizer.param_groups and other.state is other.optimizer.state
    for group in other.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in trainable(again)]
    for group in other.param_groups:
        group["weight_decay"] = 0.0
    train(again, other, 1, 2)
    assert equal(before, [p.detach() for p in trainable(again)])
    optimizer.manager.close()
    other.manager.close()
