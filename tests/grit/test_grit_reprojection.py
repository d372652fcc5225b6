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
from grit.factors import balance, choose_rank, relative_change
from tests.grit.nets import covariances, inner_for, of_kind, trainable

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


@pytest.mark.parametrize(
    ("values", "tau", "least", "expected"),
    [
        ([4.0, 3.0, 2.0, 1.0], 0.4, 1, 1),  # reached exactly
        ([4.0, 3.0, 0.0, 0.0], 1.0, 1, 2),  # zeros hold nothing, even at τ = 1
        ([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], 1.0, 1, 10),  # the sum is 0.9999999999999999
        ([5.0, 0.0], 0.99, 9, 2),  # never above r
        ([0.0, 0.0, 0.0], 0.5, 1, 3),  # no information: nothing is cut
        ([float("nan"), 1.0, 1.0], 0.5, 1, 3),
        ([1.0, 0.5, -0.5], 1.0, 1, 2),  # a negative eigenvalue is rounding
        ([1e-20, 1e-24, 1e-24], 0.99, 1, 1),
    ],
)
def test_rank_of_given_eigenvalues(values, tau, least, expected):
    assert choose_rank(torch.tensor(values, dtype=torch.float64), tau, least) == expected
    assert choose_rank(torch.tensor(values, dtype=torch.float32), tau, least) == expected


def test_relative_change_from_and_to_nothing():
    a, b = random(0, 3, 5), random(1, 4, 3)
    zero = torch.zeros_like(b)
    assert relative_change(a, zero, a, zero) == 0.0
    assert relative_change(a, zero, a, b) == float("inf")
    assert relative_change(a, b, a, zero) == pytest.approx(1.0)
    change = random(2, 3, 3) + 2 * torch.eye(3, dtype=torch.float64)
    assert relative_change(a, b, change @ a, b @ torch.linalg.inv(change)) < 1e-13, "a change of basis changes nothing"


# A whole model

R, TOKENS, ALPHA = 4, 32, 6.0
SHAPES = {"first": (7, 5), "second": (7, 5), "third": (6, 9)}  # d_in, d_out


class Parallel(nn.Module):
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

    def __init__(self, optimizer="adamw", tokens=TOKENS, seed=0, log=None, **changes):
        torch.manual_seed(seed)
        config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(SHAPES))
        self.model = get_peft_model(Parallel().double(), config)
        values = {"mode": "eigen_adamw" if optimizer == "eigen" else optimizer, "capture": "hooks", "kl_clip": 0.0}
        values |= {"grit_cov_update_freq": 1, "kfac_update_freq": 1, "cov_decay": 0.0, "kfac_min_samples": 1}
        values |= {"min_lora_rank": 1, "reprojection_freq": 10**6, "reprojection_k": 2, "rank_shrink": "never"}
        values["enable_rank_adaptation"] = False
        self.manager = GRITManager(self.model, GRITConfig.from_dict({**values, **changes}), log_file=log)
        self.x = {n: random(seed + i, tokens, d_in) for i, (n, (d_in, _)) in enumerate(SHAPES.items())}
        self.c = {n: random(seed + 9 + i, tokens, d_out) for i, (n, (_, d_out)) in enumerate(SHAPES.items())}
        with torch.no_grad():
            for i, pair in enumerate(self.manager.pairs()):
                pair.a.copy_(random(seed + 20 + i, *pair.a.shape))
                pair.b.copy_(random(seed + 30 + i, *pair.b.shape))
        self.inner = inner_for(values["mode"], trainable(self.model), weight_decay=0.0)
        self.optimizer = GritOptimizer(self.inner, self.manager)

    def backward(self):
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
        return {name.rpartition(".")[2]: found[:2] for name, found in covariances(self.manager).items()}

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
        key = "momentum_buffer" if self.manager.config.mode == "sgd" else "exp_avg"
        return self.moments(key, lambda t, i: (t["q_g"][i] @ t["m_a"][i], t["m_b"][i] @ t["q_a"][i].mT))

    def second_moments(self):
        return self.moments("exp_avg_sq", lambda t, i: (t["v_a"][i].clone(), t["v_b"][i].clone()))

    def moments(self, key, own):
        found = {}
        for state, i, pair in self.manager.curvature.layers():
            inner = (self.inner.state[p][key].clone() for p in (pair.a, pair.b) if "m_a" not in state.t)
            found[pair.name.rpartition(".")[2]] = own(state.t, i) if "m_a" in state.t else tuple(inner)
        return found

    def planned(self, shrink):
        found = {}
        for state, i, pair in self.manager.curvature.layers():
            found[pair.name.rpartition(".")[2]] = self.manager.curvature.plan(state, i, self.manager.step, shrink)[:2]
        return found

    def event(self):
        return of_kind(self.manager.history, "reprojection")[-1]


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
    if mode == "balanced":
        return (oblique(cov_a, cov_g, k),) * 2
    return orthogonal(cov_a, k), orthogonal(cov_g if mode == "two-sided" else cov_a, k)


