"""The optimizers against torch's AdamW and SGD where they are to be it; skipping, clipping, checkpoints."""

import copy
import io
import math

import pytest
import torch
from small_net import Net, changes_of, optimizer_of, train

from grit.errors import NonFiniteGradientsError
from grit_vlm import create_grit_optimizer
from grit_vlm.core.fisher_info import FisherInformationMatrix
from grit_vlm.core.moments import EigenMoments
from grit_vlm.optimizers.natural_gradient import MODES, OptimizerTypeError

ESTIMATES = ("diagonal", "kfac", "block_diagonal")
ADAMS = ("grit_adam", "grit_adam_preconditioned", "adaptive_adam")
OFF = {"enable_natural_gradient": False, "enable_projection": False}


def assert_adamw(net, optimizer, weights_of=lambda net: net.lora, steps=8, start=0, **options):
    """Step for step what torch's AdamW makes of the same gradients."""
    plain = Net()
    plain.load_state_dict(net.state_dict())
    reference = torch.optim.AdamW(weights_of(plain), **options)
    for step in range(start, start + steps):
        train(net, optimizer, 1, step)
        train(plain, reference, 1, step)
        for own, theirs in zip(weights_of(net), weights_of(plain), strict=True):
            torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-11, msg=f"step {step}")


# Where nothing is done it is AdamW


@pytest.mark.parametrize("grafting", [False, None])
def test_without_weights_along_directions_it_is_adamw(grafting):
    net = Net()
    options = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.99)}
    optimizer = optimizer_of(net, "grit_adam", eigen_power=0.0, grafting=grafting, **options)
    assert_adamw(net, optimizer, **options)


@pytest.mark.parametrize("kind", ADAMS)
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_switched_off_it_is_adamw(kind, estimate):
    """Also with a trust region that would cut steps this long."""
    net = Net(fisher_approximation=estimate, **OFF)
    optimizer = optimizer_of(net, kind, lr=0.1, weight_decay=0.01, kl_clip=1e-6)
    assert_adamw(net, optimizer, lr=0.1, weight_decay=0.01)


@pytest.mark.parametrize("kind", ["grit_sgd", "adaptive_sgd"])
def test_switched_off_it_is_sgd(kind):
    net, plain = Net(**OFF), Net()
    optimizer = optimizer_of(net, kind, lr=0.1, weight_decay=0.01, kl_clip=1e-6)
    reference = torch.optim.SGD(plain.lora, lr=0.1, weight_decay=0.01, momentum=0.9)
    for net_, optimizer_ in ((net, optimizer), (plain, reference)):
        train(net_, optimizer_, 6)
    for own, theirs in zip(net.lora, plain.lora, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ADAMS)
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_during_the_warm_up_it_is_adamw(kind, estimate):
    net = Net(fisher_approximation=estimate, enable_projection=True)
    optimizer = optimizer_of(net, kind, lr=0.01, ng_warmup_steps=5)
    assert_adamw(net, optimizer, steps=5, lr=0.01, weight_decay=0.0)
    manager = net.first.manager
    assert not any(m.follows for m in manager.moments.values())
    train(net, optimizer, 1, 5)
    if kind != "grit_adam_preconditioned":  # the first step after it, though step 5 is none that updates estimates
        assert all(m.follows for m in manager.moments.values())


