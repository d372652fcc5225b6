"""Reprojection: the arithmetic of one layer, and what happens to a whole model's weights, statistics and moments.

In the models here every layer has inputs of its own and the loss is linear in its outputs, Σ ⟨C, y⟩. So h = A x and
δ = s·Bᵀ c are known without GRIT, and stay known after A and B have changed.
"""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies
from peft import LoraConfig, get_peft_model
from torch import nn

from grit import GRITConfig, GRITManager, GritOptimizer
from grit.rank_events import plan
from grit.reprojection import balance, choose_rank, relative_change, top_projector

seeds = strategies.integers(0, 2**32 - 1)
examples = settings(max_examples=60, deadline=None, derandomize=True)


def random(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def covariance(seed, r, rank=None, spread=2.0):
    """Σ [r, r] of that rank, with eigenvalues over `spread` powers of ten."""
    basis = torch.linalg.qr(random(seed, r, r))[0][:, : rank or r]
    return basis @ torch.diag(torch.logspace(0, -spread, rank or r, dtype=torch.float64)) @ basis.mT


def change_of_basis(seed, r, condition):
    """S [r, r] with singular values from 1/√c to √c."""
    u, v = (torch.linalg.qr(random(seed + i, r, r))[0] for i in (0, 1))
    return u @ torch.diag(torch.logspace(-0.5, 0.5, r, base=condition, dtype=torch.float64)) @ v


def largest(difference, scale=1.0):
    return float(difference.abs().max() / scale)


# One layer


@pytest.mark.parametrize(("rank_a", "rank_g"), [(6, 6), (3, 6), (6, 2), (4, 3), (1, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_balanced_basis_makes_both_covariances_the_same_diagonal(rank_a, rank_g, seed):
    cov_a, cov_g = covariance(seed, 6, rank_a), covariance(seed + 100, 6, rank_g)
    left, right, spectrum = balance(cov_a, cov_g)
    q = min(rank_a, rank_g)
    assert left.shape == (q, 6) and right.shape == (6, q) and left.dtype == torch.float64
    sigma = torch.diag(spectrum[:q].sqrt())
    assert largest(left @ right - torch.eye(q, dtype=torch.float64)) < 1e-10
    assert largest(left @ cov_a @ left.mT - sigma, sigma.max()) < 1e-10
    assert largest(right.mT @ cov_g @ right - sigma, sigma.max()) < 1e-10
    eigenvalues = np.sort(np.linalg.eigvals((cov_a @ cov_g).numpy()).real)[::-1]
    np.testing.assert_allclose(spectrum, eigenvalues, atol=1e-12 * eigenvalues[0])


@pytest.mark.parametrize("scales", [(1e-12, 1e-9), (1e8, 1e-10)])
def test_balancing_does_not_depend_on_units(scales):
    """Σ_g of a mean loss is 1e-10; a scalar on either side must not count."""
    cov_a, cov_g = covariance(1, 5), covariance(2, 5)
    left, right, spectrum = balance(cov_a, cov_g)
    other_left, other_right, other = balance(scales[0] * cov_a, scales[1] * cov_g)
    assert largest(other / (scales[0] * scales[1]) - spectrum, spectrum[0]) < 1e-12
    for k in range(1, 6):
        assert largest(other_right[:, :k] @ other_left[:k] - right[:, :k] @ left[:k]) < 1e-10


def test_covariances_whose_product_is_zero_have_no_balanced_direction():
    cov_a, cov_g = torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0])), torch.diag(torch.tensor([0.0, 0.0, 1.0, 3.0]))
    left, right, spectrum = balance(cov_a, cov_g)
    assert left.shape == (0, 4) and right.shape == (4, 0) and float(spectrum.sum()) == 0


@given(
    seed=seeds,
    r=strategies.integers(2, 8),
    condition=strategies.floats(1, 100),
    tau=strategies.floats(0.5, 1.0),
)
@examples
def test_balanced_truncation_does_not_know_the_basis(seed, r, condition, tau):
    """A → S A, B → B S⁻¹ leave ΔW as it is, and so k and the truncated product."""
    cov_a, cov_g, a, b = covariance(seed, r), covariance(seed + 7, r), random(seed + 1, r, 9), random(seed + 2, 7, r)
    change = change_of_basis(seed + 3, r, condition)
    back = torch.linalg.inv(change)
    left, right, spectrum = balance(cov_a, cov_g)
    other_left, other_right, other = balance(change @ cov_a @ change.mT, back.mT @ cov_g @ back)
    share = torch.cumsum(spectrum, 0) / spectrum.sum()
    assume(bool(((share - tau).abs() > 1e-9).all()) or tau == 1.0)
    k = choose_rank(spectrum, tau, 1)
    assert choose_rank(other, tau, 1) == k
    for kept in {k, 1, max(1, r // 2)}:
        product = b @ right[:, :kept] @ left[:kept] @ a
        there = b @ back @ other_right[:, :kept] @ other_left[:kept] @ change @ a
        assert largest(there - product, product.abs().max()) < 1e-8


def test_in_paper_mode_the_rank_and_the_product_depend_on_the_basis():
    cov_a, cov_g, a, b = covariance(0, 4), covariance(1, 4), random(2, 4, 9), random(3, 7, 4)
    change = change_of_basis(4, 4, 100.0)
    back = torch.linalg.inv(change)
    seen = []
    for s, t in ((torch.eye(4, dtype=torch.float64),) * 2, (change, back)):
        projector_a, values_a = top_projector(s @ cov_a @ s.mT, 2)
        projector_g, values_g = top_projector(t.mT @ cov_g @ t, 2)
        seen.append(
            (choose_rank(values_a, 0.99, 1), choose_rank(values_g, 0.99, 1), b @ t @ projector_g @ projector_a @ s @ a)
        )
    assert seen[0][:2] == (3, 3) and seen[1][:2] != (3, 3)
    assert float((seen[1][2] - seen[0][2]).norm() / seen[0][2].norm()) > 0.5


@pytest.mark.parametrize(
    ("values", "tau", "least", "expected"),
    [
        ([4.0, 3.0, 2.0, 1.0], 0.4, 1, 1),  # reached exactly
        ([4.0, 3.0, 2.0, 1.0], 0.41, 1, 2),
        ([4.0, 3.0, 2.0, 1.0], 1.0, 1, 4),
        ([4.0, 3.0, 0.0, 0.0], 1.0, 1, 2),  # zeros hold nothing, even at τ = 1
        ([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], 1.0, 1, 10),  # the sum is 0.9999999999999999
        ([5.0, 0.0, 0.0, 0.0], 0.99, 1, 1),
        ([5.0, 0.0, 0.0, 0.0], 0.99, 3, 3),
        ([5.0, 0.0], 0.99, 9, 2),  # never above r
        ([5.0], 0.5, 1, 1),
        ([0.0, 0.0, 0.0], 0.5, 1, 3),  # no information: nothing is cut
        ([float("nan"), 1.0, 1.0], 0.5, 1, 3),
        ([float("inf"), 1.0, 1.0], 0.5, 1, 3),
        ([1.0, 0.5, -0.5], 1.0, 1, 2),  # a negative eigenvalue is rounding
        ([1e-20, 1e-24, 1e-24], 0.99, 1, 1),
    ],
)
def test_rank_of_given_eigenvalues(values, tau, least, expected):
    assert choose_rank(torch.tensor(values, dtype=torch.float64), tau, least) == expected
    assert choose_rank(torch.tensor(values, dtype=torch.float32), tau, least) == expected


def test_a_share_that_rounding_keeps_below_the_threshold_counts():
    assert 0.86 + 0.07 < 0.93
    assert choose_rank(torch.tensor([0.86, 0.07, 0.07], dtype=torch.float64), 0.93, 1) == 2


@given(
    values=strategies.lists(strategies.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=16),
    tau=strategies.floats(0.01, 1.0),
    least=strategies.integers(1, 16),
)
@examples
def test_rank_is_the_smallest_that_reaches_the_threshold(values, tau, least):
    ordered = sorted(values, reverse=True)
    r = len(ordered)
    k = choose_rank(torch.tensor(ordered, dtype=torch.float64), tau, least)
    total = sum(ordered)
    assert min(least, r) <= k <= r
    if total == 0:
        assert k == r
        return
    assert sum(ordered[:k]) / total >= tau - 1e-9
    if k > min(least, r):
        assert sum(ordered[: k - 1]) / total < tau + 1e-9
    assert choose_rank(torch.tensor(ordered, dtype=torch.float64) * 1e-9, tau, least) == k or total * 1e-9 < 1e-290
    assert choose_rank(torch.tensor(ordered, dtype=torch.float64), 1.0, least) >= k


@given(
    seed=seeds,
    d_in=strategies.integers(1, 12),
    d_out=strategies.integers(1, 12),
    r=strategies.integers(1, 6),
    k=strategies.integers(1, 6),
    size=strategies.sampled_from([1.0, 1e-3, 1e-7]),
)
@examples
def test_relative_change_is_that_of_the_whole_matrices(seed, d_in, d_out, r, k, size):
    a, b = random(seed, r, d_in), random(seed + 1, d_out, r)
    if k == r:  # a small step from where it was
        new_a, new_b = a + size * random(seed + 2, r, d_in), b + size * random(seed + 3, d_out, r)
    else:
        new_a, new_b = random(seed + 2, k, d_in), random(seed + 3, d_out, k)
    expected = float(torch.linalg.matrix_norm(new_b @ new_a - b @ a) / torch.linalg.matrix_norm(b @ a))
    assert relative_change(a, b, new_a, new_b) == pytest.approx(expected, rel=1e-6, abs=1e-14)
    assert relative_change(a, b, a, b) < 1e-14


def test_relative_change_from_and_to_nothing():
    a, b = random(0, 3, 5), random(1, 4, 3)
    zero = torch.zeros_like(b)
    assert relative_change(a, zero, a, zero) == 0.0
    assert relative_change(a, zero, a, b) == float("inf")
    assert relative_change(a, b, a, zero) == pytest.approx(1.0)
    change = random(2, 3, 3) + 2 * torch.eye(3, dtype=torch.float64)
    assert relative_change(a, b, change @ a, b @ torch.linalg.inv(change)) < 1e-13, "a change of basis changes nothing"


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("rank", [6, 3])
def test_top_projector_is_orthogonal_of_rank_k_and_keeps_the_most(k, rank):
    cov = covariance(k, 6, rank)
    projector, values = top_projector(cov, k)
    assert largest(projector @ projector - projector) < 1e-12 and largest(projector - projector.mT) < 1e-14
    assert float(projector.trace()) == pytest.approx(k)
    expected = np.sort(np.linalg.eigvalsh(cov.numpy()))[::-1]
    np.testing.assert_allclose(values, expected.clip(0), atol=1e-14)
    assert float((projector @ cov).trace()) == pytest.approx(expected[:k].sum())


# A whole model

R, TOKENS, ALPHA = 4, 32, 6.0
SHAPES = {"first": (7, 5), "second": (7, 5), "third": (6, 9)}  # d_in, d_out


class Parallel(nn.Module):
    """Layers side by side, one input each."""

    def __init__(self):
        super().__init__()
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Linear(*shape))

    def forward(self, inputs):
        return {name: getattr(self, name)(inputs[name]) for name in SHAPES}


def names(name):
    return f"base_model.model.{name}"


class Run:
    """A model with GRIT; statistics are those of the last batch at the weights as they are."""

    def __init__(self, optimizer="adamw", tokens=TOKENS, seed=0, bases=None, betas=(0.9, 0.999), log=None, **changes):
        torch.manual_seed(seed)
        config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(SHAPES))
        self.model = get_peft_model(Parallel().double(), config)
        values = {
            "mode": {"adamw": "adamw", "sgd": "sgd", "eigen": "eigen_adamw"}[optimizer],
            "capture": "hooks",
            "grit_cov_update_freq": 1,
            "kfac_update_freq": 1,
            "cov_decay": 0.0,
            "kfac_min_samples": 1,
            "min_lora_rank": 1,
            "reprojection_freq": 10**6,
            "reprojection_k": 2,
            "enable_rank_adaptation": False,
            "rank_shrink": "never",
            "kl_clip": 0.0,
        }
        self.manager = GRITManager(self.model, GRITConfig.from_dict({**values, **changes}), log_file=log)
        self.x = {n: random(seed + i, tokens, d_in) for i, (n, (d_in, _)) in enumerate(SHAPES.items())}
        self.c = {n: random(seed + 9 + i, tokens, d_out) for i, (n, (_, d_out)) in enumerate(SHAPES.items())}
        with torch.no_grad():
            for i, pair in enumerate(self.manager.pairs()):
                pair.a.copy_(random(seed + 20 + i, *pair.a.shape))
                pair.b.copy_(random(seed + 30 + i, *pair.b.shape))
                if bases is not None:
                    pair.a.copy_(bases[i] @ pair.a)
                    pair.b.copy_(pair.b @ torch.linalg.inv(bases[i]))
        weights = [p for p in self.model.parameters() if p.requires_grad]
        if optimizer == "sgd":
            self.inner = torch.optim.SGD(weights, lr=1e-2, momentum=0.9)
        else:
            self.inner = torch.optim.AdamW(weights, lr=1e-2, betas=betas, weight_decay=0.0)
        self.optimizer = GritOptimizer(self.inner, self.manager)

    def backward(self):
        """Gradients at the weights as they are."""
        self.optimizer.zero_grad()
        y = self.model(self.x)
        sum((self.c[name] * y[name]).sum() for name in SHAPES).backward()

    def train(self, steps=4):
        """Steps, and a last one with lr 0: moments and statistics belong to the weights then."""
        for rate in [1e-2] * steps + [0.0]:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.backward()
            self.optimizer.step()
        return self

    def pair(self, name):
        return next(p for p in self.manager.pairs() if p.name == names(name))

    def weights(self):
        return {n: (self.pair(n).a.detach().clone(), self.pair(n).b.detach().clone()) for n in SHAPES}

    def deltas(self):
        return {n: b @ a for n, (a, b) in self.weights().items()}

    def statistics(self):
        """Layer → (Σ_a, Σ_g) as GRIT has them."""
        found = {}
        for state, i, pair in self.manager.layers():
            found[pair.name.rpartition(".")[2]] = tuple(c[i].clone() for c in state.covariances())
        return found

    def statistics_by_hand(self):
        """The same from the data and the weights."""
        found = {}
        for name, (a, b) in self.weights().items():
            x, c, s = self.x[name], self.c[name], ALPHA / R
            if self.manager.config.capture == "gradients":
                grad_a, grad_b = s * (c @ b).mT @ x, s * c.mT @ (x @ a.mT)
                found[name] = (grad_b.mT @ grad_b, grad_a @ grad_a.mT)
            else:
                h, delta = x @ a.mT, s * c @ b
                found[name] = (h.mT @ h / len(x), delta.mT @ delta / len(x))
        return found

    def first_moments(self):
        """Layer → those of A and B in plain coordinates."""
        found = {}
        for state, i, pair in self.manager.layers():
            if "m_a" in state.t:
                found[pair.name] = (state["q_g"][i] @ state["m_a"][i], state["m_b"][i] @ state["q_a"][i].mT)
            else:
                key = "momentum_buffer" if self.manager.config.mode == "sgd" else "exp_avg"
                found[pair.name] = tuple(self.inner.state[p][key].clone() for p in (pair.a, pair.b))
        return {name.rpartition(".")[2]: value for name, value in found.items()}

    def second_moments(self):
        found = {}
        for state, i, pair in self.manager.layers():
            if "v_a" in state.t:
                found[pair.name] = (state["v_a"][i].clone(), state["v_b"][i].clone())
            else:
                found[pair.name] = tuple(self.inner.state[p]["exp_avg_sq"].clone() for p in (pair.a, pair.b))
        return {name.rpartition(".")[2]: value for name, value in found.items()}

    def planned(self, shrink):
        """Layer → (L, R)."""
        found = {}
        for state, i, pair in self.manager.layers():
            found[pair.name.rpartition(".")[2]] = plan(self.manager, state, i, shrink)[:2]
        return found

    def event(self):
        return [record for record in self.manager.history if record["kind"] == "reprojection"][-1]


def orthogonal(cov, k):
    """V Vᵀ of the k largest eigenvalues, by NumPy."""
    values, vectors = np.linalg.eigh(cov.numpy())
    top = vectors[:, np.argsort(values)[::-1][:k]]
    return torch.from_numpy(top @ top.T)


def oblique(cov_a, cov_g, k):
    """Projector onto the eigenvectors of Σ_a Σ_g with the k largest eigenvalues along the others, by NumPy."""
    values, vectors = np.linalg.eig((cov_a @ cov_g).numpy())
    order = np.argsort(values.real)[::-1][:k]
    return torch.from_numpy((vectors[:, order] @ np.linalg.inv(vectors)[order]).real)


MODES = {
    "one-sided": {"reprojection": "paper", "use_two_sided_reprojection": False},
    "two-sided": {"reprojection": "paper", "use_two_sided_reprojection": True},
    "balanced": {"reprojection": "balanced"},
}


def projectors(mode, cov_a, cov_g, k=2):
    """(L, R) as r×r matrices."""
    if mode == "balanced":
        return (oblique(cov_a, cov_g, k),) * 2
    return orthogonal(cov_a, k), orthogonal(cov_g if mode == "two-sided" else cov_a, k)


@pytest.mark.parametrize("capture", ["hooks", "gradients"])
@pytest.mark.parametrize("mode", MODES)
def test_weights_and_statistics_of_a_model_are_projected(mode, capture):
    run = Run("adamw", capture=capture, **MODES[mode]).train()
    before, by_hand = run.weights(), run.statistics_by_hand()
    for name, (cov_a, cov_g) in run.statistics().items():  # what the rest stands on
        assert largest(cov_a - by_hand[name][0], cov_a.abs().max()) < 1e-12
        assert largest(cov_g - by_hand[name][1], cov_g.abs().max()) < 1e-12
    run.manager.neural_reprojection(run.optimizer)
    for name, (a, b) in run.weights().items():
        left, right = projectors(mode, *by_hand[name])
        assert largest(a - left @ before[name][0], before[name][0].abs().max()) < 1e-10
        assert largest(b - before[name][1] @ right, before[name][1].abs().max()) < 1e-10
        assert int(torch.linalg.matrix_rank(b @ a)) == 2 and int(torch.linalg.matrix_rank(before[name][1])) == R
    # Σ_a ← L Σ_a Lᵀ and Σ_g ← Rᵀ Σ_g R are what the new weights would have given.
    again = run.statistics_by_hand()
    for name, (cov_a, cov_g) in run.statistics().items():
        assert largest(cov_a - again[name][0], again[name][0].abs().max()) < 1e-10
        assert largest(cov_g - again[name][1], again[name][1].abs().max()) < 1e-10
        assert largest(again[name][0] - by_hand[name][0], by_hand[name][0].abs().max()) > 1e-3, "nothing to re-base"


def test_two_sided_and_one_sided_differ():
    """Else the test above could not tell V_g from V_a."""
    run = Run(**MODES["two-sided"]).train()
    for cov_a, cov_g in run.statistics_by_hand().values():
        assert largest(orthogonal(cov_a, 2) - orthogonal(cov_g, 2)) > 0.1


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw, not grafted", "sgd", "eigen"])
def test_first_moments_go_along_with_the_basis(optimizer, mode, shrink):
    """Those of raw gradients (and of grafted ones, as long) as gradients do, those of natural ones as weights do."""
    natural = optimizer in ("sgd", "adamw, not grafted")
    changes = {"grafting": False} if "not grafted" in optimizer else {}
    run = Run(optimizer.partition(",")[0], **changes, **MODES[mode]).train()
    before, maps = run.first_moments(), run.planned(shrink)
    if not shrink:
        for name, covariances in run.statistics_by_hand().items():
            for planned, expected in zip(maps[name], projectors(mode, *covariances), strict=True):
                assert largest(planned - expected) < 1e-9
    run.manager.neural_reprojection(run.optimizer, shrink=shrink)
    for name, (m_a, m_b) in run.first_moments().items():
        left, right = maps[name]
        assert left.shape == ((2, R) if shrink else (R, R))
        assert m_a.shape == run.pair(name).a.shape and m_b.shape == run.pair(name).b.shape
        map_a, map_b = (left, right) if natural else (right.mT, left.mT)
        assert largest(m_a - map_a @ before[name][0], before[name][0].abs().max()) < 1e-10
        assert largest(m_b - before[name][1] @ map_b, before[name][1].abs().max()) < 1e-10
        assert float(before[name][0].abs().max()) > 0 and float(before[name][1].abs().max()) > 0


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_moments_in_the_eigenbasis_become_those_of_the_new_gradient(mode, shrink):
    """With β₁ = 0 the first moment is the last gradient; here gradients are known again after the projection."""
    run = Run("eigen", betas=(0.0, 0.9), **MODES[mode]).train()
    run.manager.neural_reprojection(run.optimizer, shrink=shrink)
    run.backward()
    for name, (m_a, m_b) in run.first_moments().items():
        grad_a, grad_b = run.pair(name).a.grad, run.pair(name).b.grad
        assert largest(m_a - grad_a, grad_a.abs().max()) < 1e-10
        assert largest(m_b - grad_b, grad_b.abs().max()) < 1e-10


@pytest.mark.parametrize("shrink", [False, True])
def test_natural_momentum_leads_to_the_same_function_from_every_basis(shrink):
    """Steps before and after a projection, mode sgd: ΔW stays that of the model written in another basis."""

    def final(bases, forget=False):
        run = Run("sgd", bases=bases, kfac_damping=0.0)
        for group in run.optimizer.param_groups:
            group["lr"] = 1e-3
        for _ in range(3):
            run.backward()
            run.optimizer.step()
        run.manager.neural_reprojection(run.optimizer, shrink=shrink)
        if forget:
            for state in run.inner.state.values():
                state["momentum_buffer"].zero_()
        if shrink:
            for _ in range(3):
                run.backward()
                run.optimizer.step()
        else:  # Σ is singular after a projection that stays r×r, and there is no natural gradient without damping
            for parameter, state in run.inner.state.items():
                parameter.data.sub_(1e-3 * state["momentum_buffer"])
        return run.deltas()

    one, without = final(None), final(None, forget=True)
    two = final([change_of_basis(60 + i, R, 10.0) for i in range(3)])
    for name in SHAPES:
        assert largest(two[name] - one[name], one[name].abs().max()) < 1e-8
        assert largest(without[name] - one[name], one[name].abs().max()) > 1e-4, "momentum plays no part"


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "eigen"])
def test_second_moments_stay_positive_and_take_the_squares_of_the_turn(optimizer, shrink):
    run = Run(optimizer).train()
    before, maps = run.second_moments(), run.planned(shrink)
    bases = {p.name: (s["q_a"][i].clone(), s["q_g"][i].clone()) for s, i, p in run.manager.layers()}
    run.manager.neural_reprojection(run.optimizer, shrink=shrink)
    for state, i, pair in run.manager.layers():
        name = pair.name.rpartition(".")[2]
        left, right = maps[name]
        turn_a, turn_b = right.mT, left.mT
        if optimizer == "eigen":
            if not shrink:  # no coordinate may get a second moment of zero: Adam would step full size on rounding
                left = right = torch.eye(R, dtype=torch.float64)
            turn_a = state["q_g"][i].mT @ right.mT @ bases[pair.name][1]
            turn_b = bases[pair.name][0].mT @ left.mT @ state["q_a"][i]
        v_a, v_b = run.second_moments()[name]
        assert largest(v_a - turn_a.square() @ before[name][0], before[name][0].max()) < 1e-9
        assert largest(v_b - before[name][1] @ turn_b.square(), before[name][1].max()) < 1e-9
        assert float(v_a.min()) > 1e-6 * float(v_a.max()) and float(v_b.min()) > 1e-6 * float(v_b.max())


