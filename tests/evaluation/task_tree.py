"""Builds results of several tasks, one after the other in the same folders, as changing the profile does."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from db.ingest import ingest
from tests.db.result_tree import edit, make_arm, make_quantized, make_tree, sha, write_lines

GSM8K = {"name": "gsm8k", "title": "GSM8K exact match", "primary": "gsm8k_exact_match"}
ALPACA = {"name": "alpaca", "title": "ROUGE-L", "primary": "alpaca_rouge_l"}
ITEMS = 60
ARMS = ("baseline_lora", "pure_grit")


def credits_of(arm: str, seed: int, shift: float, *, binary: bool = False) -> list[float]:
    """Credit of each item: the same items are hard for all arms; some are 0, some are 1, most lie between."""
    items = random.Random("items")
    own = random.Random(f"{arm} {seed}")
    found = []
    for _ in range(ITEMS):
        number = items.gauss(0.35, 0.3) + own.gauss(shift, 0.08)
        found.append(float(number > 0.5) if binary else round(min(1.0, max(0.0, number)), 6))
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def change_inputs(place: Path, **inputs: str) -> None:
    run = json.loads((place / "run.json").read_text(encoding="utf-8"))
    edit(place / "run.json", inputs=run["inputs"] | inputs)


def add_task_arm(root: Path, task: Mapping[str, str], arm: str, seed: int, credit: Sequence[float], *,
                 day: int = 22, base: str = "", rate: float = 0.001) -> None:  # fmt: skip
    """One arm of a task; evaluated on that day of November, trained from that base with that learning rate."""
    make_arm(root, arm, seed, correct=[value == 1 for value in credit])
    if base:
        change_inputs(root / "gguf" / arm / str(seed), **{"models/base/base.json": sha(base)})
    if arm != "base":
        params = {"train": {"learning_rate": rate, "steps": 100}}
        edit(root / "adapters" / arm / str(seed) / "run.json", params=params)
    place = root / "scores" / arm / str(seed)
    items = sha(f"{task['name']} items")
    scores: dict[str, Any] = json.loads((place / "scores.json").read_text(encoding="utf-8"))
    primary = {"name": task["primary"], "split": "test", "value": sum(credit) / len(credit), "n": len(credit)}
    unread = {"name": f"{task['name']}_unparseable", "split": "test", "value": 0.1 + seed / 20, "n": len(credit)}
    others = [metric for metric in scores["metrics"] if metric["split"] != "test"]
    meanings = {key: value for key, value in scores["metric_defs"].items() if not key.startswith("aqi_")}
    meanings[task["primary"]] = {"unit": "share", "direction": "higher", "description": "mean credit"}
    meanings[unread["name"]] = {"unit": "share", "direction": "lower", "description": "nothing could be read"}
    metrics = [primary, unread, *others]
    edit(place / "scores.json", task=dict(task), test_items_sha256=items, metrics=metrics, metric_defs=meanings)
    change_inputs(place, **{"data/test.jsonl": items})
    edit(place / "run.json", started=f"2026-11-{day}T03:00:00+00:00", ended=f"2026-11-{day}T03:30:00+00:00")
    lines = [
        {**line, "item_id": f"{task['name']}-{i:06d}", "task": task["name"], "credit": value, "predicted": None,
         "abs_error": None, "answer": f"answer {i} of {arm}", "prompt": f"question {i}", "truth": f"truth {i}"}
        for i, (line, value) in enumerate(zip(read_lines(place / "samples.jsonl"), credit, strict=True))
    ]  # fmt: skip
    write_lines(place / "samples.jsonl", lines)


def add_task(root: Path, task: Mapping[str, str], *, seeds: Sequence[int] = (0,), binary: bool = False,
             day: int = 22, base: str = "") -> None:  # fmt: skip
    """Base and two arms, of which the second is better than the first."""
    add_task_arm(root, task, "base", 0, credits_of("base", 0, 0.0, binary=binary), day=day, base=base)
    for arm, shift in zip(ARMS, (0.05, 0.2), strict=True):
        for seed in seeds:
            add_task_arm(root, task, arm, seed, credits_of(arm, seed, shift, binary=binary), day=day, base=base)


def add_precisions(root: Path, task: Mapping[str, str], arm: str, rows: Mapping[str, Sequence[float]]) -> None:
    """What stage quantize leaves of a task with credit."""
    right = {kind: [value == 1 for value in credit] for kind, credit in rows.items()}
    make_quantized(root, arm, rows={kind: (found, 1.0 if kind == "f16" else 0.9) for kind, found in right.items()})
    place = root / "quantized" / arm / "0"
    items = sha(f"{task['name']} items")
    change_inputs(place, **{"data/test.jsonl": items})
    table = json.loads((place / "quantized.json").read_text(encoding="utf-8"))["rows"]
    edit(place / "quantized.json", rows=[row | {"credit": sum(rows[row["type"]]) / ITEMS} for row in table])
    lines, flat = read_lines(place / "quantized_samples.jsonl"), [v for credit in rows.values() for v in credit]
    named = [{**line, "item_id": line["item_id"].replace("aqi", task["name"])} for line in lines]
    credited = [{**line, "credit": value} for line, value in zip(named, flat, strict=True)]
    write_lines(place / "quantized_samples.jsonl", credited)


def clear(root: Path) -> None:
    """Remove what the stages left, as their next run does."""
    for place in root.iterdir():
        if place.name not in ("outputs", "runs"):
            shutil.rmtree(place)


def make_three_tasks(root: Path) -> None:
    """AQI and GSM8K with two seeds, which are in the database alone; Alpaca, with credit between 0 and 1, on disk."""
    make_tree(root)
    ingest(root, root / "outputs/centralized.db")
    clear(root)
    add_task(root, GSM8K, seeds=(0, 1), binary=True, day=22)
    ingest(root, root / "outputs/centralized.db")
    clear(root)
    add_task(root, ALPACA, day=23)
    rows = {kind: credits_of("pure_grit", 0, shift) for kind, shift in (("f16", 0.2), ("q4_K_M", 0.17))}
    add_precisions(root, ALPACA, "pure_grit", rows)
