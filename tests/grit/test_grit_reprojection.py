"""Reprojection: the arithmetic of one layer, and what happens to a whole model's weights, statistics and moments.

In the models here every layer has inputs of its own and the loss is linear in its outputs, Σ ⟨C, y⟩. So h = A x and
δ = s·Bᵀ c are known without GRIT, and stay known after A and B have changed.
"""

import json

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies
from peft import LoraConfig, get_peft_model
from torch import nn

from grit import GRITManager, GritOptimizer
from grit.factors import balance, choose_rank, relative_change
from tests.grit.nets import PREFIX, covariances, inner_for, of_kind, quick, same, trainable


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
@pytest.mark.parametrize("seed", range(2))
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
    strategies.integers(0, 2**32 - 1), strategies.integers(2, 8), strategies.floats(1, 100), strategies.floats(0.5, 1.0)
)
@settings(max_examples=60, deadline=None, derandomize=True)
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
EYE = torch.eye(R, dtype=torch.float64)


class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Linear(*shape))

    def forward(self, inputs):
        return {name: getattr(self, name)(inputs[name]) for name in SHAPES}


class Run:
    """A model with GRIT; statistics are those of the last batch at the weights as they are."""

    def __init__(self, optimizer="adamw", tokens=TOKENS, log=None, **changes):
        torch.manual_seed(0)
        config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(SHAPES))
        self.model = get_peft_model(Parallel().double(), config)
        values = {"mode": "eigen_adamw" if optimizer == "eigen" else optimizer, "capture": "hooks", "kl_clip": 0.0}
        values |= {"reprojection": "balanced", "reprojection_freq": 10**6, "reprojection_k": 2, "rank_shrink": "never"}
        values |= {"cov_decay": 0.0, "enable_rank_adaptation": False}
        self.manager = GRITManager(self.model, quick(**{**values, **changes}), log_file=log)
        self.x = {n: random(i, tokens, d_in) for i, (n, (d_in, _)) in enumerate(SHAPES.items())}
        self.c = {n: random(9 + i, tokens, d_out) for i, (n, (_, d_out)) in enumerate(SHAPES.items())}
        with torch.no_grad():
            for i, pair in enumerate(self.manager.pairs()):
                pair.a.copy_(random(20 + i, *pair.a.shape))
                pair.b.copy_(random(30 + i, *pair.b.shape))
        self.inner = inner_for(values["mode"], trainable(self.model), weight_decay=0.0)
        self.optimizer = GritOptimizer(self.inner, self.manager)

    def train(self, steps=4):
        """Steps, and a last one with lr 0: moments and statistics belong to the weights then."""
        for rate in [1e-2] * steps + [0.0]:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.zero_grad()
            y = self.model(self.x)
            sum((self.c[name] * y[name]).sum() for name in SHAPES).backward()
            self.optimizer.step()
        return self

    def reproject(self, shrink=False):
        """What the log says of each layer."""
        self.manager.neural_reprojection(self.optimizer, shrink=shrink)
        event = of_kind(self.manager.history, "reprojection")[-1]
        return {name.removeprefix(PREFIX): said for name, said in event["layers"].items()}

    def layers(self):
        """(name, tensors of its state, pair) of every layer."""
        for state, i, pair in self.manager.curvature.layers():
            yield pair.name.removeprefix(PREFIX), {key: t[i] for key, t in state.t.items()}, pair

    def weights(self):
        return {name: (pair.a.detach().clone(), pair.b.detach().clone()) for name, _, pair in self.layers()}

    def deltas(self):
        return {name: b @ a for name, (a, b) in self.weights().items()}

    def statistics(self):
        return {name.removeprefix(PREFIX): found[:2] for name, found in covariances(self.manager).items()}

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

    def moments(self, second=False):
        """Those of A and B; first ones in plain coordinates, second ones in those in which they are kept."""
        key = "exp_avg_sq" if second else "momentum_buffer" if self.manager.config.mode == "sgd" else "exp_avg"
        found = {}
        for name, state, pair in self.layers():
            if "m_a" not in state:
                found[name] = tuple(self.inner.state[p][key].clone() for p in (pair.a, pair.b))
            elif second:
                found[name] = (state["v_a"].clone(), state["v_b"].clone())
            else:
                found[name] = (state["q_g"] @ state["m_a"], state["m_b"] @ state["q_a"].mT)
        return found

    def planned(self, shrink):
        plan, step = self.manager.curvature.plan, self.manager.step
        layers = self.manager.curvature.layers()
        return {pair.name.removeprefix(PREFIX): plan(state, i, step, shrink)[:2] for state, i, pair in layers}


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