@pytest.mark.parametrize("capture", ["hooks", "gradients"])
@pytest.mark.parametrize("mode", MODES)
def test_weights_and_statistics_of_a_model_are_projected(mode, capture, tmp_path):
    run = Run("adamw", capture=capture, log=tmp_path / "log.jsonl", **MODES[mode]).train()
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
        said, old = run.event()["layers"][names(name)], before[name][1] @ before[name][0]
        expected = float(torch.linalg.matrix_norm(b @ a - old) / torch.linalg.matrix_norm(old))
        assert said["relative_change"] == pytest.approx(expected, rel=1e-9) and expected > 1e-3
        assert (said["k_a"], said["k_b"], said["r"]) == (2, 2, R)
    # Σ_a ← L Σ_a Lᵀ and Σ_g ← Rᵀ Σ_g R are what the new weights would have given.
    again = run.statistics_by_hand()
    for name, (cov_a, cov_g) in run.statistics().items():
        assert largest(cov_a - again[name][0], again[name][0].abs().max()) < 1e-10
        assert largest(cov_g - again[name][1], again[name][1].abs().max()) < 1e-10
        assert largest(again[name][0] - by_hand[name][0], by_hand[name][0].abs().max()) > 1e-3, "nothing to re-base"
    event = run.event()
    assert event["step"] == 5 and event["mode"] == MODES[mode]["reprojection"] and event["shrink"] is False
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1]) == event
    assert all(int(state["k"][i]) == 2 for state, i, _ in run.manager.curvature.layers())


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
@pytest.mark.parametrize("optimizer", ["adamw", "eigen"])
def test_second_moments_stay_positive_and_take_the_squares_of_the_turn(optimizer, shrink):
    run = Run(optimizer).train()
    before, maps = run.second_moments(), run.planned(shrink)
    bases = {p.name: (s["q_a"][i].clone(), s["q_g"][i].clone()) for s, i, p in run.manager.curvature.layers()}
    run.manager.neural_reprojection(run.optimizer, shrink=shrink)
    for state, i, pair in run.manager.curvature.layers():
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


@pytest.mark.parametrize(("optimizer", "shrink"), [("adamw", False), ("adamw", True), ("eigen", True)])
def test_inverses_and_bases_after_a_projection_are_those_of_the_new_statistics(optimizer, shrink):
    """At once: until the next regular inversion gradients would go unpreconditioned."""
    run = Run(optimizer, kfac_damping=0.1, kfac_update_freq=50).train()
    run.manager.neural_reprojection(run.optimizer, shrink=shrink)
    for state, i, pair in run.manager.curvature.layers():
        by_hand = run.statistics_by_hand()[pair.name.rpartition(".")[2]]
        for side, cov in zip("ag", by_hand, strict=True):
            eye = torch.eye(len(cov), dtype=torch.float64)
            if optimizer == "adamw":
                damped = cov + 0.1 * cov.trace() / len(cov) * eye
                assert largest(state[f"inv_{side}"][i] @ damped - eye) < 1e-9
            else:
                turned = state[f"q_{side}"][i].mT @ cov @ state[f"q_{side}"][i]
                assert largest(turned - torch.diag(turned.diagonal()), turned.max()) < 1e-9


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
    steps = {"reprojection_freq": 3, "reprojection_warmup_steps": 5, "rank_adaptation_start_step": 8}
    run = Run(**steps, enable_rank_adaptation=True, rank_adaptation_threshold=1e-3, reprojection_k=3).train(12)
    events = of_kind(run.manager.history, "reprojection")
    assert [r["step"] for r in events] == [6, 9, 12]
    ranks = [{(said["k_a"], said["k_b"]) for said in r["layers"].values()} for r in events]
    assert ranks == [{(3, 3)}, {(1, 1)}, {(1, 1)}]
    never = Run(reprojection="none", reprojection_freq=1).train()
    never.manager.finish(never.optimizer)
    assert not of_kind(never.manager.history, "reprojection")
