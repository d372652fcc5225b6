"""Stage probe: verdicts/<arm>/<seed>/, whether the optimizer did what the arm claims."""

import math
from pathlib import Path
from typing import Any

from db.errors import FileError
from db.files import exclusive, finish_run, hash_inputs, staged, start_run, write_record
from db.records import VerdictRecord
from pipelines.params import ADAPTER, PipelineError, Probe, StageParams, check_arm
from pipelines.stage import adapter_dir, command, verdict_dir
from probes import Evidence, Thresholds, Verdict, judge
from trainers.run import LEDGER
from trainers.theirs import WEIGHTS, moved

DEGREES, RATIO, SHARE, COSINE = "degrees", "ratio", "share", "cosine"
UNITS = "1 effective, 0 no_effect, -1 unstable"


class Params(StageParams):
    probe: Probe


def reading(
    name: str, value: float, unit: str, judged: str = "skipped", *, threshold: float | None = None, diagnosis: str = ""
) -> dict[str, Any]:
    """A row for the database, over all layers and steps."""
    row = {"name": name, "layer": "", "step": -1, "value": value, "unit": unit}
    return {**row, "threshold": threshold, "verdict": judged, "diagnosis": diagnosis}


def readings(verdict: Verdict, limits: Thresholds) -> list[dict[str, Any]]:
    """What was judged, against which threshold, and further measurements; the ledger has those of each layer."""
    numbers = verdict.numbers
    angle, coverage = numbers["angle_to_shadow"] or 0.0, numbers["coverage"] or 0.0
    # Only a claim can fail. A run that claims nothing is right if no threshold is reached.
    thresholds = {
        "angle_to_shadow": (DEGREES, limits.min_angle, angle > limits.min_angle),
        "coverage": (SHARE, limits.min_coverage, coverage >= limits.min_coverage),
    }
    value = {"effective": 1.0, "no_effect": 0.0, "unstable": -1.0}[verdict.verdict]
    text = f"{verdict.verdict}: {verdict.diagnosis}: {verdict.reason}"
    rows = [reading("verdict", value, UNITS, "pass" if verdict.as_claimed else "fail", diagnosis=text)]
    for name, (unit, threshold, reached) in thresholds.items():
        if (number := numbers[name]) is not None:
            judged = "pass" if reached == verdict.claims else "fail" if verdict.claims else "skipped"
            rows.append(reading(name, number, unit, judged, threshold=threshold))
    units = {
        "angle_weights": DEGREES, "lr_ratio": RATIO, "cos_raw_preconditioned": COSINE, "cos_raw_step": COSINE,
        "anisotropy": SHARE, "basis_rotation": SHARE, "weight_spread": SHARE, "damping_share": RATIO,
        "ready_share": SHARE, "samples": "tokens",
    }  # fmt: skip
    return rows + [reading(n, number, unit) for n, unit in units.items() if (number := numbers.get(n)) is not None]


def judge_foreign(params: Params, arm: str, seed: int, source: Path) -> None:
    """The verdict on an adapter that was trained elsewhere: only whether it changes anything."""
    file, out = adapter_dir(arm, seed) / WEIGHTS, verdict_dir(arm, seed)
    share = moved(file.parent)
    word, diagnosis, reason = "not_watched", "trained_elsewhere", f"no optimizer of {source} was watched"
    if params.arms[arm][ADAPTER] == str(source) and len(params.matrix.seeds) > 1:
        reason += ", and it is the same adapter with every seed"
    if not share:
        word, diagnosis, reason = "no_effect", "no_update", f"every update of {source} is zero: this is the base"
    with staged(out) as folder:
        record = start_run("probe", params={}, inputs=hash_inputs(file), arm=arm, seed=seed)
        text, judged = f"{word}: {diagnosis}: {reason}", "skipped" if share else "fail"
        rows = [reading("verdict", math.nan, UNITS, judged, diagnosis=text), reading("moved", share, SHARE, judged)]
        content = {"schema": 1, "arm": arm, "seed": seed, "as_claimed": None if share else False, "verdict": word}
        content |= {"diagnosis": diagnosis, "reason": reason, "readings": rows}
        write_record(folder / "verdict.json", VerdictRecord.of(content))
        record.extra = {"verdict": word, "diagnosis": diagnosis, "numbers": {"moved": share}}
        finish_run(record, folder)
    print(f"verdict    {word}\ndiagnosis  {diagnosis}: {reason}")
    if not share:
        raise PipelineError(f"{arm}: {reason}. Evidence: {out / 'verdict.json'}")


def run(params: Params, arm_name: str, seed: int) -> Verdict | None:
    """Write down the verdict on one trained arm, then raise PipelineError if it contradicts the arm's claim.

    Returns None for an arm that was trained elsewhere.
    """
    check_arm(arm_name, params)
    if source := params.adapter_of(arm_name, seed):
        judge_foreign(params, arm_name, seed, source)
        return None
    out = verdict_dir(arm_name, seed)
    ledger = adapter_dir(arm_name, seed) / LEDGER
    limits = Thresholds(min_angle=params.probe.min_angle, min_coverage=params.probe.min_coverage)
    used = {"probe": params.probe.model_dump()}
    lock = Path(f"checkpoints/verdicts/{arm_name}-{seed}.lock")
    with exclusive(lock, f"probe {arm_name} seed {seed}"), staged(out) as folder:
        inputs = hash_inputs(ledger, ledger.with_name(WEIGHTS))
        record = start_run("probe", params=used, inputs=inputs, arm=arm_name, seed=seed)
        try:
            evidence = Evidence.read(ledger, limits)
        except (OSError, ValueError) as error:
            raise FileError(f"{ledger}: expected the ledger of a finished training: {error}; run stage train") from None
        verdict = judge(evidence)
        content = {
            "schema": 1,
            "arm": arm_name,
            "seed": seed,
            "as_claimed": verdict.as_claimed,
            **verdict.to_json(),
            "readings": readings(verdict, limits),
        }
        write_record(folder / "verdict.json", VerdictRecord.of(content))
        record.extra = {"verdict": verdict.verdict, "diagnosis": verdict.diagnosis, "numbers": verdict.numbers}
        finish_run(record, folder)
    print(verdict.table())
    if not verdict.as_claimed:
        claim = "claims to precondition" if verdict.claims else "claims nothing"
        raise PipelineError(
            f"{arm_name} {claim}, but the verdict on its updates is {verdict.verdict}: {verdict.diagnosis}: "
            f"{verdict.reason}. Evidence: {out / 'verdict.json'}"
        )
    return verdict


if __name__ == "__main__":
    command("probe", Params, run)
