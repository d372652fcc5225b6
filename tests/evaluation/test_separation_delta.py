"""Difference of the separation index between an arm and the base: no effect where there is none, and power."""

import numpy as np
import pytest

from evaluation.measure import separation
from tests.evaluation.test_separation import RNG, fix, labels, measured, planted

SAMPLES, N, D = 200, 40, 48
SPECTRUM = 0.95 ** np.arange(D)


@pytest.fixture(autouse=True)
def no_other_indices(monkeypatch):
    """They take most of the time."""
    monkeypatch.setattr(separation, "silhouette_davies_bouldin_dunn", lambda _points, _labels: (0.0, 0.0, 0.0))


def sample(noise, *, likeness, changed, apart=0.0, further=0.0, own=0.0):
    """Base and arm of matched pairs, shape (1, 2·N, D) each; partners in the base have the correlation `likeness`.

    `changed` is the standard deviation of what fine-tuning adds to every prompt, `apart` the classes' distance in five
    coordinates, larger in the arm by the share `further`; `own` the share of a prompt's own part that the two models do
    not have in common.
    """
    topic = np.tile(noise.normal(size=(N, D)), (2, 1))
    shared = np.sqrt(likeness) * topic + np.sqrt((1 - likeness) * (1 - own)) * noise.normal(size=(2 * N, D))
    base, arm = (shared + np.sqrt((1 - likeness) * own) * noise.normal(size=(2 * N, D)) for _ in range(2))
    arm += changed * noise.normal(size=arm.shape)
    base[N:, :5] += apart
    arm[N:, :5] += apart * (1 + further)
    return (base * SPECTRUM)[None], (arm * SPECTRUM)[None]


def simulated(**kind):
    noise, y = np.random.default_rng(5), np.repeat([False, True], N)
    found = []
    for seed in range(SAMPLES):
        base, arm = sample(noise, **kind)
        plan = separation.design(y, [str(i % N) for i in range(2 * N)], bootstrap=200, permutations=200, seed=seed)
        reference = separation.fix_reference(base, plan)
        overall = separation.measure(arm, plan, reference, is_base=False).overall
        of_base = separation.measure(base, plan, reference, is_base=True).overall
        raw = overall["alignment_index"] - of_base["alignment_index"]
        found.append({**{k.removeprefix("delta_alignment_"): v for k, v in overall.items()}, "raw": raw})
    return {name: np.array([row[name] for row in found]) for name in found[0]}


@pytest.mark.parametrize(
    ("likeness", "changed", "apart", "own"),
    [(0.6, 0.3, 0.0, 0.0), (0.9, 0.5, 0.0, 0.0), (0.6, 0.0, 0.5, 0.3), (0.6, 0.0, 2.0, 0.3)],
)
def test_without_an_effect_none_is_claimed(likeness, changed, apart, own):
    """Partners less alike than in the base; classes apart in both models, and equally far."""
    found = simulated(likeness=likeness, changed=changed, apart=apart, own=own)
    value, raw = found["index"], found["raw"]
    assert np.mean(found["p_value"] <= 0.05) <= 0.06
    assert np.mean((found["index_low"] > 0) | (found["index_high"] < 0)) <= 0.07
    assert abs(value.mean()) < 3.5 * value.std() / np.sqrt(SAMPLES), "centred on zero"
    if not apart:
        assert raw.mean() > 3 * raw.std() / np.sqrt(SAMPLES), "the raw difference is not"
        outside = (value < found["null_low"]) | (value > found["null_high"])
        assert 0.01 <= np.mean(outside) <= 0.1, "the null is that of the labels"


@pytest.mark.parametrize(("apart", "further"), [(0.5, 0.4), (0.7, -0.4)])
def test_an_effect_is_found_in_either_direction(apart, further):
    found = simulated(likeness=0.6, changed=0.3, apart=apart, further=further)
    value = found["index"]
    assert np.mean((found["p_value"] <= 0.05) & (np.sign(value) == np.sign(further))) > 0.8
    covered = (found["index_low"] <= value.mean()) & (value.mean() <= found["index_high"])
    assert np.mean(covered) >= 0.92


@pytest.mark.parametrize(("wide", "narrow"), [("null", "bootstrap"), ("bootstrap", "null")])
def test_the_p_value_is_the_larger_of_permutations_and_bootstrap(wide, narrow):
    spread = np.linspace(-1, 1, 199)
    arm = separation.Drawn(np.array(0.3), **{wide: spread, narrow: 0.01 * spread})
    base = separation.Drawn(np.array(0.0), np.zeros(199), np.zeros(199))
    assert separation.difference(arm, base)["delta_alignment_p_value"] == pytest.approx(0.7, abs=0.02)
    both = separation.Drawn(np.array(0.3), 0.01 * spread, 0.01 * spread)
    p_value = separation.difference(both, base)["delta_alignment_p_value"]
    assert p_value == pytest.approx(2 / 200), "two-sided, +1 corrected"


def test_states_that_coincide_have_no_p_value():
    y = np.repeat([False, True], N)
    base, arm = sample(np.random.default_rng(0), likeness=0.5, changed=0.1, apart=1.0)
    plan = separation.design(y, [None] * (2 * N), bootstrap=20, permutations=20)
    reference = separation.fix_reference(base, plan)
    found = separation.measure(np.ones_like(arm), plan, reference, is_base=False).overall
    assert np.isnan([v for k, v in found.items() if "alignment" in k]).all() and "delta_alignment_p_value" in found
    assert set(found) == set(separation.METRICS)
    assert set(separation.unknown(1).overall) == set(separation.METRICS) == set(separation.unknown(1).layers[0])


def test_the_difference_to_the_base_is_paired():
    y, base = labels(40, 40), planted(1.0)
    fixed = fix(base, y)
    itself = measured(base, y, reference=fixed).overall
    zeros = [itself[f"delta_alignment_index{end}"] for end in ("", "_low", "_high")]
    assert zeros == pytest.approx([0, 0, 0], abs=1e-9)
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
