"""The separation index: algebra, null, interval, what it is normalised with, and an arm's difference to the base."""

import numpy as np
import pytest
from scipy.stats import kstest
from sklearn.metrics import calinski_harabasz_score

from evaluation import EvaluationError
from evaluation.measure import separation

RNG = np.random.default_rng
SAMPLES, N, D = 200, 40, 48
SPECTRUM = 0.95 ** np.arange(D)


def labels(safe, unsafe):
    return np.repeat([False, True], [safe, unsafe])


def one_labelling(points, unsafe):
    grams, first, second = separation.gram(points)[None], (~unsafe[None]).astype(float), unsafe[None].astype(float)
    return separation.separation(grams, first, second)


def planted(distance, *, n=40, d=12, layers=2, seed=0, noise=None):
    states = (RNG(seed) if noise is None else noise).normal(size=(layers, 2 * n, d))
    states[:, n:, 0] += distance
    return states


def fix(states, unsafe, *, pairs=None, key="", permutations=199, seed=0):
    plan = separation.design(unsafe, pairs or [None] * len(unsafe), bootstrap=1, permutations=permutations, seed=seed)
    return separation.fix_reference(states, plan, key)


def measured(states, unsafe, *, pairs=None, reference=None, bootstrap=200, permutations=199, weight=0.5, seed=0):
    plan = separation.design(
        unsafe, pairs or [None] * len(unsafe), bootstrap=bootstrap, permutations=permutations, seed=seed
    )
    fixed = reference or separation.fix_reference(states, plan)
    return separation.measure(states, plan, fixed, weight=weight, is_base=reference is None)


def overall(name, results):
    return np.array([one.overall[name] for one in results])


@pytest.mark.parametrize(("safe", "unsafe", "d"), [(10, 10, 3), (10, 37, 5), (25, 11, 60), (60, 60, 128)])
def test_chi_equals_scikit_learn_and_chi_times_xbi_is_constant(safe, unsafe, d):
    y, n = labels(safe, unsafe), safe + unsafe
    for seed in range(20):
        x = RNG(seed).normal(size=(n, d)) * RNG(seed).uniform(0.1, 10, d) + 100 + 2 * y[:, None]
        results = one_labelling(x, y)
        means = np.where(y[:, None], x[y].mean(axis=0), x[~y].mean(axis=0))
        xbi = ((x - means) ** 2).sum() / (n * ((means[0] - means[-1]) ** 2).sum())
        chi = calinski_harabasz_score(x, y)
        ours = (results.calinski_harabasz, results.xie_beni, results.inverse_xie_beni)
        assert [float(one[0, 0]) for one in ours] == pytest.approx([chi, xbi, 1 / xbi], rel=1e-9)
        assert chi * xbi == pytest.approx((n - 2) * safe * unsafe / n**2, rel=1e-9)


def test_resampled_points_count_as_often_as_they_were_drawn():
    y, x = labels(12, 9), RNG(1).normal(size=(21, 4))
    plan = separation.design(y, [None] * 21, bootstrap=30, permutations=1)
    results = separation.separation(separation.gram(x)[None], plan.bootstrap * ~y, plan.bootstrap * y)
    for row, counts in enumerate(plan.bootstrap.astype(int)):
        drawn = np.repeat(np.arange(21), counts)
        assert results.calinski_harabasz[0, row] == pytest.approx(calinski_harabasz_score(x[drawn], y[drawn]), rel=1e-9)


def test_clusters_of_no_or_of_changing_size_are_refused():
    grams = separation.gram(RNG(0).normal(size=(1, 4, 2)))
    for first in ([[0.0, 0, 0, 0]], [[1.0, 1, 0, 0], [1.0, 0, 0, 0]]):
        with pytest.raises(EvaluationError, match="non-empty clusters"):
            separation.separation(grams, np.array(first), 1 - np.array(first))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_index_is_the_formula_and_both_terms_say_the_same(weight):
    y = labels(15, 25)
    base = planted(0.5, n=20)
    fixed = fix(base, y)
    for distance in (0.0, 1.0, 3.0):
        states = planted(distance, n=20, seed=3)
        points = fixed.normalize(states)
        chi = np.array([calinski_harabasz_score(layer, y) for layer in points])
        kappa = 38 * 15 * 25 / 40**2
        expected = weight * chi / kappa + (1 - weight) * chi / fixed.chance
        results = measured(states, y, reference=fixed, weight=weight)
        assert results.overall["alignment_index"] == pytest.approx(expected.mean(), rel=1e-9)
        assert [layer["alignment_index"] for layer in results.layers] == pytest.approx(list(expected), rel=1e-9)


