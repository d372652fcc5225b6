"""Estimates against the exact Fisher matrix of a small LoRA pair; projections are projections."""

import pytest
import torch

from grit_vlm import GritVlmError
from grit_vlm.core.fisher_info import FisherInformationMatrix, compute_natural_gradient

TOKENS, D_IN, D_OUT, RANK = 40, 5, 7, 3
ESTIMATES = ("diagonal", "kfac", "block_diagonal")


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
    found = FisherInformationMatrix(**settings)
    found.observe(x, h, delta, e)
    return found


def gradients(pair):
    a, b, x, targets = pair
    g = torch.autograd.grad(losses(a, b, x, targets).mean(), (a, b))
    return dict(zip("AB", g, strict=True))


def test_the_diagonal_is_that_of_the_exact_matrix(pair):
    found, truth = observed(pair), exact(*pair)
    whole = torch.cat([truth["A"].diagonal(), truth["B"].diagonal()])
    torch.testing.assert_close(found.fisher_diagonal, whole)
    assert found.fisher_blocks == found.kfac_factors == {}


@pytest.mark.parametrize("size", [1, 3, 4, 128])
def test_blocks_are_those_of_the_exact_matrix(pair, size):
    found, truth = observed(pair, approximation_type="block_diagonal", block_size=size), exact(*pair)
    for name, of_component, width in (("A", lambda i: i // D_IN, D_IN), ("B", lambda i: i % RANK, D_OUT)):
        n = truth[name].shape[0]
        place = (lambda i: i % D_IN) if name == "A" else (lambda i: i // RANK)
        block = [(of_component(i), place(i) // min(size, width)) for i in range(n)]
        same = torch.tensor([[p == q for q in block] for p in block])
        torch.testing.assert_close(found.dense(name), torch.where(same, truth[name], 0.0))


def test_kfac_is_exact_where_its_assumptions_hold():
    """Inputs of A white and independent of δ: E[(δxᵀ)(δxᵀ)ᵀ] = Σ_g ⊗ I, up to the sampling of 200,000 tokens.

    The estimate itself is that product of the tokens' own moments, whatever they are.
    """
    torch.manual_seed(0)
    n = 200_000
    x = torch.randn(n, 3, dtype=torch.float64)
    delta = torch.randn(n, 2, dtype=torch.float64) @ torch.tensor([[2.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
    h, e = torch.randn(n, 2, dtype=torch.float64) * torch.tensor([1.0, 3.0]), torch.randn(n, 4, dtype=torch.float64)
    found = FisherInformationMatrix("kfac")
    found.observe(x, h, delta, e)
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(found.dense("A"), torch.kron(delta.mT @ delta / n, x.square().mean() * eye[:3, :3]))
    torch.testing.assert_close(found.dense("B"), torch.kron(e.square().mean() * eye, h.mT @ h / n))
    for name, g in (("A", torch.einsum("tr,td->trd", delta, x)), ("B", torch.einsum("to,tr->tor", e, h))):
        flat = g.reshape(n, -1)
        truth = flat.mT @ flat / n
        assert float((found.dense(name) - truth).abs().max()) < 0.03 * float(truth.diagonal().max())


def assert_solved(found, raw):
    """(F + λI) times the natural gradient is the gradient again, with a dense F and a damping of 0.1."""
    natural = found.natural_gradient(raw)
    lam = 0.1 * float(torch.cat([found.dense(name).diagonal() for name in "AB"]).mean())
    for name in "AB":
        matrix = found.dense(name)
        back = (matrix + lam * torch.eye(len(matrix), dtype=matrix.dtype)) @ natural[name].reshape(-1)
        torch.testing.assert_close(back, raw[name].reshape(-1))
        assert natural[name].shape == raw[name].shape


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_the_natural_gradient_solves_the_damped_system(pair, estimate):
    assert_solved(observed(pair, approximation_type=estimate, damping=0.1, block_size=3), gradients(pair))


@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("budget", [1, 5, 96])
def test_projections_are_projections(pair, estimate, budget):
    """P² = P = Pᵀ, of the rank that the budget says, and the best one: it keeps the largest part of tr F."""
    found = observed(pair, approximation_type=estimate, block_size=3)
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
    whole = torch.block_diag(found.dense("A"), found.dense("B"))
    kept = float((p @ whole).trace())
    if estimate == "kfac":
        values = [torch.linalg.eigvalsh(found.dense(n)).flip(0) for n in "AB"]
        best = float(values[0][: k * D_IN].sum() + values[1][: k * D_OUT].sum())
    else:
        best = float(torch.linalg.eigvalsh(whole).flip(0)[:rank].sum())
    assert kept == pytest.approx(best)
    columns = found.directions(budget)
    if estimate != "kfac":  # whose directions are the factors'
        torch.testing.assert_close(torch.block_diag(*(q @ q.mT for q in columns.values())), p)
    for q in columns.values():
        torch.testing.assert_close(q.mT @ q, torch.eye(q.shape[1], dtype=q.dtype))


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_averages_forget_as_told_and_start_unbiased(pair, estimate):
    first = observed(pair, approximation_type=estimate, ema_decay=0.9)
    fresh = observed(pair, approximation_type=estimate, ema_decay=0.0)
    torch.testing.assert_close(first.dense("A"), fresh.dense("A"))  # the zeros of the start do not count
    other = [t * 2 for t in (torch.randn(4, D_IN), torch.randn(4, RANK), torch.randn(4, RANK), torch.randn(4, D_OUT))]
    alone = FisherInformationMatrix(estimate, ema_decay=0.0)
    alone.observe(*(t.double() for t in other))
    first.observe(*(t.double() for t in other))
    # What is averaged: the factors of kfac, else the matrices themselves.
    mixed, old, new = (f.kfac_factors or {name: f.dense(name) for name in "AB"} for f in (first, fresh, alone))
    for name in mixed:
        torch.testing.assert_close(mixed[name], (0.9 * old[name] + new[name]) / 1.9)
    before = first.dense("B")
    first.observe(*(t.double() * float("nan") for t in other))
    torch.testing.assert_close(first.dense("B"), before)


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


def test_blocks_of_fewer_tokens_than_coordinates(pair):
    """Eigenvalues of zero are there then, real ones beside those that fill up the last run; rounding mixes them up."""
    for tokens, size in ((1, 3), (2, 4), (6, 4)) * 5:
        few = (*pair[:2], torch.randn(tokens, D_IN, dtype=torch.float64), torch.randint(D_OUT, (tokens,)))
        found = observed(few, approximation_type="block_diagonal", damping=0.1, block_size=size)
        raw = {n: torch.randn_like(g) for n, g in gradients(few).items()}
        assert_solved(found, raw)
        n = sum(g.numel() for g in raw.values())
        assert found.direction_values().shape == (n,)
        everything = found.project(raw, n)
        for name in "AB":
            assert found.eigen(name).real.sum() == raw[name].numel()
            torch.testing.assert_close(everything[name], raw[name])


def test_steps_are_weighted_as_in_grit(pair):
    """(λ_i/mean λ + damping)^(−p/2), the mean over real directions only."""
    for estimate in ESTIMATES:
        found = observed(pair, approximation_type=estimate, block_size=4, damping=0.01)
        for name in "AB":
            eigen = found.eigen(name)
            real = eigen.real
            mean = eigen.values[real > 0].mean()
            for power in (0.0, 0.5, 1.0):
                truth = (eigen.values / mean + 0.01) ** (-power / 2)
                torch.testing.assert_close(found.step_weights(name, power)[real > 0], truth[real > 0])


def test_a_dense_system_is_solved():
    root = torch.randn(6, 6, dtype=torch.float64)
    fisher, g = root @ root.mT, torch.randn(2, 3, dtype=torch.float64)
    natural = compute_natural_gradient(g, fisher, damping=0.5)
    torch.testing.assert_close((fisher + 0.5 * torch.eye(6)) @ natural.reshape(-1), g.reshape(-1))


def test_every_mistake_is_named(pair):
    with pytest.raises(GritVlmError) as caught:
        FisherInformationMatrix("kfak", damping=-1, ema_decay=1.0, update_freq=0, block_size=True)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "approximation_type", "damping", "ema_decay", "update_freq", "block_size"]  # fmt: skip
    state = observed(pair, approximation_type="block_diagonal", block_size=4).state_dict()
    for attempt, message in (
        (lambda: FisherInformationMatrix("kfac").load_state_dict(state), "estimate kfac, got one of block_diagonal"),
        (lambda: FisherInformationMatrix("block_diagonal").load_state_dict(state), "blocks of 64, got one of 4"),
        (lambda: compute_natural_gradient(torch.ones(2), torch.zeros(2, 2), damping=0.0), "raise damping"),
        (lambda: compute_natural_gradient(torch.ones(2), torch.ones(1, 2)), r"expected shape \(2, 2\)"),
    ):
        with pytest.raises(GritVlmError, match=message):
            attempt()