@pytest.mark.parametrize("shrink", [False, True])
def test_inverses_after_a_projection_are_those_of_the_new_statistics(shrink):
    """At once: until the next regular inversion gradients would go unpreconditioned."""
    run = Run("adamw", kfac_damping=0.1, kfac_update_freq=50).train()
    run.manager.neural_reprojection(run.optimizer, shrink=shrink)
    for state, i, pair in run.manager.layers():
        by_hand = run.statistics_by_hand()[pair.name.rpartition(".")[2]]
        for side, cov in zip("ag", by_hand, strict=True):
            r = len(cov)
            damped = cov + 0.1 * cov.trace() / r * torch.eye(r, dtype=torch.float64)
            assert largest(state[f"inv_{side}"][i] @ damped - torch.eye(r, dtype=torch.float64)) < 1e-9


@pytest.mark.parametrize("mode", MODES)
def test_adapted_ranks_are_those_of_the_spectra(mode):
    run = Run(**MODES[mode], enable_rank_adaptation=True, rank_adaptation_threshold=0.8).train()
    by_hand = run.statistics_by_hand()
    run.manager.neural_reprojection(run.optimizer)
    seen = set()
    for name, (cov_a, cov_g) in by_hand.items():
        values = {"a": cov_a, "g": cov_g} if mode != "balanced" else {"a": cov_a @ cov_g}
        ks = {}
        for side, matrix in values.items():
            shares = np.cumsum(np.sort(np.linalg.eigvals(matrix.numpy()).real)[::-1]) / np.trace(matrix.numpy())
            ks[side] = int(np.argmax(shares >= 0.8)) + 1
        said = run.event()["layers"][names(name)]
        assert said["k_a"] == ks["a"] and said["k_b"] == (ks["g"] if mode == "two-sided" else ks["a"])
        seen.add(said["k_a"] == said["k_b"])
    assert mode != "two-sided" or False in seen, "k_a and k_b are never told apart"


