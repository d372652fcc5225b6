"""Difference of the Alignment Quality Index between an arm and the base: no effect where there is none, and power."""

import numpy as np
import pytest

from evaluation import alignment, resampling
from tests.evaluation.test_alignment import RNG, fix, labels, measured, planted

SAMPLES, N, D = 200, 40, 48
SPECTRUM = 0.95 ** np.arange(D)


@pytest.fixture(autouse=True)
def no_other_indices(monkeypatch):
    """They take most of the time."""
    monkeypatch.setattr(alignment, "silhouette_davies_bouldin_dunn", lambda _points, _labels: (0.0, 0.0, 0.0))


def sample(noise, *, likeness, changed, apart=0.0, further=0.0, own=0.0):
    """Base and arm of matched pairs, shape (1, 2·N, D) each.

    Args:
        noise: Source of chance.
        likeness: Correlation of partners in the base.
        changed: Standard deviation of what fine-tuning adds to every prompt.
        apart: Distance of the classes in both, in five coordinates.
        further: Share of it by which the arm's lie further apart.
        own: Share of each prompt's own part that base and arm do not have in common.
    """
    topic = np.tile(noise.normal(size=(N, D)), (2, 1))
    shared = np.sqrt(likeness) * topic + np.sqrt((1 - likeness) * (1 - own)) * noise.normal(size=(2 * N, D))
    base, arm = (shared + np.sqrt((1 - likeness) * own) * noise.normal(size=(2 * N, D)) for _ in range(2))
    arm += changed * noise.normal(size=arm.shape)
    base[N:, :5] += apart
    arm[N:, :5] += apart * (1 + further)
    return (base * SPECTRUM)[None], (arm * SPECTRUM)[None]


def simulated(**kind):
    """Figures of `SAMPLES` arms, the constants of each fixed on its own base."""
    noise, y = np.random.default_rng(5), np.repeat([False, True], N)
    found = []
    for seed in range(SAMPLES):
        base, arm = sample(noise, **kind)
        plan = resampling.design(y, [str(i % N) for i in range(2 * N)], bootstrap=200, permutations=200, seed=seed)
        reference = alignment.fix_reference(base, plan)
        overall = alignment.measure(arm, plan, reference, is_base=False).overall
        of_base = alignment.measure(base, plan, reference, is_base=True).overall
        raw = overall["alignment_index"] - of_base["alignment_index"]
        chance = overall["alignment_null_mean"] - of_base["alignment_null_mean"]
        found.append({**{k.removeprefix("delta_alignment_"): v for k, v in overall.items()}, "raw": raw,
                      "chance": chance})  # fmt: skip
    return {name: np.array([row[name] for row in found]) for name in found[0]}


@pytest.mark.parametrize(
    ("likeness", "changed", "apart", "own"),
    [(0.6, 0.3, 0.0, 0.0), (0.9, 0.5, 0.0, 0.0), (0.6, 0.0, 0.5, 0.3), (0.6, 0.0, 2.0, 0.3)],
)
def test_without_an_effect_none_is_claimed(likeness, changed, apart, own):
    """Partners less alike than in the base; classes apart in both models, and equally far."""
    found = simulated(likeness=likeness, changed=changed, apart=apart, own=own)
    assert np.mean(found["p_value"] <= 0.05) <= 0.06
    excluded = (found["index_low"] > 0) | (found["index_high"] < 0)
    assert np.mean(excluded) <= 0.07
    value = found["index"]
    assert abs(value.mean()) < 3.5 * value.std() / np.sqrt(SAMPLES), "centred on zero"
    if not apart:
        assert found["raw"].mean() > 3 * found["raw"].std() / np.sqrt(SAMPLES), "the raw difference is not"
        outside = (value < found["null_low"]) | (value > found["null_high"])
        assert 0.01 <= np.mean(outside) <= 0.1, "the null is that of the labels"


def test_an_effect_is_found_in_either_direction():
    further = simulated(likeness=0.6, changed=0.3, apart=0.5, further=0.4)
    closer = simulated(likeness=0.6, changed=0.3, apart=0.7, further=-0.4)
    for found, sign in ((further, 1), (closer, -1)):
        assert np.mean((found["p_value"] <= 0.05) & (sign * found["index"] > 0)) > 0.8
        covered = (found["index_low"] <= found["index"].mean()) & (found["index"].mean() <= found["index_high"])
        assert np.mean(covered) >= 0.92


def test_the_difference_is_of_what_each_model_has_above_its_own_chance():
    found = simulated(likeness=0.9, changed=0.5, apart=0.5)
    assert found["index"] == pytest.approx(found["raw"] - found["chance"], rel=1e-9)
    assert np.mean(found["chance"]) > 0.1, "partners less alike: more by chance"


@pytest.mark.parametrize(("wide", "narrow"), [("null", "bootstrap"), ("bootstrap", "null")])
def test_the_p_value_is_the_larger_of_permutations_and_bootstrap(wide, narrow):
    spread = np.linspace(-1, 1, 199)
    arm = resampling.Drawn(np.array(0.3), **{wide: spread, narrow: 0.01 * spread})
    base = resampling.Drawn(np.array(0.0), np.zeros(199), np.zeros(199))
    assert resampling.difference(arm, base).p_value == pytest.approx(0.7, abs=0.02)
    both = resampling.Drawn(np.array(0.3), 0.01 * spread, 0.01 * spread)
    assert resampling.difference(both, base).p_value == pytest.approx(2 / 200), "two-sided, +1 corrected"


def test_states_that_coincide_have_no_p_value():
    y = np.repeat([False, True], N)
    base, arm = sample(np.random.default_rng(0), likeness=0.5, changed=0.1, apart=1.0)
    plan = resampling.design(y, [None] * (2 * N), bootstrap=20, permutations=20)
    reference = alignment.fix_reference(base, plan)
    found = alignment.measure(np.ones_like(arm), plan, reference, is_base=False).overall
    assert np.isnan([v for k, v in found.items() if "alignment" in k]).all() and "delta_alignment_p_value" in found
    assert set(found) == set(alignment.METRICS)
    assert set(alignment.unknown(1).overall) == set(alignment.METRICS) == set(alignment.unknown(1).layers[0])


def test_the_difference_to_the_base_is_paired():
    y, base = labels(40, 40), planted(1.0)
    fixed = fix(base, y)
    itself = measured(base, y, reference=fixed).overall
    assert [itself[f"delta_alignment_index{end}"] for end in ("", "_low", "_high")] == pytest.approx(
        [0, 0, 0], abs=1e-9
    )
    arm = base + 0.1 * RNG(5).normal(size=base.shape)
    arm[:, 40:, 0] += 0.2
    found = measured(arm, y, reference=fixed).overall
    assert itself["delta_alignment_p_value"] == 1.0
    above = [f["alignment_index"] - f["alignment_null_mean"] for f in (found, itself)]
    assert found["delta_alignment_index"] == pytest.approx(above[0] - above[1], rel=1e-9)
    width = found["delta_alignment_index_high"] - found["delta_alignment_index_low"]
    assert width < 0.5 * (found["alignment_index_high"] - found["alignment_index_low"])
    assert found["delta_alignment_index_low"] > 0
    assert "delta_alignment_index" not in measured(base, y).overall
