"""Every line that the verdict draws, on ledgers made by hand; files that are no ledger; words and JSON."""

import json

import pytest

from probes import Evidence, Thresholds, Twin, judge
from probes.diagnoses import OF_A_CLAIM, OF_ANY
from probes.ledger import Probe
from probes.step import EVENTS

LAYERS, SAMPLES = 4, 20


def entry(**changes):
    """One layer's numbers at one sample: a preconditioner at work on one tensor."""
    values = {
        "size": 100,
        "norm_raw": 1.0,
        "norm_door": 1.0,
        "norm_inner": 1.0,
        "norm_weights": 1.0,
        "norm_delta": 0.01,
        "norm_shadow": 0.01,
        "angle_raw_inner": 30.0,
        "angle_raw_inner_w": 30.0,
        "angle": 20.0,
        "angle_w": 20.0,
        "lr_ratio": 1.0,
        "cos_raw_inner": 0.87,
        "cos_raw_step": 0.5,
        "zero_share": 0.0,
    }
    return {**values, **changes}


def called(**changes):
    """The same where calls are watched."""
    hashes = {"hash_before_w": "1", "hash_after_w": "2", "hash_inner_w": "2"}
    told = {"norm_after": 1.0, "angle_call": 30.0, "angle_call_w": 30.0, "zero_share_call": 0.0}
    return entry(**{"times_changed": 1, "late_gradients": False, **hashes, **told, **changes})


def reading(**changes):
    values = {"ready": True, "samples": 1000.0, "samples_gained": 40.0, "refresh_every": 10, "factor_norm_a": 1.0}
    matrix = {"anisotropy_a": 0.5, "damping_share_a": 0.01, "empty_a": False}
    return {**values, **matrix, "source": "hooks", **changes}


def ledger(make=entry, claims=True, watched=False, events=None, every=10, losses=None, passes=1, records=SAMPLES):
    """A ledger; make(sample, layer) or make() gives the entries."""

    def one(sample, layer):
        try:
            return make(sample, layer)
        except TypeError:
            return make()

    tokens = {"all": 48.0, "attended": 40.0, "labelled": 36.0}
    found = [
        {
            "step": every * i,
            "loss": 2.0 if losses is None else losses[i],
            "lr": 1e-2,
            "eps": 1e-8,
            "passes": passes,
            "calls": 1,
            "nested": False,
            "tokens": tokens,
            "units": {f"layer.{n}": one(i, n) for n in range(LAYERS)},
        }
        for i in range(records)
    ]
    counts = {**dict.fromkeys(EVENTS, 0), "steps": every * records}
    if watched:
        counts["calls"] = every * records
    return Evidence(found, {**counts, **(events or {})}, claims, watched)


def names(evidence):
    return [finding.name for finding in judge(evidence).findings]


def steps(share):
    return round(share * 10 * SAMPLES)


# A run in which all is well


def test_ledgers_made_by_hand_are_clean():
    for evidence in (
        ledger(),
        ledger(called, watched=True),
        ledger(lambda i, n: called(reading=reading(hash=f"{i}")), watched=True),
        ledger(claims=False),
    ):
        verdict = judge(evidence)
        assert (verdict.verdict, verdict.diagnosis, verdict.findings) == ("effective", "none", [])
        assert verdict.as_claimed and verdict.numbers["coverage"] == 1.0


# Lines


@pytest.mark.parametrize(
    ("angle", "verdict", "diagnosis"), [(1.01, "effective", "none"), (1.0, "no_effect", "equals_shadow")]
)
def test_min_angle(angle, verdict, diagnosis):
    found = judge(ledger(lambda: entry(angle=angle, angle_w=angle), claims=False))
    assert (found.verdict, found.diagnosis) == (verdict, diagnosis)
    claimed = judge(ledger(lambda: entry(angle=angle, angle_w=angle)))
    assert claimed.verdict == verdict and claimed.diagnosis == ("none" if verdict == "effective" else "unexplained")
    weights = judge(ledger(lambda: entry(angle=0.1, angle_weights=angle), claims=False))
    assert weights.verdict == verdict  # whichever says more


@pytest.mark.parametrize(("angle", "diagnosis"), [(0.51, "none"), (0.5, "scalar_preconditioner")])
def test_min_gradient_angle(angle, diagnosis):
    make = lambda: called(angle_raw_inner_w=angle, angle_call_w=angle)  # noqa: E731
    assert judge(ledger(make, watched=True)).diagnosis == diagnosis