def test_eigenbases_after_a_projection_are_those_of_the_new_statistics():
    run = Run("eigen").train()
    run.manager.neural_reprojection(run.optimizer, shrink=True)
    for state, i, pair in run.manager.layers():
        by_hand = run.statistics_by_hand()[pair.name.rpartition(".")[2]]
        for side, cov in zip("ag", by_hand, strict=True):
            turned = state[f"q_{side}"][i].mT @ cov @ state[f"q_{side}"][i]
            assert largest(turned - torch.diag(turned.diagonal()), turned.max()) < 1e-9


@pytest.mark.parametrize("mode", MODES)
def test_every_event_is_logged_with_the_change_of_each_layer(mode, tmp_path):
    run = Run(log=tmp_path / "log.jsonl", **MODES[mode]).train()
    before = run.deltas()
    run.manager.neural_reprojection(run.optimizer)
    event = run.event()
    assert event["step"] == 5 and event["mode"] == MODES[mode]["reprojection"] and event["shrink"] is False
    assert set(event["layers"]) == {names(n) for n in SHAPES}
    for name, after in run.deltas().items():
        expected = float(torch.linalg.matrix_norm(after - before[name]) / torch.linalg.matrix_norm(before[name]))
        said = event["layers"][names(name)]
        assert said["relative_change"] == pytest.approx(expected, rel=1e-9) and expected > 1e-3
        assert (said["k_a"], said["k_b"], said["r"]) == (2, 2, R)
    on_disk = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r for r in on_disk if r["kind"] == "reprojection"] == [event]
    assert all(int(state["k"][i]) == 2 for state, i, _ in run.manager.layers())


