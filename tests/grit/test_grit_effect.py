"""What GRIT says about its effect is what it does; and what it must leave alone stays to the bit."""

import logging

import pytest
import torch

from grit import GRITManager, GritOptimizer
from probes import Probe, judge
from tests.grit.nets import MODES, backward, inner_for, lora, of_kind, quick, same, train, trainable, wrapped


def worst(one, other):
    """Largest relative difference of two lists of tensors."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(one, other, strict=True))


@pytest.fixture(autouse=True)
def everything_said(caplog):
    caplog.set_level(logging.INFO, "grit")


def said(caplog, text):
    return [r for r in caplog.records if r.name == "grit" and text in r.getMessage()]


# Effect and its report


@pytest.mark.parametrize(("grafting", "damping"), [(True, 1e12), (False, 1e6)])
def test_a_constant_factor_is_reported_as_no_effect(grafting, damping, caplog):
    """Infinite damping is AdamW: every inverse is a multiple of I, and ε is below the scaled gradients."""
    model, plain = lora(dtype=torch.float64), lora(dtype=torch.float64)
    config = quick(mode="adamw", damping_mode="absolute", kfac_damping=damping, grafting=grafting)
    optimizer = wrapped(model, config, eps=1e-30)
    ours = train(model, optimizer, 3)
    theirs = train(plain, torch.optim.AdamW(trainable(plain), 0.01, eps=1e-30), 3)
    assert worst(ours, theirs) < (1e-9 if grafting else 1e-4)
    for record in of_kind(optimizer.manager.history, "effect"):
        assert record["effective"] is False and record["ready_layers"] == record["layers"] == 3
        assert "(damping λ is " in record["reason"] and record["damping_share"] > 1e5
        assert ("grafting removes" if grafting else "AdamW cancels") + " a constant factor" in record["reason"]
        assert record["max_anisotropy"] == pytest.approx(0.0, abs=1e-4)
    lines = said(caplog, "no effective change: every preconditioner is a multiple of the identity")
    assert [r.levelno for r in lines] == [logging.WARNING] * 3 and not said(caplog, "applied")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"kfac_min_samples": 32 * 5}, "no factor is ready"), ({"ng_warmup_steps": 4}, "natural-gradient warm-up until")],
)
def test_until_factors_are_ready_and_the_warmup_is_over_training_is_plain_and_the_log_says_so(
    mode, changes, reason, caplog
):
    model, plain = lora(), lora()
    optimizer, reference = wrapped(model, quick(mode=mode, kl_clip=0.0, **changes)), inner_for(mode, trainable(plain))
    ours, theirs = train(model, optimizer, 4), train(plain, reference, 4)
    assert worst(ours, theirs) < 1e-6 if mode == "eigen_adamw" else same(ours, theirs)
    assert len(said(caplog, f"no effective change: {reason}")) == 4 and not said(caplog, "applied")
    assert worst(train(model, optimizer, 1, 4), train(plain, reference, 1, 4)) > 1e-4
    assert [r["effective"] for r in of_kind(optimizer.manager.history, "effect")] == [False] * 4 + [True]


def test_diagonal_factors_have_no_effect_on_adam_and_it_is_said(caplog):
    """Eigenbases that only reorder and flip axes: Adam does not see them."""
    model = lora()
    optimizer = wrapped(model, quick(grit_cov_update_freq=100, kfac_update_freq=1))
    manager = optimizer.manager
    train(model, optimizer, 1)
    for state in manager.curvature.states:
        for name in ("ema_a", "ema_g"):
            state.t[name] = torch.diag_embed(torch.tensor([2.0, 5.0, 1.0, 3.0])).repeat(len(state.group), 1, 1)
    caplog.clear()
    train(model, optimizer, 1, 1)
    record = of_kind(manager.history, "effect")[-1]
    assert record["effective"] is False and "permutation of the axes" in record["reason"]
    assert len(said(caplog, "no effective change")) == 1 and not said(caplog, "applied")


# Equal to AdamW where it has to be


def test_layers_without_gradient_and_groups_of_their_own_step_as_in_torchs_adamw():
    """Identity bases. `first` and `second` are one stack, with own learning rate, betas, ε, decay, and step counts."""
    model, plain = lora(dtype=torch.float64), lora(dtype=torch.float64)

    def groups(net):
        first, second, head = (trainable(layer) for layer in net.base_model.model.children())
        return [
            {"params": first, "lr": 1e-2, "weight_decay": 0.1},
            {"params": second, "lr": 3e-2, "betas": (0.5, 0.9), "eps": 1e-3},
            {"params": head},
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


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_other_weights_are_stepped_by_the_inner_optimizer_as_plain_adamw_would(ratio):
    model = lora(targets=("first", "second"), modules_to_save=["head"])
    ours = [p for n, p in model.named_parameters() if "lora_" in n]
    others = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    options = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    inner = torch.optim.AdamW([*ours, *others], **options)
    optimizer = GritOptimizer(inner, GRITManager(model, quick(lr_ratio_b=ratio)))
    copies = [p.detach().clone().requires_grad_() for p in others]
    reference = torch.optim.AdamW(copies, **options)
    for i in range(5):
        optimizer.zero_grad()
        backward(model, i)
        for p, q in zip(others, copies, strict=True):
            q.grad = p.grad.clone()
        before = [p.detach().clone() for p in ours]
        optimizer.step()
        reference.step()
        assert len(others) == 2 and same([p.detach() for p in others], [q.detach() for q in copies]), i
        assert all(p.grad is not None for p in ours)
        assert not any(torch.equal(p, b) for p, b in zip(ours, before, strict=True))
    assert not any(p in inner.state for p in ours)  # stepped once, in the eigenbasis


# Clipping


@pytest.mark.parametrize("regularized", [False, True])
def test_in_the_eigenbasis_the_moments_hold_the_clipped_gradient(regularized):
    """After one step m = (1 − β₁)·clipped gradient, rotated: its norm tells what was let through."""
    model = lora()
    optimizer = wrapped(model, quick(max_grad_norm=0.1, lambda_kfac=10.0 if regularized else 0.0))
    backward(model)
    assert float(torch.nn.utils.get_total_norm([p.grad for p in trainable(model)])) > 0.11
    optimizer.step()
    moments = [state[name] for state in optimizer.manager.curvature.states for name in ("m_a", "m_b")]
    assert float(torch.nn.utils.get_total_norm(moments)) == pytest.approx(0.1 * 0.1, rel=1e-5)


@pytest.mark.parametrize(
    ("warm_up", "dtype"),
    [(1000, torch.float32), (0, torch.float32), (0, torch.bfloat16), (0, torch.float16)],  # of the last v underflows
)
def test_what_grit_does_beside_its_axes_is_no_effect_to_the_probe(warm_up, dtype):
    """What the probe holds a step against is AdamW's with all of it, so that nothing but the axes is an effect."""
    model = lora(dtype=dtype)
    optimizer = wrapped(model, quick(nesterov=True, cautious=True, orthogonal=True, ng_warmup_steps=warm_up))
    with Probe(model, optimizer, claims=True) as probe:
        train(model, optimizer, 24)
    verdict = judge(probe)
    assert verdict.verdict == ("effective" if warm_up == 0 else "no_effect"), verdict.reason
