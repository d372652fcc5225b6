"""Estimates against the exact Fisher matrix of a small LoRA pair; projections are projections."""

import pytest
import torch

from grit_vlm import GritVlmError
from grit_vlm.core.fisher_info import FisherInformationMatrix, compute_natural_gradient

TOKENS, D_IN, D_OUT, RANK = 40, 5, 7, 3
ESTIMATES = ("diagonal", "kfac")


@pytest.fixture
def pair():
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    a, b = make(RANK, D_IN).requires_grad_(), make(D_OUT, RANK).requires_grad_()
    return a, b, make(TOKENS, D_IN) * torch.linspace(0.3, 2, D_IN), torch.randint(D_OUT, (TOKENS,))


def losses(a, b, x, targets):
    return torch.nn.functional.cross_entropy(x @ a.mT @ b.mT, targets, reduction="none")


def exact(a, b, x, targets):
    """E[g gᵀ] of A and of B over the tokens, by one backward pass each."""
    tokens = [torch.autograd.grad(loss, (a, b), retain_graph=True) for loss in losses(a, b, x, targets)]
    flat = {name: torch.stack([g[i].flatten() for g in tokens]) for i, name in enumerate("AB")}
    return {name: g.mT @ g / len(x) for name, g in flat.items()}


def observed(pair, **settings):
    a, b, x, targets = pair
    h = x @ a.mT
    y = h @ b.mT
    loss = torch.nn.functional.cross_entropy(y, targets, reduction="sum")
    delta, e = torch.autograd.grad(loss, (h, y))
    estimate = FisherInformationMatrix(**settings)
    estimate.observe(x, h, delta, e)
    return estimate


def dense(estimate, name):
    """The whole matrix that the estimate of A or B stands for, coordinates row by row."""
    size = {"A": D_IN, "B": D_OUT}[name]
    if estimate.approximation_type == "diagonal":
        split = RANK * D_IN
        return torch.diag(estimate.fisher_diagonal[:split] if name == "A" else estimate.fisher_diagonal[split:])
    eigen, eye = estimate.eigen(name), torch.eye(size, dtype=torch.float64)
    factor = eigen.vectors @ torch.diag(eigen.values[:, 0]) @ eigen.vectors.mT
    return torch.kron(factor, eye) if name == "A" else torch.kron(eye, factor)


def gradients(pair):
    a, b, x, targets = pair
    g = torch.autograd.grad(losses(a, b, x, targets).mean(), (a, b))
    return dict(zip("AB", g, strict=True))


def test_the_diagonal_is_that_of_the_exact_matrix(pair):
    found, truth = observed(pair), exact(*pair)
    whole = torch.cat([truth["A"].diagonal(), truth["B"].diagonal()])
    torch.testing.assert_close(found.fisher_diagonal, whole)
    assert found.kfac_factors == {}


def test_kfac_is_exact_where_its_assumptions_hold():
    """Inputs of A white and independent of δ: E[(δxᵀ)(δxᵀ)ᵀ] = Σ_g ⊗ I, up to the sampling of 200,000 tokens.

    The estimate itself is that product of the tokens' own moments, whatever they are.
    """
    torch.manual_seed(0)
    n = 200_000
    mix = torch.tensor([[2.0, 0.3, 0.0], [0.3, 0.5, 0.0], [0.0, 0.1, 1.0]], dtype=torch.float64)
    x, delta, h, e = (torch.randn(n, size, dtype=torch.float64) for size in (D_IN, RANK, RANK, D_OUT))
    delta, h = delta @ mix, h * torch.tensor([1.0, 3.0, 2.0])
    found = FisherInformationMatrix("kfac")
    found.observe(x, h, delta, e)
    a, b = (torch.eye(size, dtype=torch.float64) for size in (D_IN, D_OUT))
    torch.testing.assert_close(dense(found, "A"), torch.kron(delta.mT @ delta / n, x.square().mean() * a))
    torch.testing.assert_close(dense(found, "B"), torch.kron(e.square().mean() * b, h.mT @ h / n))
    for name, g in (("A", torch.einsum("tr,td->trd", delta, x)), ("B", torch.einsum("to,tr->tor", e, h))):
        flat = g.reshape(n, -1)
        truth = flat.mT @ flat / n
        assert float((dense(found, name) - truth).abs().max()) < 0.03 * float(truth.diagonal().max())


def assert_solved(found, raw):
    """(F + λI) times the natural gradient is the gradient again, with a dense F and a damping of 0.1."""
    natural = found.natural_gradient(raw)
    lam = 0.1 * float(torch.cat([dense(found, name).diagonal() for name in "AB"]).mean())
    for name in "AB":
        matrix = dense(found, name)
        back = (matrix + lam * torch.eye(len(matrix), dtype=matrix.dtype)) @ natural[name].reshape(-1)
        torch.testing.assert_close(back, raw[name].reshape(-1))
        assert natural[name].shape == raw[name].shape


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_the_natural_gradient_solves_the_damped_system(pair, estimate):
    assert_solved(observed(pair, approximation_type=estimate, damping=0.1), gradients(pair))


