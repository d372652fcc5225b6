"""Every fault of the catalogue is named, no clean run is blamed; every line that the verdict draws; files and words.

`make probe-faults` runs all seeds and rates.
"""

import json
import re
from functools import partial
from pathlib import Path

import pytest

import probes
from probes import Evidence, judge
from probes.evidence import Thresholds, median
from probes.faults import FIRST, OF_A_CLAIM, OF_ANY
from probes.probe import EVENTS
from probes.tally import COLUMNS, OFF, TURNED
from tests.probes.catalogue import CLEAN, FAULTS, SETTINGS

NOT_IN_THE_CATALOGUE = {"unexplained"}  # of ledgers made by hand, below
QUICK = {fault.expected: fault.name for fault in reversed(FAULTS)}.values()  # the first of each diagnosis


def cases(runs, quick):
    return [pytest.param(run, id=run.name, marks=() if run.name in quick else pytest.mark.full) for run in runs]


@pytest.mark.parametrize("fault", cases(FAULTS, QUICK))
def test_a_fault_is_named(fault):
    # Seeds and rates take turns, so that one pass over the catalogue sees them all.
    verdict = fault.run(list(SETTINGS.values())[FAULTS.index(fault) % len(SETTINGS)])
    assert verdict.diagnosis == fault.expected, verdict.table()
    assert verdict.verdict in ("no_effect", "unstable")
    assert verdict.findings[0].name == verdict.diagnosis and verdict.reason == verdict.findings[0].reason
    if fault.name.startswith("half of the modules"):
        left_out = verdict.findings[0].tensors
        assert {name.rpartition(".")[2] for name in left_out} == {"a", "b"}
        assert len(left_out) == 6 and all(".layers.1." in name for name in left_out)
        assert left_out[0] in verdict.reason


@pytest.mark.parametrize("clean", cases(CLEAN, [clean.name for clean in CLEAN[::7]]))
def test_a_clean_run_is_not_blamed(clean):
    verdict = clean.run()
    expected = "none" if clean.expected == "effective" else "equals_shadow"
    assert (verdict.verdict, verdict.diagnosis, verdict.findings) == (clean.expected, expected, []), verdict.table()
    lowest, highest = (verdict.numbers[f"angle_{end}"] for end in ("lowest", "highest"))
    assert lowest > 3 if clean.expected == "effective" else highest < 1e-3  # far from the line, which is at 1


def test_the_catalogue_is_what_it_says():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) and len({clean.name for clean in CLEAN}) == len(CLEAN)
    assert sum(clean.expected == "effective" for clean in CLEAN) >= 30
    # Every diagnosis has a fault that it was made for.
    sources = Path(probes.__file__).parent.glob("*.py")
    names = {name for source in sources for name in re.findall(r'Finding\(\s*"(\w+)"', source.read_text())}
    assert names - NOT_IN_THE_CATALOGUE == {fault.expected for fault in FAULTS} and len(names) > 20
    assert all(len(set(causes)) == len(causes) for causes in (FIRST, OF_A_CLAIM, OF_ANY))
    assert len(FAULTS) >= 100
    page = (Path(probes.__file__).parents[1] / "docs/probe.md").read_text(encoding="utf-8")
    assert not [name for name in names | {"none", "equals_shadow"} if f"`{name}`" not in page]


# Ledgers made by hand: the same everywhere, or make(sample, layer)