@pytest.mark.parametrize("kind", ADAMS)
def test_other_weights_are_stepped_by_the_wrapped_optimizer(kind):
    def everything(net):
        return [*net.lora, *net.head.parameters()]

    net = Net(**OFF)
    optimizer = optimizer_of(net, kind, everything(net), lr=0.02, weight_decay=0.1)
    assert_adamw(net, optimizer, everything, lr=0.02, weight_decay=0.1)
    # The same where LoRA is preconditioned: the head's step is AdamW's of its own gradient.
    net = Net(fisher_approximation="kfac")
    optimizer = optimizer_of(net, kind, everything(net), lr=0.02)
    alone = copy.deepcopy(net.head)
    reference = torch.optim.AdamW(alone.parameters(), lr=0.02, weight_decay=0.0)
    for step in range(5):
        optimizer.zero_grad()
        net.backward(step)
        for p, q in zip(alone.parameters(), net.head.parameters(), strict=True):
            p.grad = q.grad.clone()
        optimizer.step()
        reference.step()
    for p, q in zip(alone.parameters(), net.head.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


# Moments


@pytest.mark.parametrize("estimate", ["kfac", "block_diagonal"])
def test_moments_turn_with_the_eigenvectors(estimate):
    """m is the same vector before and after; v keeps its sum; with the coordinates as eigenvectors nothing changes."""
    net = Net(fisher_approximation=estimate)
    layer = net.first
    moments = EigenMoments(layer.lora_A, layer.lora_B)
    for moment in (moments.m, moments.v):
        for side in moment:
            moment[side] = torch.rand_like(moment[side])
    before = {side: (m.clone(), moments.v[side].sum()) for side, m in moments.m.items()}
    for seed in range(3):
        net.backward(seed)
        layer.update_fisher_and_projection()
        moments.follow(layer.fisher_matrix)
        for side, (m, total) in before.items():
            back = moments.back(side, moments.m[side], layer.fisher_matrix)
            torch.testing.assert_close(back if side == "A" else back.mT, m)
            torch.testing.assert_close(moments.v[side].sum(), total)
            assert not torch.allclose(layer.fisher_matrix.take_out(side, moments.m[side]), m)
            gradient = torch.randn_like(layer.lora_A if side == "A" else layer.lora_B)
            there = moments.coordinates(side, gradient, layer.fisher_matrix)
            torch.testing.assert_close(moments.back(side, there, layer.fisher_matrix), gradient)

    straight = FisherInformationMatrix(estimate, block_size=4)  # tokens along the axes: eigenvectors are the axes
    x, e = torch.eye(6).double() * torch.linspace(3, 1, 6), torch.eye(7).double()[:6] * torch.linspace(3, 1, 6)[:, None]
    for rank_one in range(3):
        h = torch.zeros(6, 3).double()
        h[:, rank_one] = 3.0 - rank_one
        straight.observe(x, h, h, e)
    fresh = EigenMoments(layer.lora_A, layer.lora_B)
    fresh.m = {side: torch.rand_like(m) for side, m in fresh.m.items()}
    fresh.v = {side: torch.rand_like(v) for side, v in fresh.v.items()}
    old = {side: (fresh.m[side].clone(), fresh.v[side].clone()) for side in "AB"}
    fresh.follow(straight)
    for side, (m, v) in old.items():
        torch.testing.assert_close(straight.take_out(side, fresh.m[side]).abs(), m)  # a sign is free
        torch.testing.assert_close(straight.take_out(side, fresh.v[side]), v)


# What else a step does


@pytest.mark.parametrize("kind", sorted(MODES))
def test_gradients_that_are_not_finite_are_skipped(kind):
    """A step with NaN changes nothing, nor do its tokens spoil the next one; ten in a row are an error."""
    net, clean = Net(fisher_update_freq=1), Net(fisher_update_freq=1)
    optimizer, reference = optimizer_of(net, kind, lr=0.01), optimizer_of(clean, kind, lr=0.01)
    train(net, optimizer, 2)
    train(clean, reference, 2)
    weights = [p.detach().clone() for p in net.lora]
    samples = net.first.fisher_matrix.samples
    optimizer.zero_grad()
    net.backward(2, scale=math.nan)
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(net.lora, weights, strict=True))
    assert net.first.manager.skipped == 1 and net.first.fisher_matrix.samples == samples
    train(net, optimizer, 1, 3)
    train(clean, reference, 1, 3)
    assert net.first.fisher_matrix.samples == samples + 16
    for own, theirs in zip(net.lora, clean.lora, strict=True):
        assert torch.equal(own, theirs)
    with pytest.raises(NonFiniteGradientsError, match="10 steps in a row"):
        for step in range(10):
            optimizer.zero_grad()
            net.backward(step, scale=math.inf)
            optimizer.step()
    assert net.first.manager.skipped == 11