KINDS = {
    "one-sided": {"reprojection": "paper", "use_two_sided_reprojection": False},
    "two-sided": {"reprojection": "paper", "use_two_sided_reprojection": True},
    "balanced": {"reprojection": "balanced"},
}


def projectors(kind, cov_a, cov_g, k=2):
    if kind == "balanced":
        return (oblique(cov_a, cov_g, k),) * 2
    return orthogonal(cov_a, k), orthogonal(cov_g if kind == "two-sided" else cov_a, k)


def assert_near(found, expected, tolerance=1e-10):
    """Pairs of tensors, relative to the largest number of each."""
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape and largest(got - want, want.abs().max()) < tolerance


@pytest.mark.parametrize("capture", ["hooks", "gradients"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_statistics_of_a_model_are_projected(kind, capture, tmp_path):
    run = Run("adamw", capture=capture, log=tmp_path / "log.jsonl", **KINDS[kind]).train()
    before, by_hand = run.weights(), run.statistics_by_hand()
    for name, found in run.statistics().items():  # what the rest stands on
        assert_near(found, by_hand[name], 1e-12)
    told = run.reproject()
    for name, (a, b) in run.weights().items():
        left, right = projectors(kind, *by_hand[name])
        assert_near((a, b), (left @ before[name][0], before[name][1] @ right))
        assert int(torch.linalg.matrix_rank(b @ a)) == 2 and int(torch.linalg.matrix_rank(before[name][1])) == R
        old = before[name][1] @ before[name][0]
        expected = float(torch.linalg.matrix_norm(b @ a - old) / torch.linalg.matrix_norm(old))
        assert told[name] == {"r": R, "k_a": 2, "k_b": 2, "relative_change": pytest.approx(expected, rel=1e-9)}
        assert expected > 1e-3
    # Σ_a ← L Σ_a Lᵀ and Σ_g ← Rᵀ Σ_g R are what the new weights would have given.
    again = run.statistics_by_hand()
    for name, found in run.statistics().items():
        assert_near(found, again[name])
        assert largest(again[name][0] - by_hand[name][0], by_hand[name][0].abs().max()) > 1e-3, "nothing to re-base"
    event = run.manager.history[-1]
    assert event["step"] == 5 and event["mode"] == KINDS[kind]["reprojection"] and event["shrink"] is False
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1]) == event
    assert all(int(state["k"]) == 2 for _, state, _ in run.layers())


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw, not grafted", "sgd", "eigen"])
def test_first_moments_go_along_with_the_basis(optimizer, kind, shrink):
    """Those of raw gradients (and of grafted ones, as long) as gradients do, those of natural ones as weights do."""
    natural = optimizer in ("sgd", "adamw, not grafted")
    changes = {"grafting": False} if "not grafted" in optimizer else {}
    run = Run(optimizer.partition(",")[0], **changes, **KINDS[kind]).train()
    before, maps = run.moments(), run.planned(shrink)
    for name, covariances_by_hand in run.statistics_by_hand().items() if not shrink else ():
        assert_near(maps[name], projectors(kind, *covariances_by_hand), 1e-9)
    run.reproject(shrink)
    for name, found in run.moments().items():
        left, right = maps[name]
        assert left.shape == ((2, R) if shrink else (R, R))
        map_a, map_b = (left, right) if natural else (right.mT, left.mT)
        assert_near(found, (map_a @ before[name][0], before[name][1] @ map_b))
        assert [m.shape for m in found] == [w.shape for w in run.weights()[name]]
        assert min(float(m.abs().max()) for m in before[name]) > 0


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "eigen"])
def test_second_moments_stay_positive_and_take_the_squares_of_the_turn(optimizer, shrink):
    run = Run(optimizer).train()
    before, maps = run.moments(second=True), run.planned(shrink)
    bases = {name: (state["q_a"].clone(), state["q_g"].clone()) for name, state, _ in run.layers()}
    run.reproject(shrink)
    for name, state, _ in run.layers():
        left, right = maps[name]
        turn_a, turn_b = right.mT, left.mT
        if optimizer == "eigen":
            if not shrink:  # no coordinate may get a second moment of zero: Adam would step full size on rounding
                left = right = EYE
            turn_a = state["q_g"].mT @ right.mT @ bases[name][1]
            turn_b = bases[name][0].mT @ left.mT @ state["q_a"]
        found = run.moments(second=True)[name]
        assert_near(found, (turn_a.square() @ before[name][0], before[name][1] @ turn_b.square()), 1e-9)
        assert all(float(v.min()) > 1e-6 * float(v.max()) for v in found)