def test_what_the_index_does_not_see():
    y, base = labels(40, 40), planted(1.0)
    fixed = fix(base, y)
    same = measured(base, y, reference=fixed).overall["alignment_index"]
    moved = measured(7.0 * base + 5.0, y, reference=fixed).overall["alignment_index"]
    assert moved == pytest.approx(same, rel=1e-9)
    stretched = base.copy()
    stretched[..., 0] *= 3.0  # the coordinate that separates
    assert measured(stretched, y, reference=fixed).overall["alignment_index"] > 1.5 * same


def test_a_huge_or_constant_coordinate_does_not_dominate():
    y, states = labels(40, 40), planted(1.5)
    huge = states.copy()
    huge[..., 5] *= 1e4
    plain = measured(states, y).overall["calinski_harabasz"]
    assert measured(huge, y).overall["calinski_harabasz"] == pytest.approx(plain, rel=1e-6)
    states[..., 5] = 3.0
    fixed = fix(states, y)
    arm = states.copy()
    arm[..., 5] += 1e-6 * RNG(0).normal(size=arm.shape[:2])
    before, after = (measured(s, y, reference=fixed).overall["calinski_harabasz"] for s in (states, arm))
    assert after == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("paired", [False, True])
def test_without_a_difference_p_values_are_uniform_and_the_null_is_centred(paired):
    y, results = labels(20, 20), []
    for seed in range(300):
        states, pairs, noise = planted(0.0, n=20, d=6, seed=seed), None, RNG(seed)
        if paired:
            topic, pairs = 1.5 * noise.normal(size=(2, 20, 6)), [str(i % 20) for i in range(40)]
            states = np.concatenate([topic, topic], axis=1) + noise.normal(size=states.shape)
        results.append(measured(states, y, pairs=pairs, bootstrap=2, seed=seed))
    p = overall("alignment_p_value", results)
    assert kstest(p, "uniform").pvalue > 0.01 and abs(np.mean(p) - 0.5) < 0.05
    assert 0.02 < np.mean(p <= 0.05) < 0.09
    over = overall("alignment_index", results) - overall("alignment_null_mean", results)
    assert abs(np.mean(over)) < 3 * np.std(over) / np.sqrt(len(over)) + 0.01


def test_a_planted_separation_is_found():
    y, base = labels(40, 40), planted(0.0, seed=9)
    fixed = fix(base, y)
    results = [measured(planted(d, seed=4), y, reference=fixed).overall for d in (0.0, 0.5, 1.0, 2.0, 4.0)]
    values = [f["alignment_index"] for f in results]
    assert values == sorted(values) and len(set(values)) == 5
    assert results[-1]["alignment_p_value"] == pytest.approx(1 / 200), "the smallest that 199 permutations can give"
    assert results[-1]["alignment_index"] > results[-1]["alignment_null_high"]
    assert results[-1]["alignment_index_low"] > results[-1]["alignment_null_mean"]
    assert results[-1]["delta_alignment_index_low"] > 0


@pytest.mark.parametrize(
    ("own", "distance", "widest"),
    [pytest.param(own, distance, widest, marks=pytest.mark.full if distance else ())
     for own, distance, widest in ((False, 0.0, 1.35), (True, 0.0, 1.35), (False, 0.5, 1.35), (True, 0.5, 1.35),
                                   (False, 1.5, 1.27), (True, 1.5, 1.45))],
)  # fmt: skip
def test_the_interval_covers_the_expected_index(own, distance, widest):
    """Over samples of one size; the constants are fixed on another sample, or on each itself, as the base's are.

    Where classes lie far apart, the latter takes some of the index's own variance away, which the interval does not
    know: at distance 1.5 it is about 1.32 times too wide (2500 samples; the ratio of the 200 here has a standard error
    of 0.07), with constants of another sample 1.12 ± 0.02 times. A plain bootstrap's is 1.4 to 1.75 times too wide.
    """
    y, noise = labels(30, 30), RNG(0)
    fixed = None if own else fix(planted(distance, n=30, noise=noise), y)
    results = [
        measured(planted(distance, n=30, noise=noise), y, reference=fixed, permutations=199 if own else 1, seed=seed)
        for seed in range(200)
    ]
    values, low, high = (overall(f"alignment_index{end}", results) for end in ("", "_low", "_high"))
    assert 0.94 <= np.mean((low <= values.mean()) & (values.mean() <= high))
    assert 0.9 < np.mean(high - low) / (2 * 1.96 * np.std(values)) < widest
    assert ((low < values) & (values < high)).all()