@pytest.mark.parametrize(
    ("reached", "verdict", "diagnosis"),
    [(4, "effective", "none"), (3, "unstable", "modules_missing"), (0, "no_effect", "unexplained")],
)
def test_coverage_of_a_claim(reached, verdict, diagnosis):
    found = judge(ledger(lambda i, n: entry(angle=20.0 if n < reached else 0.0, angle_w=20.0 if n < reached else 0.0)))
    assert (found.verdict, found.diagnosis) == (verdict, diagnosis)
    if diagnosis == "modules_missing":
        assert found.findings[0].numbers["left_out"] == ["layer.3.w"] and "layer.3.w" in found.reason


def test_coverage_at_its_edges():
    def of(reached, **thresholds):
        evidence = ledger(lambda i, n: entry(angle=20.0 * (n < reached), angle_w=20.0 * (n < reached)))
        return judge(evidence, Thresholds(**thresholds))

    assert of(3, min_coverage=0.75).verdict == "effective" and of(3, min_coverage=0.76).verdict == "unstable"
    assert of(1, max_missing=0.25).verdict == "no_effect" and of(1, max_missing=0.24).verdict == "unstable"


@pytest.mark.parametrize(
    ("event", "diagnosis"),
    [
        ("inner_called_directly", "wrapper_bypassed"),
        ("gradients_changed_after_step", "preconditioned_after_step"),
        ("nonfinite_gradients", "not_finite"),
    ],
)
def test_often(event, diagnosis):
    assert names(ledger(events={event: steps(0.1)}, watched=False)) == []
    assert names(ledger(events={event: steps(0.1) + 1}, watched=False)) == [diagnosis]


def test_calls_after_the_step_outnumber_those_before():
    evidence = {"calls": 100, "calls_after_step": 100}
    assert names(ledger(called, watched=True, events=evidence)) == []
    assert names(ledger(called, watched=True, events={**evidence, "calls_after_step": 101})) == [
        "preconditioned_after_step"
    ]


def test_never_called_needs_a_watch():
    nothing = lambda: entry(angle_raw_inner_w=0.0)  # noqa: E731
    assert names(ledger(nothing, watched=True, events={"calls": 0})) == ["never_called"]
    assert "never_called" not in names(ledger(nothing, watched=False, events={"calls": 0}))
    assert "never_called" not in names(ledger(called, watched=True, events={"calls": 1}))