@pytest.mark.parametrize(("optimizer", "shrink"), [("adamw", False), ("adamw", True), ("eigen", True)])
def test_inverses_and_bases_after_a_projection_are_those_of_the_new_statistics(optimizer, shrink):
    """At once: until the next regular inversion gradients would go unpreconditioned."""
    run = Run(optimizer, kfac_damping=0.1, kfac_update_freq=50).train()
    run.reproject(shrink)
    for name, state, _ in run.layers():
        for side, cov in zip("ag", run.statistics_by_hand()[name], strict=True):
            eye = torch.eye(len(cov), dtype=torch.float64)
            if optimizer == "adamw":
                damped = cov + 0.1 * cov.trace() / len(cov) * eye
                assert largest(state[f"inv_{side}"] @ damped - eye) < 1e-9
            else:
                turned = state[f"q_{side}"].mT @ cov @ state[f"q_{side}"]
                assert largest(turned - torch.diag(turned.diagonal()), turned.max()) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_adapted_ranks_are_those_of_the_spectra(kind):
    run = Run(**KINDS[kind], enable_rank_adaptation=True, rank_adaptation_threshold=0.8).train()
    by_hand, told = run.statistics_by_hand(), run.reproject()
    for name, (cov_a, cov_g) in by_hand.items():
        ks = []
        for matrix in (cov_a, cov_g) if kind != "balanced" else (cov_a @ cov_g,):
            shares = np.cumsum(np.sort(np.linalg.eigvals(matrix.numpy()).real)[::-1]) / np.trace(matrix.numpy())
            ks.append(int(np.argmax(shares >= 0.8)) + 1)
        assert told[name]["k_a"] == ks[0] and told[name]["k_b"] == (ks[1] if kind == "two-sided" else ks[0])
    if kind == "two-sided":
        assert any(said["k_a"] != said["k_b"] for said in told.values()), "k_a and k_b are never told apart"


@pytest.mark.parametrize("optimizer", ["adamw", "eigen"])
@pytest.mark.parametrize("changes", [{"reprojection_k": 99}, {"enable_rank_adaptation": True}])
def test_balanced_with_nothing_to_cut_changes_no_bit(optimizer, changes):
    run = Run(optimizer, rank_adaptation_threshold=1.0, **changes).train()

    def everything():
        return [run.weights(), run.statistics(), run.moments(), run.moments(second=True)]

    before = everything()
    for shrink in (False, True):
        told = run.reproject(shrink)
        assert same(everything(), before)
        assert all((said["k_a"], said["relative_change"]) == (R, 0.0) for said in told.values())


@pytest.mark.parametrize("shrink", [False, True])
def test_where_fewer_directions_count_than_must_stay_nothing_is_cut(shrink):
    """One token: both covariances have rank 1, and nothing says which second direction to keep."""
    run = Run(tokens=1, min_lora_rank=2, enable_rank_adaptation=True).train(0)
    before = run.weights()
    assert {said["k_a"] for said in run.reproject(shrink).values()} == {R}
    assert same(run.weights(), before)
    loose = Run(tokens=1, min_lora_rank=1, enable_rank_adaptation=True).train(0)
    loose.reproject(shrink)
    assert all(int(torch.linalg.matrix_rank(delta)) == 1 for delta in loose.deltas().values())


@pytest.mark.parametrize("shrink", [False, True])
def test_a_layer_whose_h_and_delta_never_meet_is_not_wiped_out(shrink):
    """Σ_a Σ_g = 0 although neither is zero."""
    run = Run(tokens=1, enable_rank_adaptation=True)
    with torch.no_grad():
        for name, _, pair in run.layers():
            h, back = run.x[name] @ pair.a.mT, run.c[name] @ pair.b
            pair.b.sub_(run.c[name].mT @ (h * (back @ h.mT)) / (h.square().sum() * run.c[name].square().sum()))
    before = run.train(0).deltas()
    for cov_a, cov_g in run.statistics().values():
        assert largest(cov_a @ cov_g) < 1e-13 * float(cov_a.max() * cov_g.max()) and float(cov_g.max()) > 0
    run.reproject(shrink)
    assert same(run.deltas(), before)


def test_layers_without_statistics_are_left_alone():
    run = Run()
    with torch.no_grad():
        run.manager.pairs()[1].b.zero_()  # Σ_g = 0, as at the first step of LoRA
    before = run.train(0).weights()["second"]
    assert set(run.reproject()) == {"first", "third"}
    assert same(run.weights()["second"], before)
    fresh = Run()
    fresh.manager.neural_reprojection(fresh.optimizer)
    assert fresh.manager.history == [], "no event without statistics"


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
