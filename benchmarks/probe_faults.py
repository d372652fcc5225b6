"""The probe on the fault catalogue, on clean runs and on third-party optimizers: `make probe-faults`.

Exit code 1 if a fault is missed (its verdict is `effective`, or its first diagnosis is not the expected one), or if a
clean run, ours or of a third-party optimizer, raises a false alarm.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks._harness import command, show, write
from probes import Verdict
from tests.probes.catalogue import CLEAN, FAULTS, SETTINGS, Clean
from tests.probes.foreign import FOREIGN, installed, version

KEPT = ("coverage", "angle_to_shadow", "angle_lowest", "lr_ratio", "cos_raw_preconditioned", "damping_share")


def row(name: str, setting: str, expected: str, verdict: Verdict, right: bool) -> dict[str, Any]:
    """One run as plain values."""
    return {
        "name": name,
        "setting": setting,
        "expected": expected,
        "diagnosis": verdict.diagnosis,
        "verdict": verdict.verdict,
        "right": right,
        "findings": [finding.name for finding in verdict.findings],
        "numbers": {key: verdict.numbers[key] for key in KEPT},
        "reason": verdict.reason,
    }


def run_faults() -> list[dict[str, Any]]:
    """A row for each fault and setting."""
    rows = []
    jobs = [(fault, label, setting) for fault in FAULTS for label, setting in SETTINGS.items()]
    for fault, label, setting in track(jobs, "faults", console=Console(stderr=True)):
        verdict = fault.run(setting)
        right = verdict.verdict != "effective" and verdict.diagnosis == fault.expected
        rows.append(row(fault.name, label, fault.expected, verdict, right))
    return rows


def run_clean(runs: Sequence[Clean], what: str) -> list[dict[str, Any]]:
    """A row for each clean run."""
    rows = []
    for clean in track(runs, what, console=Console(stderr=True)):
        verdict = clean.run()
        diagnosis = "none" if clean.expected == "effective" else "equals_shadow"
        right = (verdict.verdict, verdict.diagnosis) == (clean.expected, diagnosis)
        rows.append(row(clean.name, "", diagnosis, verdict, right))
    return rows


def number(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda entry: "" if entry["numbers"][key] is None else f"{entry['numbers'][key]:.3g}"


COLUMNS: dict[str, Callable[[Any], object]] = {
    "": lambda entry: "✓" if entry["right"] else "✗",
    "run": lambda entry: f"{entry['name']} ({entry['setting']})" if entry["setting"] else entry["name"],
    "expected": itemgetter("expected"),
    "diagnosis": itemgetter("diagnosis"),
    "verdict": itemgetter("verdict"),
    "coverage": number("coverage"),
    "angle °": number("angle_to_shadow"),
    "length": number("lr_ratio"),
}


def main() -> int:
    """Run the catalogue."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    faults, clean = run_faults(), run_clean(CLEAN, "clean runs")
    known = [run for run in FOREIGN if installed(run)]
    foreign = [{**row, "version": version(run)} for run, row in zip(known, run_clean(known, "foreign"), strict=True)]
    show("Faults", COLUMNS, faults, width=160)
    show("Clean runs (length: of the real update over plain AdamW's)", COLUMNS, clean, width=160)
    show("Third-party optimizers", COLUMNS, foreign, width=160)
    diagnosed = sum(entry["right"] for entry in faults)
    false_alarms = sum(not entry["right"] for entry in clean)
    misjudged = sum(not entry["right"] for entry in foreign)
    effective = [entry["numbers"]["angle_lowest"] for entry in clean if entry["expected"] == "none"]
    same = [entry["numbers"]["angle_to_shadow"] for entry in clean if entry["expected"] == "equals_shadow"]
    lowest, highest = min(effective), max(same)
    print(f"{diagnosed} of {len(faults)} faults diagnosed, {false_alarms} false alarms in {len(clean)} clean runs")
    print(f"{len(foreign) - misjudged} of {len(foreign)} runs of third-party optimizers judged correctly")
    print(f"smallest angle of any layer of an effective run {lowest:.1f}°, largest of plain AdamW {highest:.1e}°")
    write(
        "probe_faults",
        "The probe on the fault catalogue",
        faults=len(faults),
        kinds_of_fault=len(FAULTS),
        diagnosed=diagnosed,
        clean_runs=len(clean),
        false_alarms=false_alarms,
        lowest_effective_angle=lowest,
        highest_plain_angle=highest,
        fault_rows=faults,
        clean_rows=clean,
        foreign_optimizers=foreign,
    )
    return 0 if diagnosed == len(faults) and not false_alarms + misjudged else 1


if __name__ == "__main__":
    command(main)
