"""What `python -m pipelines.plan` says of the tiny profile, held against what its training processes really take.

Every arm trains for 30 steps in a process of its own, evaluation, probe and checkpoints included, on the 480 longest of
its 6000 items: the peak of a whole run is that of a batch with the longest item. The base has the tiny shape and random
weights, on whose values memory does not depend. Resident size of the process and memory in tensors (torch's allocator)
are measured in different runs, since the profiler needs memory itself. Run as `python -m benchmarks.plan`.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._harness import write
from pipelines.config import for_text, parse_params
from pipelines.plan import plan_of
from pipelines.planning import overhead
from pipelines.planning.lengths import general_questions, generated_items
from pipelines.planning.plan import Plan
from pipelines.planning.verdicts import MARGIN
from pipelines.profile import compose, load_text
from pipelines.schema import Params
from trainers.data import encode_prompt
from trainers.embedded_base import build_model, tokenizer_texts, train_tokenizer

REPEATS, STEPS = 3, 30
ALLOWED = 0.2
"""Largest relative difference of plan and measurement."""


def write_base(params: Params, folder: Path) -> Any:
    """An untrained base of the profile's shape with the tokenizer it would have; returns the tokenizer."""
    section = params.prepare_base
    tokenizer = train_tokenizer(tokenizer_texts(general_questions(params)), section.vocab_size, folder)
    build_model(section, tokenizer).to(torch.float16).save_pretrained(folder)
    return tokenizer


def job_of(params: Params, arm: str, base: Path, tokenizer: Any) -> dict[str, Any]:
    """What a run is given: the longest items, and evaluation, samples and checkpoints within its few steps."""
    pairs, settings = generated_items(params), params.train_for(arm)
    few = {"max_steps": STEPS, "eval_steps": STEPS // 2, "save_steps": STEPS // 2, "probe_every": 10}
    longest = sorted(pairs["train"], key=lambda pair: -len(encode_prompt(tokenizer, "".join(pair))))
    return {
        "base": str(base),
        "settings": settings.model_copy(update=few).model_dump(mode="json"),
        "train": longest[: STEPS * settings.batch_size],
        "valid": pairs["valid"],
    }


def peak_of(code: str, given: Path, *, tensors: bool) -> int:
    """Bytes of one run."""
    out = given.with_name("peak.json")
    command = [sys.executable, "-m", "benchmarks._plan_run", "--code", code, "--given", str(given), "--out", str(out)]
    subprocess.run([*command, *(["--tensors"] if tensors else [])], check=True, capture_output=True)
    return int(json.loads(out.read_text(encoding="utf-8"))["peak"])


def measure(params: Params, plan: Plan, arm: str, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """One arm: measured and planned, with the spread over the repeats."""
    given, code = folder / f"{arm}.json", params.code_of(arm)
    given.write_text(json.dumps(job_of(params, arm, folder / "base", tokenizer)), encoding="utf-8")
    process = overhead.measured(code, params.train_for(arm))
    resident = [peak_of(code, given, tensors=False) for _ in range(REPEATS)]
    planned_tensors = plan.memories[arm].peak
    tensors = peak_of(code, given, tensors=True)
    ratios = [(process + planned_tensors) / size for size in resident]
    row = {
        "arm": arm,
        "resident_bytes": resident,
        "planned_process_bytes": process,
        "tensor_bytes": tensors,
        "planned_tensor_bytes": planned_tensors,
        "resident_planned_over_measured": statistics.median(ratios),
        "resident_low": min(ratios),
        "resident_high": max(ratios),
        "tensors_planned_over_measured": planned_tensors / tensors,
    }
    print(row, flush=True)  # minutes pass between two of them
    return row


def main() -> None:
    """Measure and write the result; exit code 1 where the plan is off by more than a fifth."""
    params = for_text(parse_params(load_text(compose("tiny")), "profile tiny"), "the plan")
    plan = plan_of(params, on_gpu=False, measure=False)
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "base").mkdir()
        tokenizer = write_base(params, folder / "base")
        rows = [measure(params, plan, arm, folder, tokenizer) for arm in params.matrix.arms]
    table = Table(
        "arm", "resident MB", "planned MB", "planned / measured [min, max]", "tensors MB", "planned / measured",
        title="Peak memory of training, tiny profile",
    )  # fmt: skip
    for row in rows:
        planned = row["planned_process_bytes"] + row["planned_tensor_bytes"]
        spread = f"{row['resident_planned_over_measured']:.3f} [{row['resident_low']:.3f}, {row['resident_high']:.3f}]"
        table.add_row(
            row["arm"], f"{statistics.median(row['resident_bytes']) / 1e6:.0f}", f"{planned / 1e6:.0f}", spread,
            f"{row['tensor_bytes'] / 1e6:.1f}", f"{row['tensors_planned_over_measured']:.3f}",
        )  # fmt: skip
    Console().print(table)
    write("plan", "Plan of the tiny profile against measured peaks", rows=rows, tokens=vars(plan.case.lengths))
    off = [
        row["arm"]
        for row in rows
        if any(
            abs(row[name] - 1) > ALLOWED for name in ("resident_low", "resident_high", "tensors_planned_over_measured")
        )
    ]
    if off:
        raise SystemExit(f"the plan is off by more than {ALLOWED:.0%}: {', '.join(off)}")
    # What the verdict "fits" promises.
    low = [row["arm"] for row in rows if min(row["resident_low"], row["tensors_planned_over_measured"]) * MARGIN < 1]
    if low:
        raise SystemExit(f"{MARGIN} times the plan is below what was measured: {', '.join(low)}")


if __name__ == "__main__":
    main()
