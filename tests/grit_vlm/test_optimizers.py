"""The optimizers against torch's AdamW and SGD where they are to be it, dense solves, resuming."""

import io
import math
from functools import partial

import pytest
import torch
from small_net import Net, changes_of, optimizer_of, train

from grit_vlm import create_grit_optimizer
from grit_vlm.core.fisher_curvature import EigenMoments
from grit_vlm.core.fisher_info import turn, turn_back
from grit_vlm.optimizers.natural_gradient import MODES

ESTIMATES = ("diagonal", "kfac")
ADAMS = ("grit_adam", "grit_adam_preconditioned")
OFF = {"enable_natural_gradient": False, "enable_projection": False}


def everything(net):
    return [*net.lora, *net.head.parameters()]


def assert_equal(net, optimizer, make, weights_of=lambda net: net.lora, steps=8):
    """Step for step what torch's own optimizer makes of the same gradients."""
    plain = Net()
    reference = make(weights_of(plain))
    for step in range(steps):
        train(net, optimizer, 1, step)
        train(plain, reference, 1, step)
        for own, theirs in zip(weights_of(net), weights_of(plain), strict=True):
            torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-11, msg=f"step {step}")


@pytest.mark.parametrize(
    ("kind", "estimate", "settings", "weights_of"),
    [
        # No weights along directions; switched off; beside others.
        ("grit_adam", None, {"eigen_power": 0.0, "grafting": False}, None),
        ("grit_adam", None, {"eigen_power": 0.0}, None),
        *((kind, estimate, {}, None) for kind, estimate in zip(ADAMS, ESTIMATES, strict=True)),
        ("grit_adam", "kfac", {}, everything),
        ("grit_adam_preconditioned", "diagonal", {}, everything),
    ],
)
def test_where_nothing_is_done_it_is_adamw(kind, estimate, settings, weights_of):
    net = Net(fisher_approximation=estimate, **OFF) if estimate else Net()
    options = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.8, 0.99)}
    weights_of = weights_of or (lambda net: net.lora)
    optimizer = optimizer_of(net, kind, weights_of(net), **settings, **options)
    assert_equal(net, optimizer, partial(torch.optim.AdamW, **options), weights_of)


def test_switched_off_it_is_sgd():
    net, options = Net(**OFF), {"lr": 0.1, "weight_decay": 0.01}
    optimizer = optimizer_of(net, "grit_sgd", **options)
    assert_equal(net, optimizer, partial(torch.optim.SGD, momentum=0.9, **options))


def test_moments_turn_with_the_eigenvectors():
    """m is the same vector before and after, v keeps its sum, and gradients come back from their coordinates."""
    net = Net(fisher_approximation="kfac")
    layer = net.first
    moments = EigenMoments(layer)
    for moment in (*moments.m.values(), *moments.v.values()):
        moment.copy_(torch.rand_like(moment))
    before = {side: (m.clone(), moments.v[side].sum()) for side, m in moments.m.items()}
    for seed in range(3):
        net.backward(seed)
        layer.update_fisher_and_projection()
        moments.follow(layer.fisher_matrix)
        for side, (m, total) in before.items():
            vectors = moments.vectors[side]
            back = turn_back(vectors, side, moments.m[side])
            torch.testing.assert_close(back if side == "A" else back.mT, m)
            torch.testing.assert_close(moments.v[side].sum(), total)
            assert not torch.allclose(moments.m[side], m)
            gradient = torch.randn_like(layer.lora_A if side == "A" else layer.lora_B)
            coordinates = turn(vectors, side, gradient)
            torch.testing.assert_close(turn_back(vectors, side, coordinates), gradient)


def test_grit_sgd_steps_by_the_natural_gradient():
    net = Net(fisher_approximation="kfac", fisher_damping=0.05, fisher_update_freq=1)
    optimizer = optimizer_of(net, "grit_sgd", optimizer=torch.optim.SGD(net.lora, lr=0.03))
    for step in range(3):
        net.zero_grad()
        net.backward(step)
        raw = {name: {side: g.clone() for side, g in layer.gradients().items()} for name, layer in net.layers.items()}
        for name, changes in changes_of(net, optimizer, step).items():
            for side, natural in net.layers[name].fisher_matrix.natural_gradient(raw[name]).items():
                torch.testing.assert_close(changes[side], -0.03 * natural)


