"""What every step of the optimizers promises: solves, spans, lengths, trust regions."""

import pytest
import torch
from small_net import Net, changes_of, optimizer_of, train

ESTIMATES = ("diagonal", "kfac", "block_diagonal")
PROJECTED = {"enable_natural_gradient": False, "enable_projection": True}


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_grit_sgd_is_a_dense_solve(estimate):
    """θ − η (F + λI)⁻¹ ∇, with dense matrices."""
    net = Net(fisher_approximation=estimate, fisher_damping=0.05, fisher_update_freq=1)
    optimizer = optimizer_of(net, "grit_sgd", optimizer=torch.optim.SGD(net.lora, lr=0.03))
    for step in range(3):
        before = [p.detach().clone() for p in net.lora]
        optimizer.zero_grad()
        net.backward(step)
        raw = [p.grad.clone() for p in net.lora]
        optimizer.step()
        for i, (p, old, g) in enumerate(zip(net.lora, before, raw, strict=True)):
            fisher = (net.first, net.first, net.second, net.second)[i].fisher_matrix
            dense = {side: fisher.dense(side) for side in "AB"}
            own = dense["AB"[i % 2]]
            of = torch.block_diag(*dense.values())
            damped = own + 0.05 * of.diagonal().mean() * torch.eye(len(own), dtype=own.dtype)
            change = -0.03 * torch.linalg.solve(damped, g.reshape(-1)).reshape(g.shape)
            torch.testing.assert_close(p.detach() - old, change, msg=f"step {step}, tensor {i}")


@pytest.mark.parametrize("kind", ["grit_adam", "adaptive_adam", "grit_sgd"])
@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("natural", [True, False])
def test_projected_updates_lie_in_the_span(kind, estimate, natural):
    """Every step changes the weights along kept directions alone, and no more than the budget says."""
    net = Net(fisher_approximation=estimate, enable_projection=True, enable_natural_gradient=natural)
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
            if estimate == "kfac":
                assert torch.linalg.matrix_rank(changes[name]["A"], rtol=1e-8) <= layer.projection_budget
            elif estimate == "diagonal":
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


def quadratic(layer, change):
    parts = [change[side].reshape(-1) @ layer.fisher_matrix.dense(side) @ change[side].reshape(-1) for side in "AB"]
    return float(sum(parts))


@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("kind", ["adaptive_sgd", "adaptive_adam"])
@pytest.mark.parametrize("switches", [{}, {"enable_projection": True}, PROJECTED])
def test_adaptive_steps_stay_in_the_trust_region(kind, estimate, switches):
    """ΔθᵀFΔθ ≤ κ over all layers together, with dense F; the limit is reached."""

    def run(kappa):
        net = Net(fisher_approximation=estimate, fisher_damping=1e-3, **switches)
        more = {"optimizer": torch.optim.SGD(net.lora, lr=0.1)} if kind == "adaptive_sgd" else {"lr": 0.1}
        optimizer = optimizer_of(net, kind, kl_clip=kappa, **more)
        lengths, factors = [], []
        for step in range(8):
            changes = changes_of(net, optimizer, step)
            lengths.append(sum(quadratic(layer, changes[name]) for name, layer in net.layers.items()))
            factors.append(net.first.manager.last_metrics["grit/trust_region_factor"])
        return lengths, factors

    free, untouched = run(1e9)
    assert set(untouched) == {1.0}
    kappa = 0.1 * max(free)
    lengths, factors = run(kappa)
    assert max(lengths) <= kappa * (1 + 1e-9)
    assert min(factors) < 1
    assert max(lengths) > 0.5 * kappa  # not shortened more than need be


def test_short_steps_are_left_as_they_are():
    changes = []
    for kind in ("grit_adam", "adaptive_adam"):
        net = Net(fisher_approximation="kfac")
        train(net, optimizer_of(net, kind, lr=1e-4, kl_clip=1.0), 5)
        changes.append(net.lora)
    for one, two in zip(*changes, strict=True):
        assert torch.equal(one, two)