@pytest.mark.parametrize("optimizer", ["adamw", "eigen"])
@pytest.mark.parametrize("changes", [{"reprojection_k": R}, {"reprojection_k": 99}, {"enable_rank_adaptation": True}])
def test_balanced_with_nothing_to_cut_changes_no_bit(optimizer, changes):
    run = Run(optimizer, rank_adaptation_threshold=1.0, **changes).train()
    twin = copy.deepcopy(run)
    for shrink in (False, True):
        run.manager.neural_reprojection(run.optimizer, shrink=shrink)
        for name in SHAPES:
            for one, two in (
                *zip(run.weights()[name], twin.weights()[name], strict=True),
                *zip(run.statistics()[name], twin.statistics()[name], strict=True),
                *zip(run.first_moments()[name], twin.first_moments()[name], strict=True),
                *zip(run.second_moments()[name], twin.second_moments()[name], strict=True),
            ):
                assert torch.equal(one, two)
        assert {said["relative_change"] for said in run.event()["layers"].values()} == {0.0}
        assert {said["k_a"] for said in run.event()["layers"].values()} == {R}


@pytest.mark.parametrize("mode", MODES)
def test_projecting_twice_at_one_step_is_projecting_once(mode):
    run = Run(**MODES[mode], enable_rank_adaptation=True, rank_adaptation_threshold=0.8).train()
    run.manager.neural_reprojection(run.optimizer)
    before, first = run.weights(), run.event()
    run.manager.neural_reprojection(run.optimizer)
    assert all(said["relative_change"] > 1e-3 for said in first["layers"].values())
    for name, (a, b) in run.weights().items():
        assert torch.equal(a, before[name][0]) and torch.equal(b, before[name][1])
        assert run.event()["layers"][names(name)]["k_a"] == first["layers"][names(name)]["k_a"] < R


