"""Stage probe: verdicts/<arm>/<seed>/, whether the optimizer did what the arm says."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from db.files import FileError, exclusive, finish_run, hash_inputs, read_json, staged, start_run, write_record
from db.records import VerdictRecord
from pipelines import train, twin
from pipelines.params import ADAPTER, Probe
from pipelines.stage import VerdictError, adapter_dir, command, verdict_dir
from pipelines.train import load_arm
from probes import Evidence, Thresholds, Twin, Verdict, judge
from probes.twin import DIVERGES
from trainers import BASELINE
from trainers.run import LEDGER, STEP_LOSSES
from trainers.theirs import WEIGHTS, moved


class Params(train.Params):
    probe: Probe


DEGREES, RATIO, SHARE, COSINE = "degrees", "ratio", "share", "cosine"
UNITS = "1 effective, 0 no_effect, -1 unstable"


def twins(params: Params, arm: str, seed: int, warmup: int) -> Twin:
    """Loss curves of baseline, baseline again and arm over the run's first steps, all with the arm's settings.

    The second baseline starts off by one rounding: on a CPU it would be equal to the bit.
    """
    steps = params.probe.twin_steps + warmup  # a twin ends where the real run would
    own = [float(loss) for loss in read_json(adapter_dir(arm, seed) / STEP_LOSSES)[:steps]]
    known = [own] if params.code_of(arm) == BASELINE else []
    baseline, again = known + twin.curves(params, arm, seed, len(own), (False, True)[len(known) :])
    return Twin(baseline, again, own, perturbed=True)


def readings(verdict: Verdict, evidence: Evidence, pair: Twin) -> list[dict[str, Any]]:
    """The verdict as rows for the database: what was judged against which threshold, and what stands beside it."""
    t = evidence.thresholds
    rows: list[dict[str, Any]] = []

    def add(name: str, value: float | None, unit: str, layer: str = "", step: int = -1, **judged: Any) -> None:
        if value is not None:
            row = {"name": name, "layer": layer, "step": step, "value": value, "unit": unit, "threshold": None}
            rows.append({**row, "verdict": "skipped", "diagnosis": "", **judged})

    meaning = {"effective": 1.0, "no_effect": 0.0, "unstable": -1.0}
    told = f"{verdict.verdict}: {verdict.diagnosis}: {verdict.reason}"
    add("verdict", meaning[verdict.verdict], UNITS, verdict="pass" if verdict.as_claimed else "fail", diagnosis=told)
    n = verdict.numbers
    reached = [(n["angle_to_shadow"] or 0.0) > t.min_angle, (n["coverage"] or 0.0) >= t.min_coverage, pair.diverges]
    if not verdict.claims:  # of plain AdamW the opposite is right
        reached = [not r for r in reached]
    # What is not as expected counts against a claim only; the loss curve alone decides nothing, its floor may be high.
    wrong = ("fail", "fail", "inconclusive") if verdict.claims else ("skipped",) * 3
    for name, value, unit, threshold, right, otherwise in (
        ("angle_to_shadow", n["angle_to_shadow"], DEGREES, t.min_angle, reached[0], wrong[0]),
        ("coverage", n["coverage"], SHARE, t.min_coverage, reached[1], wrong[1]),
        ("twin_divergence", pair.ratio, "A/A floors", DIVERGES, reached[2], wrong[2]),
    ):
        add(name, value, unit, threshold=threshold, verdict="pass" if right else otherwise)
    for name, unit in (
        ("angle_weights", DEGREES), ("lr_ratio", RATIO), ("cos_raw_preconditioned", COSINE), ("cos_raw_step", COSINE),
        ("anisotropy", SHARE), ("basis_rotation", SHARE), ("weight_spread", SHARE), ("damping_share", RATIO),
        ("ready_share", SHARE), ("samples", "tokens"),
    ):  # fmt: skip
        add(name, n.get(name), unit)
    for layer, entries in verdict.layers.items():
        add("layer_angle", entries["angle"], DEGREES, layer)
        add("layer_lr_ratio", entries["lr_ratio"], RATIO, layer)
    for record in evidence.records:
        for layer, numbers in record["units"].items():
            add("layer_angle", numbers.get("angle"), DEGREES, layer, record["step"])
            add("layer_cos_raw_inner", numbers.get("cos_raw_inner"), COSINE, layer, record["step"])
    return rows


def not_watched(params: Params, arm: str, seed: int, theirs: Path) -> None:
    """What can still be said of an adapter that was trained elsewhere: whether it changes anything."""
    file, out = adapter_dir(arm, seed) / WEIGHTS, verdict_dir(arm, seed)
    share = moved(file.parent)
    word, diagnosis, reason = "not_watched", "trained_elsewhere", f"no optimizer of {theirs} was watched"
    if params.arms[arm][ADAPTER] == str(theirs) and len(params.matrix.seeds) > 1:
        reason += ", and it is the same adapter with every seed"
    if not share:
        word, diagnosis, reason = "no_effect", "no_update", f"every update of {theirs} is zero: this is the base"
    with staged(out) as folder:
        record = start_run("probe", params={}, inputs=hash_inputs(file), arm=arm, seed=seed)
        row = {"layer": "", "step": -1, "threshold": None, "diagnosis": "", "verdict": "skipped" if share else "fail"}
        told = {"name": "verdict", "value": math.nan, "unit": UNITS, "diagnosis": f"{word}: {diagnosis}: {reason}"}
        rows = [{**row, **told}, {**row, "name": "moved", "value": share, "unit": SHARE}]
        said = {"schema": 1, "arm": arm, "seed": seed, "as_claimed": None if share else False, "verdict": word}
        said |= {"diagnosis": diagnosis, "reason": reason, "readings": rows}
        write_record(folder / "verdict.json", VerdictRecord.of(said))
        record.extra = {"verdict": word, "diagnosis": diagnosis, "numbers": {"moved": share}}
        finish_run(record, folder)
    print(f"verdict    {word}\ndiagnosis  {diagnosis}: {reason}")
    if not share:
        raise VerdictError(f"{arm}: {reason}. Evidence: {out / 'verdict.json'}")


def run(params: Params, arm_name: str, seed: int) -> Verdict | None:
    """Reach a verdict on one trained arm and write it down, whatever it is; None: it was trained elsewhere."""
    if theirs := params.adapter_of(arm_name, seed):
        not_watched(params, arm_name, seed, theirs)
        return None
    from probes import plots

    arm, settings, out = load_arm(arm_name, params), params.train_for(arm_name), verdict_dir(arm_name, seed)
    ledger = adapter_dir(arm_name, seed) / LEDGER
    limits = Thresholds(min_angle=params.probe.min_angle, min_coverage=params.probe.min_coverage)
    shown = {"probe": params.probe.model_dump()}
    lock = Path(f"checkpoints/verdicts/{arm_name}-{seed}.lock")
    with exclusive(lock, f"probe {arm_name} seed {seed}"), staged(out) as folder:
        inputs = hash_inputs(ledger, ledger.with_name(WEIGHTS))
        record = start_run("probe", params=shown, inputs=inputs, arm=arm_name, seed=seed)
        try:
            evidence = Evidence.read(ledger, limits)
        except (OSError, ValueError) as error:
            raise FileError(f"{ledger}: expected the ledger of a finished training: {error}; run stage train") from None
        pair = twins(params, arm_name, seed, settings.method_warmup_steps)
        verdict = judge(evidence, twin=pair)
        said = {
            "schema": 1,
            "arm": arm_name,
            "seed": seed,
            "as_claimed": verdict.as_claimed,
            **verdict.to_json(),
            "twin": {**asdict(pair), "floor": pair.floor, "divergence": pair.divergence, "ratio": pair.ratio},
            "readings": readings(verdict, evidence, pair),
        }
        write_record(folder / "verdict.json", VerdictRecord.of(said))
        title = f"{arm.title}: {verdict.verdict}"
        if evidence.records:
            known = "" if verdict.diagnosis == "none" else f" ({verdict.diagnosis})"
            plots.plot_ledger(evidence, folder / "updates.png", title + known)
        plots.plot_twin(pair, folder / "twin.png", arm.title)
        record.extra = {"verdict": verdict.verdict, "diagnosis": verdict.diagnosis, "numbers": verdict.numbers}
        finish_run(record, folder)
    print(verdict.table())
    if not verdict.as_claimed:
        claim = "claims to precondition" if verdict.claims else "claims nothing"
        raise VerdictError(
            f"{arm_name} {claim}, but the verdict on its updates is {verdict.verdict}: {verdict.diagnosis}: "
            f"{verdict.reason}. Evidence: {out / 'verdict.json'}"
        )
    return verdict


if __name__ == "__main__":
    command("probe", Params, run)