@pytest.mark.parametrize("kind", ["grit_adam", "grit_adam_preconditioned"])
def test_clipping(kind):
    """Of raw gradients with grit_adam (a rotation keeps lengths), of natural ones with the other."""
    net = Net(fisher_approximation="kfac")
    optimizer = optimizer_of(net, kind, lr=0.01, max_grad_norm=1e-3)
    train(net, optimizer, 1)
    total = torch.nn.utils.get_total_norm([p.grad for p in net.lora])
    torch.testing.assert_close(float(total), 1e-3, rtol=1e-3, atol=0)


def test_learning_rate_schedules_work_on_it():
    net = Net(fisher_approximation="kfac")
    optimizer = optimizer_of(net, "grit_adam", lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    first = changes_of(net, optimizer, 0)
    schedule.step()
    second = changes_of(net, optimizer, 1)
    assert bool(first["first"]["A"].any()) and not bool(second["first"]["A"].any())


@pytest.mark.parametrize("kind", sorted(MODES))
@pytest.mark.parametrize("estimate", ["kfac", "block_diagonal"])
def test_a_saved_state_goes_on_to_the_same_bits(kind, estimate):
    """Through a file that torch reads with weights_only=True; projection with an adaptive schedule."""
    told = {"fisher_approximation": estimate, "enable_projection": True, "projection_schedule": "adaptive",
            "projection_budget_end": 30}  # fmt: skip
    straight, broken = Net(**told), Net(**told)

    def run(net, optimizer, steps, start):
        for step in range(start, start + steps):
            train(net, optimizer, 1, step)
            net.first.manager.observe_loss(1.0)

    whole = optimizer_of(straight, kind, lr=0.01, total_steps=40)
    run(straight, whole, 13, 0)
    first = optimizer_of(broken, kind, lr=0.01, total_steps=40)
    run(broken, first, 7, 0)
    file = io.BytesIO()
    torch.save({"net": broken.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = Net(**told)
    again.load_state_dict(state["net"])
    second = optimizer_of(again, kind, lr=0.01, total_steps=40)
    second.load_state_dict(state["optimizer"])
    run(again, second, 6, 7)
    for one, two in zip(straight.lora, again.lora, strict=True):
        assert torch.equal(one, two)
    assert straight.first.projection_budget == again.first.projection_budget
    assert straight.first.manager.schedules["all"].budget() > 2


def test_budgets_follow_the_schedule():
    net = Net(fisher_approximation="diagonal", enable_projection=True, projection_budget_end=22, fisher_update_freq=1)
    optimizer = optimizer_of(net, "grit_adam", lr=0.01, total_steps=10)
    found = []
    for step in range(12):
        train(net, optimizer, 1, step)
        found.append(sum(layer.projection_budget for layer in net.layers.values()))
    assert found == [2 * (2 + 2 * min(step, 10)) for step in range(12)]
    assert net.first.manager.schedules["all"].budget() == 22  # the current one


def test_mistakes():
    net = Net()
    with pytest.raises(OptimizerTypeError, match="did you mean 'grit_adam'"):
        optimizer_of(net, "grid_adam")
    with pytest.raises(OptimizerTypeError, match="at least one GRIT-LoRA layer"):
        create_grit_optimizer(net.lora, "grit_adam")
    train(net, optimizer_of(net), 1)  # from here on they are one manager's
    with pytest.raises(OptimizerTypeError, match=r"expected all layers of the adapter, got them without \['second'\]"):
        create_grit_optimizer(net.lora, "grit_adam", {"first": net.first})
    with pytest.raises(ValueError, match="one without those of"):
        optimizer_of(net, "grit_adam", net.lora[:2])
    with pytest.raises(ValueError, match=r"expected torch.optim.SGD, got AdamW"):
        optimizer_of(net, "grit_sgd", optimizer=torch.optim.AdamW(net.lora))
    with pytest.raises(ValueError, match="expected an optimizer state with GRIT's part"):
        optimizer_of(net).load_state_dict(torch.optim.AdamW(net.lora).state_dict())


def test_a_distributed_run_is_refused(monkeypatch):
    """Each rank has estimates of its own tokens; nobody averages them yet."""
    net = Net()
    monkeypatch.setattr("grit_vlm.core.manager.world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="expected one process, got 2"):
        optimizer_of(net)