LAYERS, SAMPLES = 4, 20
JUDGED = range(SAMPLES // 10, SAMPLES)  # without the first tenth


def entry(**changes):
    lengths = dict.fromkeys(("norm_raw", "norm_inner", "norm_weights", "lr_ratio"), 1.0)
    angles = {"angle_raw_inner": 30.0, "angle": 20.0}
    moved = {"size": 100, "norm_delta": 0.01, "norm_shadow": 0.01, "zero_share": 0.0}
    return {**lengths, **angles, **moved, "cos_raw_inner": 0.87, "cos_raw_step": 0.5, **changes}


def called(**changes):
    """The same where calls are watched."""
    call = {"norm_after": 1.0, "angle_call": 30.0, "zero_share_call": 0.0, "restored": False}
    return entry(**{"times_changed": 1, "late_gradients": False, **call, **changes})


def reading(**changes):
    values = {"ready": True, "samples": 1000.0, "samples_gained": 40.0, "refresh_every": 10, "factor_norm_a": 1.0}
    matrix = {"anisotropy_a": 0.5, "damping_share_a": 0.01, "empty_a": False}
    return {**values, **matrix, "source": "hooks", **changes}


def ledger(make=None, claims=True, watched=False, events=None, every=10, losses=None, passes=1, records=SAMPLES):
    head = {"lr": 1e-2, "eps": 1e-8, "passes": passes, "calls": 1}
    head["tokens"] = {"all": 48.0, "attended": 40.0, "labelled": 36.0}
    make = make if callable(make) else lambda i, n, same=make: same or entry()
    found = [
        {
            **head,
            "step": every * i,
            "loss": 2.0 if losses is None else losses[i],
            "units": {f"layer.{n}": make(i, n) for n in range(LAYERS)},
        }
        for i in range(records)
    ]
    counts = {**dict.fromkeys(EVENTS, 0), "steps": every * records}
    if watched:
        counts["calls"] = every * records
    return Evidence(found, {**counts, **(events or {})}, claims, watched, tally_of(found, every))


def tally_of(records, every):
    """What would have been counted in a run that is everywhere as its samples are in the median."""
    steps, table = every * len(records), {}
    for unit in records[0]["units"] if records else ():
        row = dict.fromkeys(COLUMNS, 0.0) | {"steps": steps}
        for effect, key, line in (("turned", "angle_raw_inner", TURNED), ("off", "angle", OFF)):
            there = (median(r["units"][unit][key] for r in records) or 0.0) > line
            row |= {effect: steps * there, f"{effect}_since": steps * there, f"{effect}_last": steps - 1}
        table[f"{unit}.w"] = row
    return table


def names(evidence):
    return [finding.name for finding in judge(evidence).findings]


def often(event):
    return lambda count: ledger(events={event: count})


def calls(**changes):
    return ledger(called(**changes), watched=True)


def in_samples(**changes):
    """Of a count: called, with changes in so many of the judged samples."""
    return lambda n: ledger(lambda i, _: called(**(changes if i in JUDGED[:n] else {})), watched=True)


def with_reading(make=lambda i, n: {}, watched=True, passes=1, angle=30.0, **changes):
    """Matrices are refreshed for every sample; `make(sample, layer)` gives further readings."""

    def one(i, n):
        state = reading(**{"hash": f"{i}", **make(i, n), **changes})
        return called(reading=state) if watched else entry(angle_raw_inner=angle, reading=state)

    return ledger(one, watched=watched, passes=passes)


def lost(layers):
    return ledger(lambda i, n: entry(zero_share=1.0 if i == 10 and n < layers else 0.0))


def clipped(kept=0.009, norm=0.99e-6):
    return calls(norm_raw=norm / kept, norm_after=norm / kept, norm_inner=norm)


def counted(tokens, passes=1):
    return with_reading(samples_gained=tokens, passes=passes)


def swamped(share, anisotropy=0.0099, angle=0.0):
    return with_reading(watched=False, angle=angle, damping_share_a=share, anisotropy_a=anisotropy)


def refreshed(told):
    """Of a count: the same matrices for so many steps, then others."""

    def of(span):
        def make(i, n):
            return called(reading=reading(hash="old" if i <= span else f"{i}", refresh_every=told))

        return ledger(make, watched=True, every=1, records=150)

    return of


def test_ledgers_made_by_hand_are_clean():
    for evidence in (ledger(), calls(), with_reading(), ledger(claims=False)):
        verdict = judge(evidence)
        assert (verdict.verdict, verdict.diagnosis, verdict.findings) == ("effective", "none", [])
        assert verdict.as_claimed and verdict.numbers["coverage"] == 1.0


@pytest.mark.parametrize(("angle", "verdict"), [(1.01, "effective"), (1.0, "no_effect")])
def test_min_angle(angle, verdict):
    found = judge(ledger(entry(angle=angle), claims=False))
    assert (found.verdict, found.diagnosis) == (verdict, "none" if verdict == "effective" else "equals_shadow")
    claimed = judge(ledger(entry(angle=angle)))
    assert (claimed.verdict, claimed.diagnosis) == (verdict, "none" if verdict == "effective" else "gradient_not_used")
    weights = judge(ledger(entry(angle=0.1, angle_weights=angle), claims=False))
    assert weights.verdict == verdict  # whichever says more
    evidence = ledger(entry(angle=8 * angle), claims=False)  # of 8-bit moments, say
    evidence.thresholds = Thresholds(min_angle=8.0)
    assert judge(evidence).verdict == verdict, "a higher line holds for what is counted at every step too"


@pytest.mark.parametrize(
    ("reached", "verdict", "diagnosis"),
    [(4, "effective", "none"), (3, "unstable", "modules_missing"), (0, "no_effect", "gradient_not_used")],
)
def test_coverage_of_a_claim(reached, verdict, diagnosis):
    found = judge(ledger(lambda i, n: entry(angle=20.0 if n < reached else 0.0)))
    assert (found.verdict, found.diagnosis) == (verdict, diagnosis)
    if diagnosis == "modules_missing":
        assert found.findings[0].tensors == ["layer.3.w"] and "layer.3.w" in found.reason


NOTHING = entry(angle_raw_inner=0.0)
LINES = [  # a ledger of a value, and what is found on either side of a line
    (often("inner_called_directly"), {20: "", 21: "wrapper_bypassed"}),
    (often("gradients_changed_after_step"), {20: "", 21: "preconditioned_after_step"}),
    (often("nonfinite_gradients"), {20: "", 21: "not_finite"}),
    (lambda n: ledger(NOTHING if n == 0 else called(), watched=True, events={"calls": n}), {1: "", 0: "never_called"}),
    (lambda angle: calls(angle_raw_inner=angle, angle_call=angle), {0.11: "", 0.1: "scalar_preconditioner"}),
    (in_samples(times_changed=2), {1: "", 2: "applied_repeatedly"}),
    (in_samples(late_gradients=True), {1: "", 2: "gradient_recomputed"}),
    (in_samples(restored=True), {9: "", 10: "gradient_restored"}),
    (lambda angle: calls(angle_raw_inner=angle), {0.31: "", 0.29: "gradient_restored"}),  # 1 % of the call's
    (lambda norm: with_reading(factor_norm_a=norm), {1e-12: "", 0.0: "zero_factors"}),
    (lambda seen: with_reading(factor_norm_a=0.0, samples=seen), {0.0: "", 1.0: "zero_factors"}),
    (lambda n: with_reading(lambda i, layer: {"factor_norm_a": float(layer >= n)}), {2: "", 3: "zero_factors"}),
    (lambda n: with_reading(lambda i, _: {"empty_a": i < n}), {2: "", 3: "empty_inverse"}),
    (lambda share: ledger(entry(zero_share=share)), {0.2: "", 0.21: "nan_to_zero"}),
    (lambda share: calls(zero_share_call=share), {0.2: "", 0.21: "nan_to_zero"}),
    (lost, {1: "", 2: "nan_to_zero"}),  # of 72
    # 100 entries: a length of 1e-6 is 1e-7 an entry, ten times Adam's ε.
    (lambda kept: clipped(kept=kept), {0.011: "", 0.009: "clipped_to_nothing"}),
    (lambda norm: clipped(norm=norm), {1.01e-6: "", 0.99e-6: "clipped_to_nothing"}),
    (lambda moved: calls(norm_inner=1e-3, norm_delta=moved), {1.01e-7: "", 0.99e-7: "clipped_to_nothing"}),
    (lambda angle: swamped(10.1, angle=angle), {30.0: "", 0.09: "damping_swamps_factors scalar_preconditioner"}),
    (lambda spread: swamped(0.01, spread, angle=0.09), {0.01: "unexplained", 0.0099: "scalar_preconditioner"}),
    (
        lambda n: calls(times_changed=n, angle_call=30.0 * n, angle_raw_inner=30.0 * n),
        {1: "", 0: "nothing_changed"},
    ),
    (counted, {0.0: "", 36.0: "", 40.8: "", 41.0: "samples_overcounted", 160.0: "samples_overcounted"}),
    (counted, {47.0: "samples_overcounted", 47.1: "padding_counted", 48.0: "padding_counted"}),
    (partial(counted, passes=4), {160.0: "accumulation_overcounted", 192.0: "accumulation_overcounted"}),
    (refreshed(10), {29: "", 30: "stale_factors"}),
    (refreshed(3), {8: "", 9: "stale_factors"}),
    (refreshed(None), {99: "", 100: "stale_factors"}),
]


@pytest.mark.parametrize(("evidence", "expected"), LINES, ids=range(len(LINES)))
def test_lines(evidence, expected):
    assert {value: " ".join(names(evidence(value))) for value in expected} == expected


def test_the_most_telling_is_the_first():
    assert names(with_reading(ready=False, samples=0.0))[0] == "no_statistics"
    assert names(with_reading(ready=False, samples=1.0))[0] == "nothing_changed"
    assert "damping_swamps_factors" not in names(swamped(10.0)) + names(swamped(10.1, 0.01))
    assert "never_called" not in names(ledger(NOTHING, watched=False, events={"calls": 0}))
    assert names(ledger(claims=False, events={"inner_called_directly": 200})) == [], "who claims nothing is not asked"


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


def test_nothing_sampled():
    verdict = judge(ledger(records=0))
    assert (verdict.verdict, verdict.diagnosis) == ("no_effect", "no_samples") and "0 optimizer steps" in verdict.reason


# Files


def lines_of(evidence):
    last = {key: getattr(evidence, key) for key in ("events", "claims", "watched", "tally")}
    return [*evidence.records, last]


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_files_that_were_cut_or_hold_other_things(tmp_path):
    first, *others, last = lines_of(ledger())
    for lines, message in (
        *(([first, rubbish, last], "line 2: expected a record of a probe")
          for rubbish in ("", "{", "[1]", "null", '{"step": 1, "units": 3}', '{"step": 1}', "\x00\x01")),
        ([first, *others], "the run did not end"),
        ([], "the run did not end"),
        ([first, json.dumps(last)[:20]], "line 2: expected a record"),
        ([{"events": {"steps": 1}}], "line 1: expected a record"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Evidence.read(write(tmp_path / "l", *lines))
    with pytest.raises(OSError):
        Evidence.read(tmp_path / "not there")


# Words


def test_the_table():
    text = judge(with_reading()).table()
    assert text.startswith("verdict    effective\ndiagnosis  none: updates are 20.0° off plain AdamW's")
    assert "1.00 times as long, in 4 of 4 tensors, in 100% of the steps from step 0 to 199" in text
    rows = {line.split(maxsplit=1)[1]: line.split()[0] for line in text.splitlines()[2:]}
    assert rows["degrees between the real update and plain AdamW's"] == "20"
    assert rows["damping over the mean eigenvalue"] == "0.01"
    nothing = judge(ledger(entry(angle=0.0), claims=False)).table()
    assert "no_effect" in nothing
    assert "equals_shadow: updates are plain AdamW's of the raw gradients" in nothing