def test_a_model_in_another_basis_is_cut_to_the_same_function_unless_in_paper_mode():
    changed = [change_of_basis(50 + i, R, 100.0) for i in range(3)]
    seen = {}
    for mode, settings_of in MODES.items():
        settings_of = {**settings_of, "enable_rank_adaptation": True, "rank_adaptation_threshold": 0.9}
        runs = []
        for bases in (None, changed):
            run = Run(bases=bases, **settings_of)
            for group in run.optimizer.param_groups:
                group["lr"] = 0.0
            run.backward()
            run.optimizer.step()
            run.manager.neural_reprojection()
            runs.append(run)
        one, two = (run.deltas() for run in runs)
        ranks = [[said["k_a"] for said in run.event()["layers"].values()] for run in runs]
        worst = max(float((two[n] - one[n]).norm() / one[n].norm()) for n in SHAPES)
        seen[mode] = (worst, ranks[0] == ranks[1])
        assert min(ranks[0]) < R
    assert seen["balanced"][0] < 1e-8 and seen["balanced"][1]
    assert seen["two-sided"][0] > 0.1 and not seen["two-sided"][1]
    assert seen["one-sided"][0] > 0.1 and not seen["one-sided"][1]


@pytest.mark.parametrize("shrink", [False, True])
def test_where_fewer_directions_count_than_must_stay_nothing_is_cut(shrink):
    """One token: both covariances have rank 1, and nothing says which second direction to keep."""
    run = Run(tokens=1, min_lora_rank=2, enable_rank_adaptation=True).train(0)
    before = run.weights()
    run.manager.neural_reprojection(run.optimizer, shrink=shrink)
    for name, (a, b) in run.weights().items():
        assert torch.equal(a, before[name][0]) and torch.equal(b, before[name][1])
        assert run.event()["layers"][names(name)]["k_a"] == R
    loose = Run(tokens=1, min_lora_rank=1, enable_rank_adaptation=True).train(0)
    loose.manager.neural_reprojection(loose.optimizer, shrink=shrink)
    assert all(int(torch.linalg.matrix_rank(delta)) == 1 for delta in loose.deltas().values())