@pytest.mark.parametrize(
    ("key", "value", "diagnosis"),
    [("times_changed", 2, "applied_repeatedly"), ("late_gradients", True, "gradient_recomputed")],
)
def test_in_more_than_a_tenth_of_the_samples(key, value, diagnosis):
    def with_share(bad):
        judged = range(SAMPLES // 10, SAMPLES)
        return ledger(lambda i, n: called(**({key: value} if i in judged[:bad] else {})), watched=True)

    assert names(with_share(1)) == [] and names(with_share(2)) == [diagnosis]


def test_restored_in_more_than_half():
    back = {"hash_inner_w": "1"}
    judged = list(range(2, SAMPLES))
    assert names(ledger(lambda i, n: called(**(back if i in judged[:9] else {})), watched=True)) == []
    assert names(ledger(lambda i, n: called(**(back if i in judged[:10] else {})), watched=True)) == [
        "gradient_restored"
    ]
    turned = ledger(lambda i, n: called(angle_raw_inner=0.29), watched=True)  # 1 % of what the call turned it by
    assert names(turned) == ["gradient_restored"]
    assert names(ledger(lambda i, n: called(angle_raw_inner=0.31), watched=True)) == []


def with_reading(every=10, **changes):
    return ledger(lambda i, n: called(reading=reading(**{"hash": f"{i}", **changes})), watched=True, every=every)


def test_statistics_that_saw_nothing_and_factors_that_are_zero():
    assert names(with_reading(ready=False, samples=0.0))[0] == "no_statistics"
    assert names(with_reading(ready=False, samples=1.0))[0] == "nothing_changed"
    assert names(with_reading(factor_norm_a=0.0)) == ["zero_factors"]
    assert names(with_reading(factor_norm_a=1e-12)) == []
    assert names(with_reading(factor_norm_a=0.0, samples=0.0)) == []
    half = ledger(lambda i, n: called(reading=reading(hash=f"{i}", factor_norm_a=float(n % 2))), watched=True)
    assert names(half) == []


def test_empty_inverses():
    def share(of):
        return ledger(lambda i, n: called(reading=reading(hash=f"{i}", empty_a=i < of)), watched=True)

    assert names(share(2)) == [] and names(share(3)) == ["empty_inverse"]


def test_lost_gradients():
    assert names(ledger(lambda: entry(zero_share=0.2))) == []
    assert names(ledger(lambda: entry(zero_share=0.21))) == ["nan_to_zero"]
    assert names(ledger(lambda: called(zero_share_call=0.21), watched=True)) == ["nan_to_zero"]
    one = ledger(lambda i, n: entry(zero_share=1.0 if (i, n) == (10, 0) else 0.0))  # 1 of 72 samples
    two = ledger(lambda i, n: entry(zero_share=1.0 if i == 10 and n < 2 else 0.0))
    assert names(one) == [] and names(two) == ["nan_to_zero"]


def test_clipped_to_nothing():
    def of(kept, norm):
        return ledger(lambda: called(norm_after=norm / kept, norm_inner=norm), watched=True)

    # 100 entries: a length of 1e-6 is 1e-7 an entry, ten times Adam's ε.
    assert names(of(0.009, 0.99e-6)) == ["clipped_to_nothing"]
    assert names(of(0.011, 0.99e-6)) == [] and names(of(0.009, 1.01e-6)) == []
    still = ledger(lambda: called(norm_after=1.0, norm_inner=1e-3, norm_delta=0.99e-7), watched=True)
    moves = ledger(lambda: called(norm_after=1.0, norm_inner=1e-3, norm_delta=1.01e-7), watched=True)
    assert names(still) == ["clipped_to_nothing"] and names(moves) == []


def test_damping_that_swamps():
    def of(share, anisotropy, angle=0.0):
        said = {"damping_share_a": share, "anisotropy_a": anisotropy}
        return ledger(lambda i, n: entry(angle_raw_inner_w=angle, reading=reading(hash=f"{i}", **said)))

    assert names(of(10.1, 0.0099))[0] == "damping_swamps_factors"
    assert "damping_swamps_factors" not in names(of(10.0, 0.0099)) + names(of(10.1, 0.01))
    assert names(of(10.1, 0.0099, angle=30.0)) == []  # it reaches everything all the same


def test_a_scalar_is_told_from_readings_or_from_calls():
    def of(anisotropy):
        said = reading(anisotropy_a=anisotropy)
        return ledger(lambda i, n: entry(angle_raw_inner_w=0.1, reading={**said, "hash": f"{i}"}))

    assert names(of(0.0099)) == ["scalar_preconditioner"] and names(of(0.01)) == ["unexplained"]
    untouched = ledger(lambda: called(times_changed=0, angle_call_w=0.0, angle_raw_inner_w=0.0), watched=True)
    assert names(untouched) == ["nothing_changed"]


@pytest.mark.parametrize(
    ("gained", "passes", "expected"),
    [
        (40.0, 1, []),
        (40.8, 1, []),
        (41.0, 1, ["samples_overcounted"]),
        (48.0, 1, ["padding_counted"]),
        (47.1, 1, ["padding_counted"]),
        (160.0, 4, ["accumulation_overcounted"]),
        (192.0, 4, ["accumulation_overcounted"]),
        (160.0, 1, ["samples_overcounted"]),
        (36.0, 1, []),
        (0.0, 1, []),
    ],
)
def test_tokens_counted(gained, passes, expected):
    make = lambda i, n: called(reading=reading(hash=f"{i}", samples_gained=gained))  # noqa: E731
    assert names(ledger(make, watched=True, passes=passes)) == expected


@pytest.mark.parametrize(("told", "span"), [(10, 30), (None, 100), (3, 9)])
def test_stale(told, span):
    """`span` steps with the same matrices, then others."""

    def of(same):
        def make(i, n):
            return called(reading=reading(hash="old" if i <= same else f"{i}", refresh_every=told))

        return ledger(make, watched=True, every=1, records=150)

    assert names(of(span)) == ["stale_factors"] and names(of(span - 1)) == []


def test_a_loss_that_rises():
    def of(rise):
        return ledger(claims=False, losses=[2.0] * 16 + [2.0 * (1 + rise)] * 4)

    assert judge(of(0.25)).verdict == "effective"
    verdict = judge(of(0.26))
    assert (verdict.verdict, verdict.diagnosis, verdict.as_claimed) == ("unstable", "diverging", False)
    assert names(ledger(claims=False, losses=[2.0] * 16 + [2.0, 9.0, 9.0, 9.0])) == [], "one batch as easy as before"
    assert names(ledger(claims=False, records=5, losses=[1.0, 1.1, 2.0, 2.0, 2.0])) == [], "too few samples"
    assert names(ledger(claims=False, events={"nonfinite_losses": SAMPLES})) == ["not_finite"]
    assert names(ledger(claims=False, events={"nonfinite_losses": SAMPLES // 20})) == [], "one bad batch is no trend"
    assert names(ledger(claims=False, losses=[None] * SAMPLES)) == []


def test_a_twin_whose_curves_stay_together():
    same = Twin([1.0, 2.0], [1.1, 2.0], [1.1, 2.1], perturbed=True)
    apart = Twin([1.0, 2.0], [1.1, 2.0], [5.0, 6.0], perturbed=True)
    # A noisy machine has a high floor: the loss curve alone decides nothing against the ledger, it adds to it.
    assert judge(ledger(), twin=same).verdict == "effective"
    assert judge(ledger(), twin=apart).verdict == "effective"
    assert judge(ledger(), twin=apart).numbers["divergence"] == apart.ratio
    assert judge(ledger(claims=False), twin=same).verdict == "effective"  # who claims nothing need not part


def test_nothing_sampled():
    verdict = judge(ledger(records=0))
    assert (verdict.verdict, verdict.diagnosis) == ("no_effect", "no_samples") and "0 optimizer steps" in verdict.reason


def test_who_claims_nothing_is_not_asked_about_preconditioning():
    assert names(ledger(claims=False, events={"inner_called_directly": 200})) == []
    assert len(set(OF_A_CLAIM) | set(OF_ANY)) == len(OF_A_CLAIM) + len(OF_ANY)


# Files


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def lines_of(evidence):
    last = {"events": evidence.events, "claims": evidence.claims, "watched": evidence.watched}
    return [*evidence.records, last]


def test_a_file_is_read_back(tmp_path):
    evidence = ledger(called, watched=True)
    read = Evidence.read(write(tmp_path / "l", *lines_of(evidence)), Thresholds(min_angle=3))
    assert read.records == evidence.records and read.watched and read.thresholds.min_angle == 3
    assert judge(read, Thresholds()).to_json() == judge(evidence).to_json()


@pytest.mark.parametrize(
    "rubbish", ["", "{", "[1]", "3", "null", '"text"', '{"step": 1, "units": 3}', '{"step": 1}', "\x00\x01"]
)
def test_rubbish_is_refused_with_its_line(rubbish, tmp_path):
    first, *_, last = lines_of(ledger())
    with pytest.raises(ValueError, match="line 2: expected a record of a probe"):
        Evidence.read(write(tmp_path / "l", first, rubbish, last))


def test_a_file_that_was_cut(tmp_path):
    lines = lines_of(ledger())
    with pytest.raises(ValueError, match="the run did not end"):
        Evidence.read(write(tmp_path / "l", *lines[:-1]))
    with pytest.raises(ValueError, match="the run did not end"):
        Evidence.read(write(tmp_path / "l"))
    with pytest.raises(ValueError, match=f"line {len(lines)}: expected a record"):
        Evidence.read(write(tmp_path / "l", *lines[:-1], json.dumps(lines[-1])[:20]))
    with pytest.raises(ValueError, match="line 1: expected a record"):
        Evidence.read(write(tmp_path / "l", {"events": {"steps": 1}}))
    with pytest.raises(OSError):
        Evidence.read(tmp_path / "not there")


# Words


def test_the_table():
    text = judge(ledger(lambda i, n: called(reading=reading(hash=f"{i}")), watched=True)).table()
    assert text.startswith("verdict    effective\ndiagnosis  none: updates are 20.0° off plain AdamW's")
    assert "1.00 times as long, in 100% of the tensors" in text
    rows = {line.split(maxsplit=1)[1]: line.split()[0] for line in text.splitlines()[2:]}
    assert rows["degrees between the real update and plain AdamW's"] == "20"
    assert rows["damping over the mean eigenvalue"] == "0.01" and "twin" not in text
    nothing = judge(ledger(lambda: entry(angle=0.0), claims=False)).table()
    assert "no_effect" in nothing and "equals_shadow: this is plain AdamW" in nothing


def test_json_there_and_back():
    for evidence in (ledger(), ledger(lambda: entry(angle=None, angle_w=None)), ledger(records=0)):
        said = judge(evidence).to_json()
        assert json.loads(json.dumps(said, allow_nan=False)) == said
        assert {"verdict", "diagnosis", "reason", "claims", "numbers", "findings", "layers"} == said.keys()


def test_an_empty_probe_gives_evidence():
    from torch import nn, optim

    model = nn.Linear(2, 2)
    evidence = Evidence.of(Probe(model, optim.SGD(model.parameters(), lr=0.1)))
    assert evidence.coverage == 0.0 and evidence.judged == [] and judge(evidence).diagnosis == "no_samples"