@pytest.mark.parametrize("kind", ["grit_adam", "grit_sgd"])
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_projected_updates_lie_in_the_span(kind, estimate):
    net = Net(fisher_approximation=estimate, enable_projection=True, enable_natural_gradient=kind != "grit_adam")
    more = {"optimizer": torch.optim.SGD(net.lora, lr=0.01)} if kind == "grit_sgd" else {"lr": 0.01}
    optimizer = optimizer_of(net, kind, **more)
    optimizer.manager.capture.loss_divisor = 16.0  # the loss is a mean of 16 items
    for step in range(7):
        changes = changes_of(net, optimizer, step)
        budgets = [layer.projection_budget for layer in net.layers.values()]
        assert sum(budgets) == 4 and min(budgets) >= 1
        for name, layer in net.layers.items():
            projected = layer.fisher_matrix.project(changes[name], layer.projection_budget)
            for side in "AB":
                torch.testing.assert_close(projected[side], changes[name][side], rtol=1e-8, atol=1e-12)
            if estimate == "diagonal":
                assert sum(int(c.count_nonzero()) for c in changes[name].values()) <= layer.projection_budget
        assert any(bool(c.any()) for layer in changes.values() for c in layer.values())


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_grafting_keeps_adams_length(estimate):
    """Tensor by tensor; from the same moments, steps weighted along directions and steps that are not."""
    found = {}
    for power, grafting in ((0.0, None), (1.0, None), (1.0, False)):
        net = Net(fisher_approximation=estimate)
        changes = changes_of(net, optimizer_of(net, "grit_adam", lr=0.01, eigen_power=power, grafting=grafting), 0)
        found[power, grafting] = [change for layer in changes.values() for change in layer.values()]
    for plain, grafted, free in zip(*found.values(), strict=True):
        torch.testing.assert_close(grafted.norm(), plain.norm())
        assert not torch.allclose(grafted, plain)
        assert abs(float(free.norm() / plain.norm()) - 1) > 0.05
        torch.testing.assert_close(free / free.norm(), grafted / grafted.norm())


def test_a_step_with_nan_changes_nothing_nor_spoils_the_next_one():
    net, clean = Net(fisher_update_freq=1), Net(fisher_update_freq=1)
    optimizer, reference = optimizer_of(net, lr=0.01), optimizer_of(clean, lr=0.01)
    train(net, optimizer, 2)
    train(clean, reference, 2)
    optimizer.zero_grad()
    net.backward(2, scale=math.nan)
    optimizer.step()
    assert net.first.manager.skipped == 1
    train(net, optimizer, 1, 3)
    train(clean, reference, 1, 3)
    assert net.first.fisher_matrix.samples == clean.first.fisher_matrix.samples
    for own, theirs in zip(net.lora, clean.lora, strict=True):
        assert torch.equal(own, theirs)


@pytest.mark.parametrize("kind", sorted(MODES))
def test_a_saved_state_goes_on_to_the_same_bits(kind):
    """Through a file that torch reads with weights_only=True; projection with a schedule."""

    def made(state=None):
        net = Net(enable_projection=True, projection_budget_end=30)
        optimizer = optimizer_of(net, kind, lr=0.01, total_steps=40)
        if state:
            net.load_state_dict(state["net"])
            optimizer.load_state_dict(state["optimizer"])
        return net, optimizer

    straight, whole = made()
    train(straight, whole, 13)
    broken, first = made()
    train(broken, first, 7)
    file = io.BytesIO()
    torch.save({"net": broken.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    again, second = made(torch.load(file, weights_only=True))
    train(again, second, 6, 7)
    for one, two in zip(straight.lora, again.lora, strict=True):
        assert torch.equal(one, two)
    assert straight.first.projection_budget == again.first.projection_budget
    assert straight.first.manager.curvature.schedules["all"].budget(straight.first.manager.step) > 2


def test_mistakes(monkeypatch):
    net = Net()
    train(net, optimizer_of(net), 1)  # from here on its layers are one manager's
    adamw = torch.optim.AdamW(net.lora)
    first = {"first": net.first}
    for attempt, message in (
        (lambda: optimizer_of(net, "grid_adam"), "did you mean 'grit_adam'"),
        (lambda: create_grit_optimizer(net.lora, "grit_adam"), "at least one GRIT-LoRA layer"),
        (lambda: create_grit_optimizer(net.lora, "grit_adam", first), r"all layers .* missing: \['second'\]"),
        (lambda: optimizer_of(net, "grit_adam", net.lora[:2]), "one without those of"),
        (lambda: optimizer_of(net, "grit_sgd", optimizer=adamw), "expected torch.optim.SGD, got AdamW"),
        (lambda: optimizer_of(net).load_state_dict(adamw.state_dict()), "an optimizer state with key 'grit'"),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    # Each rank has estimates of its own tokens; nobody averages them yet.
    monkeypatch.setattr("grit_vlm.core.fisher_curvature.world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="expected one process, got 2"):
        optimizer_of(Net())