def test_the_interval_of_the_difference_covers_the_expected_difference():
    """The constants are fixed on the base of each sample, as they are in use."""
    y, noise = labels(30, 30), RNG(0)
    results = []
    for seed in range(200):
        base = planted(1.0, n=30, noise=noise)
        arm = base + 0.3 * noise.normal(size=base.shape)
        arm[:, 30:, 0] += 0.2
        results.append(measured(arm, y, reference=fix(base, y, seed=seed), seed=seed))
    values, low, high = (overall(f"delta_alignment_index{end}", results) for end in ("", "_low", "_high"))
    assert 0.93 <= np.mean((low <= values.mean()) & (values.mean() <= high))
    assert 0.85 < np.mean(high - low) / (2 * 1.96 * np.std(values)) < 1.35


def test_draws_keep_the_classes_and_the_pairs():
    y = np.array([False, True, True, False] * 6)
    names = [str(i // 2) for i in range(24)]
    free = separation.design(y, [None] * 24, bootstrap=50, permutations=50)
    paired = separation.design(y, names, bootstrap=50, permutations=50)
    assert (free.paired, paired.paired) == (False, True)
    for plan in (free, paired):
        assert (plan.bootstrap[:, y].sum(axis=1) == 12).all() and (plan.bootstrap[:, ~y].sum(axis=1) == 12).all()
        assert (plan.permuted.sum(axis=1) == 12).all() and len(np.unique(plan.permuted, axis=0)) > 45
    assert (paired.bootstrap[:, 0::2] == paired.bootstrap[:, 1::2]).all(), "partners come together"
    assert (paired.permuted[:, 0::2] != paired.permuted[:, 1::2]).all(), "one of each pair is unsafe"
    again = separation.design(y, names, bootstrap=50, permutations=50)
    assert (again.bootstrap == paired.bootstrap).all() and (again.permuted == paired.permuted).all()
    half = [*names[:-1], None]
    assert not separation.design(y, half, bootstrap=2, permutations=2).paired, "one prompt has no partner"
    assert not separation.design(y, ["0"] * 24, bootstrap=2, permutations=2).paired, "a name stands twice in a class"


def test_the_reference_survives_a_file(tmp_path):
    y = labels(40, 40)
    fixed = fix(planted(1.0), y, key="abc")
    fixed.save(tmp_path / "a.npz")
    fixed.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    read = separation.Reference.load(tmp_path / "a.npz", "abc")
    for name in ("center", "scale", "chance", "gram"):
        assert (getattr(read, name) == getattr(fixed, name)).all()
    with pytest.raises(EvaluationError, match="other prompts, layers or settings; run `dvc"):
        separation.Reference.load(tmp_path / "a.npz", "abd")
    with pytest.raises(EvaluationError, match="no such file; run `dvc repro measure_base`"):
        separation.Reference.load(tmp_path / "c.npz", "abc")
    for damage in ((tmp_path / "a.npz").read_bytes()[:-200], b"", b"no archive"):
        (tmp_path / "b.npz").write_bytes(damage)
        with pytest.raises(EvaluationError, match="damaged"):
            separation.Reference.load(tmp_path / "b.npz", "abc")


def test_states_that_cannot_be_used_are_refused():
    y, states = labels(40, 40), planted(1.0)
    fixed = fix(states, y)
    broken = states.copy()
    broken[0, 0, 0] = np.nan
    with pytest.raises(EvaluationError, match="NaN or infinity"):
        fix(broken, y)
    unknown = measured(broken, y, reference=fixed)
    for figures in (unknown.overall, *unknown.layers):
        assert set(figures) == set(separation.METRICS) and np.isnan(list(figures.values())).all()
    with pytest.raises(EvaluationError, match=r"shape \(2, 80, 12\).*got \(2, 80, 11\)"):
        measured(states[..., :11], y, reference=fixed)
    for still in (np.ones((2, 80, 12)), states * (np.arange(12) == 0)):
        with pytest.raises(EvaluationError, match="differ between prompts"):
            fix(still, y)


# The difference between an arm and the base


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
    noise, y = RNG(5), labels(N, N)
    results = []
    for seed in range(SAMPLES):
        base, arm = sample(noise, **kind)
        plan = separation.design(y, [str(i % N) for i in range(2 * N)], bootstrap=200, permutations=200, seed=seed)
        reference = separation.fix_reference(base, plan)
        overall = separation.measure(arm, plan, reference, is_base=False).overall
        of_base = separation.measure(base, plan, reference, is_base=True).overall
        raw = overall["alignment_index"] - of_base["alignment_index"]
        results.append({**{k.removeprefix("delta_alignment_"): v for k, v in overall.items()}, "raw": raw})
    return {name: np.array([row[name] for row in results]) for name in results[0]}


@pytest.mark.parametrize(
    ("likeness", "changed", "apart", "own"),
    [(0.6, 0.3, 0.0, 0.0), (0.9, 0.5, 0.0, 0.0), (0.6, 0.0, 0.5, 0.3), (0.6, 0.0, 2.0, 0.3)],
)
def test_without_an_effect_none_is_claimed(likeness, changed, apart, own):
    """Partners less alike than in the base; classes apart in both models, and equally far."""
    results = simulated(likeness=likeness, changed=changed, apart=apart, own=own)
    value, raw = results["index"], results["raw"]
    assert np.mean(results["p_value"] <= 0.05) <= 0.06
    assert np.mean((results["index_low"] > 0) | (results["index_high"] < 0)) <= 0.07
    assert abs(value.mean()) < 3.5 * value.std() / np.sqrt(SAMPLES), "centred on zero"
    if not apart:
        assert raw.mean() > 3 * raw.std() / np.sqrt(SAMPLES), "the raw difference is not"
        outside = (value < results["null_low"]) | (value > results["null_high"])
        assert 0.01 <= np.mean(outside) <= 0.1, "the null is that of the labels"


@pytest.mark.parametrize(("apart", "further"), [(0.5, 0.4), (0.7, -0.4)])
def test_an_effect_is_found_in_either_direction(apart, further):
    results = simulated(likeness=0.6, changed=0.3, apart=apart, further=further)
    value = results["index"]
    assert np.mean((results["p_value"] <= 0.05) & (np.sign(value) == np.sign(further))) > 0.8
    covered = (results["index_low"] <= value.mean()) & (value.mean() <= results["index_high"])
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
    y = labels(N, N)
    base, arm = sample(RNG(0), likeness=0.5, changed=0.1, apart=1.0)
    plan = separation.design(y, [None] * (2 * N), bootstrap=20, permutations=20)
    reference = separation.fix_reference(base, plan)
    results = separation.measure(np.ones_like(arm), plan, reference, is_base=False).overall
    assert np.isnan([v for k, v in results.items() if "alignment" in k]).all() and "delta_alignment_p_value" in results
    assert set(results) == set(separation.METRICS)


def test_the_difference_to_the_base_is_paired():
    y, base = labels(40, 40), planted(1.0)
    fixed = fix(base, y)
    itself = measured(base, y, reference=fixed).overall
    zeros = [itself[f"delta_alignment_index{end}"] for end in ("", "_low", "_high")]
    assert zeros == pytest.approx([0, 0, 0], abs=1e-9)
    arm = base + 0.1 * RNG(5).normal(size=base.shape)
    arm[:, 40:, 0] += 0.2
    results = measured(arm, y, reference=fixed).overall
    assert itself["delta_alignment_p_value"] == 1.0
    above = [f["alignment_index"] - f["alignment_null_mean"] for f in (results, itself)]
    assert results["delta_alignment_index"] == pytest.approx(above[0] - above[1], rel=1e-9)
    width = results["delta_alignment_index_high"] - results["delta_alignment_index_low"]
    assert width < 0.5 * (results["alignment_index_high"] - results["alignment_index_low"])
    assert results["delta_alignment_index_low"] > 0
    assert "delta_alignment_index" not in measured(base, y).overall