@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("budget", [1, 5, 96])
def test_projections_are_projections(pair, estimate, budget):
    """P² = P = Pᵀ, of the rank that the budget says, and the best one: it keeps the largest part of tr F."""
    found = observed(pair, approximation_type=estimate)
    split = RANK * D_IN
    columns = []
    for unit in torch.eye(split + D_OUT * RANK, dtype=torch.float64):
        sides = {"A": unit[:split].reshape(RANK, D_IN), "B": unit[split:].reshape(D_OUT, RANK)}
        columns.append(torch.cat([g.reshape(-1) for g in found.project(sides, budget).values()]))
    p = torch.stack(columns, 1)
    torch.testing.assert_close(p @ p, p)
    torch.testing.assert_close(p, p.mT)
    k = min(budget, RANK)
    rank = k * D_IN + k * D_OUT if estimate == "kfac" else min(budget, len(p))
    assert float(p.trace()) == pytest.approx(rank)
    whole = torch.block_diag(dense(found, "A"), dense(found, "B"))
    kept = float((p @ whole).trace())
    if estimate == "kfac":
        values = [torch.linalg.eigvalsh(dense(found, n)).flip(0) for n in "AB"]
        best = float(values[0][: k * D_IN].sum() + values[1][: k * D_OUT].sum())
    else:
        best = float(torch.linalg.eigvalsh(whole).flip(0)[:rank].sum())
    assert kept == pytest.approx(best)


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_averages_forget_as_told_and_start_unbiased(pair, estimate):
    first = observed(pair, approximation_type=estimate, ema_decay=0.9)
    fresh = observed(pair, approximation_type=estimate, ema_decay=0.0)
    torch.testing.assert_close(dense(first, "A"), dense(fresh, "A"))  # the zeros of the start do not count
    other = [t * 2 for t in (torch.randn(4, D_IN), torch.randn(4, RANK), torch.randn(4, RANK), torch.randn(4, D_OUT))]
    alone = FisherInformationMatrix(estimate, ema_decay=0.0)
    alone.observe(*(t.double() for t in other))
    first.observe(*(t.double() for t in other))
    # What is averaged: the factors of kfac, else the matrices themselves.
    mixed, old, new = (f.kfac_factors or {name: dense(f, name) for name in "AB"} for f in (first, fresh, alone))
    for name in mixed:
        torch.testing.assert_close(mixed[name], (0.9 * old[name] + new[name]) / 1.9)
    before = dense(first, "B")
    first.observe(*(t.double() * float("nan") for t in other))
    torch.testing.assert_close(dense(first, "B"), before)


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_where_nothing_is_known_gradients_stay(estimate):
    """B starts at zero: no gradient reaches A, and its Fisher information is zero."""
    found = FisherInformationMatrix(estimate)
    raw = {"A": torch.randn(RANK, D_IN), "B": torch.randn(D_OUT, RANK)}
    with pytest.raises(GritVlmError, match="expected an observation first"):
        found.natural_gradient(raw)
    found.observe(torch.randn(9, D_IN), torch.randn(9, RANK), torch.zeros(9, RANK), torch.randn(9, D_OUT))
    natural = found.natural_gradient(raw)
    assert torch.equal(natural["A"], raw["A"]) and not torch.allclose(natural["B"], raw["B"])


def test_steps_are_weighted_as_in_grit(pair):
    """(λ_i/mean λ + damping)^(−p/2)."""
    for estimate in ESTIMATES:
        found = observed(pair, approximation_type=estimate, damping=0.01)
        for name in "AB":
            values = found.eigen(name).values
            for power in (0.0, 0.5, 1.0):
                truth = (values / values.mean() + 0.01) ** (-power / 2)
                torch.testing.assert_close(found.step_weights(name, power), truth)


def test_a_dense_system_is_solved():
    root = torch.randn(6, 6, dtype=torch.float64)
    fisher, g = root @ root.mT, torch.randn(2, 3, dtype=torch.float64)
    natural = compute_natural_gradient(g, fisher, damping=0.5)
    torch.testing.assert_close((fisher + 0.5 * torch.eye(6)) @ natural.reshape(-1), g.reshape(-1))


def test_every_mistake_is_named(pair):
    with pytest.raises(GritVlmError) as caught:
        FisherInformationMatrix("kfak", damping=-1, ema_decay=1.0, update_freq=0)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "approximation_type", "damping", "ema_decay", "update_freq"]  # fmt: skip
    state = observed(pair).state_dict()
    for attempt, message in (
        (lambda: FisherInformationMatrix("kfac").load_state_dict(state), "estimate kfac, got one of diagonal"),
        (lambda: compute_natural_gradient(torch.ones(2), torch.zeros(2, 2), damping=0.0), "raise damping"),
        (lambda: compute_natural_gradient(torch.ones(2), torch.ones(1, 2)), r"expected shape \(2, 2\)"),
    ):
        with pytest.raises(GritVlmError, match=message):
            attempt()