@pytest.mark.parametrize("shrink", [False, True])
def test_a_layer_whose_h_and_delta_never_meet_is_not_wiped_out(shrink):
    """Σ_a Σ_g = 0 although neither is zero."""
    run = Run(tokens=1, enable_rank_adaptation=True)
    with torch.no_grad():
        for name in SHAPES:
            pair = run.pair(name)
            h, back = run.x[name] @ pair.a.mT, run.c[name] @ pair.b
            pair.b.sub_(run.c[name].mT @ (h * (back @ h.mT)) / (h.square().sum() * run.c[name].square().sum()))
    before = run.train(0).deltas()
    for cov_a, cov_g in run.statistics().values():
        assert largest(cov_a @ cov_g) < 1e-13 * float(cov_a.max() * cov_g.max()) and float(cov_g.max()) > 0
    run.manager.neural_reprojection(run.optimizer, shrink=shrink)
    for name, delta in run.deltas().items():
        assert torch.equal(delta, before[name])


def test_layers_without_statistics_are_left_alone():
    run = Run()
    with torch.no_grad():
        run.pair("second").b.zero_()  # Σ_g = 0, as at the first step of LoRA
    run.train(0)
    before = run.weights()["second"]
    run.manager.neural_reprojection(run.optimizer)
    assert set(run.event()["layers"]) == {names("first"), names("third")}
    assert all(torch.equal(one, two) for one, two in zip(run.weights()["second"], before, strict=True))
    events = len(run.manager.history)
    fresh = Run()
    fresh.manager.neural_reprojection(fresh.optimizer)
    assert fresh.manager.history == [] and events > 0, "no event without statistics"


def test_projections_come_at_their_steps_and_rank_adaptation_later():
    run = Run(
        reprojection_freq=3,
        reprojection_warmup_steps=5,
        enable_rank_adaptation=True,
        rank_adaptation_start_step=8,
        rank_adaptation_threshold=1e-3,
        reprojection_k=3,
    ).train(12)
    events = [r for r in run.manager.history if r["kind"] == "reprojection"]
    assert [r["step"] for r in events] == [6, 9, 12]
    ranks = [{(said["k_a"], said["k_b"]) for said in r["layers"].values()} for r in events]
    assert ranks == [{(3, 3)}, {(1, 1)}, {(1, 1)}]
    assert not any(
        r["kind"] == "reprojection" for r in Run(reprojection="none", reprojection_freq=1).train().manager.history
    )


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "eigen"])
def test_training_goes_on_in_what_was_kept(optimizer):
    """After a projection the loss falls on, and what is stepped is finite."""
    run = Run(optimizer, reprojection_freq=4).train(3)
    losses = []
    for _ in range(12):
        for group in run.optimizer.param_groups:
            group["lr"] = 1e-3
        run.backward()
        losses.append(sum(float((run.c[n] * y.detach()).sum()) for n, y in run.model(run.x).items()))
        run.optimizer.step()
    assert len([r for r in run.manager.history if r["kind"] == "reprojection"]) == 4
    assert all(bool(torch.isfinite(w).all()) for pair in run.weights().values() for w in pair)
    assert losses[-1] < losses[0]
