"""Chapter: what was trained, with which settings, and what that cost."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from db.runs import BASE
from evaluation.report.arms import TEST, ArmRow
from evaluation.report.blocks import Block, Cell, Chart, Dataset, Details, Panel, Section, Table, Text
from evaluation.report.comparison import Comparison
from evaluation.report.criteria import KEPT_THRESHOLD
from evaluation.report.text import duration, interval, number, significant

SECONDS = "train_seconds"
_COSTS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "saved_parameters": ("Parameters", lambda n: f"{n:,.0f}"),
    "seconds_a_step": ("s per step", lambda n: significant(n, 3)),
    SECONDS: ("Training", duration),
    "peak_memory_bytes": ("Memory, MB", lambda n: f"{n / 1e6:,.0f}"),
    "gpu_memory_bytes": ("GPU memory, MB", lambda n: f"{n / 1e6:,.0f}"),
    "training_loss": ("Last training loss", lambda n: significant(n, 4)),
    "inversions": ("Inversions", lambda n: f"{n:,.0f}"),
}
"""Name of a cost in `ArmRow.costs`, or of a metric of split train → title, and how it is written."""


def cost(row: ArmRow, comparison: Comparison, name: str) -> Cell:
    """A cost, mean over seeds, and how many times the baseline's it is."""

    def of(arm: ArmRow) -> float | None:
        return arm.costs.get(name, arm.metrics.get(("train", name)))

    baseline, value = next((of(arm) for arm in comparison.rows if arm.arm == comparison.baseline), None), of(row)
    ratio = f"{significant(value / baseline, 3)}×" if value and baseline and value != baseline else ""
    return Cell("–" if value is None else _COSTS[name][1](value), hint=ratio)


def training(comparison: Comparison) -> Section | None:
    settings = {run.arm: run.settings for run in comparison.runs if run.arm != BASE}
    if not settings:
        return None
    note = (
        "Times include evaluations and checkpoints, and runs may have shared the machine; benchmarks/ compares costs "
        "one at a time. Memory is the peak of the process; GPU memory is the peak of what torch had allocated there. "
        "Parameters are those of the saved adapter, whose ranks may have shrunk."
    )
    blocks: list[Block] = [_arms(comparison, settings), Text(note, "note")]
    if any(settings.values()):
        flat = {arm: dict(_flat(train)) for arm, train in settings.items()}
        names = dict.fromkeys(name for values in flat.values() for name in values)
        lines = [(name, *(_value(values.get(name)) for values in flat.values())) for name in names]
        table = Table("Training settings of each arm", ("Setting", *flat), lines)
        blocks.append(Details("Every setting", (table,)))
    return Section("What was trained, and what it cost", tuple(blocks))


def _arms(comparison: Comparison, settings: Mapping[str, Mapping[str, Any]]) -> Table:
    headers = ("Arm", "r, α", "Rate", "Batch × steps", *(title for title, _ in _COSTS.values()),
               "Decoding, tokens/s")  # fmt: skip
    lines = []
    for row in comparison.trained:
        train, speed = settings[row.arm], row.delta_speed_interval
        batch = (train.get("batch_size") or 0) * (train.get("gradient_accumulation") or 1)
        faster = interval(speed, sign=True, unit="%") if speed else f"{number(row.delta_speed, sign=True)}%"
        lines.append((
            Cell(row.arm, arm=row.arm, hint=", ".join(filter(None, (method(train), row.preserve)))),
            Cell(", ".join(_value(train[name]) for name in ("rank", "alpha") if name in train) or "–"),
            Cell(_value(train.get("learning_rate"))),
            Cell(" × ".join(f"{count:,.0f}" for count in (batch, row.costs.get("steps")) if count) or "–"),
            *(cost(row, comparison, name) for name in _COSTS),
            Cell(number(row.decode_speed), hint="" if row.delta_speed is None else f"{faster} vs. base"),
        ))  # fmt: skip
    measured = [at for at in range(len(headers)) if any(line[at].text != "–" for line in lines)]
    caption = f"Settings and costs: means over seeds; × is relative to {comparison.baseline}"
    return Table(caption, [headers[at] for at in measured], [[line[at] for at in measured] for line in lines])


def method(train: Mapping[str, Any]) -> str:
    """What was trained by which optimizer, in a few words, from section train of the arm."""
    if "adapter" in train:
        return "trained elsewhere"
    peft, parts = train.get("peft") or {}, []
    if isinstance(peft, Mapping):
        parts.append(str(peft.get("peft_type") or ("DoRA" if peft.get("use_dora") else "LoRA")))
        start = peft.get("init_lora_weights")
        parts.append(start if isinstance(start, str) and start != "gaussian" else "")
    else:
        parts.append(str(peft))
    parts.append(f"start {train['start']}" if train.get("start") else "")
    parts.append(f"GRIT {train['grit']['mode']}" if (train.get("grit") or {}).get("mode") else "")
    parts.append("GRIT-VLM" if train.get("natural_gradient") else "")
    return ", ".join(filter(None, (*parts, str(train.get("optimizer", "")).replace("adamw_torch", "AdamW"))))


def _value(setting: Any) -> str:
    return "–" if setting is None else f"{setting:g}" if isinstance(setting, float) else str(setting)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def learned_and_kept(comparison: Comparison) -> Panel | None:
    """What was learned against what was kept."""
    primary = (TEST, comparison.primary.metric)
    data = Dataset(("kind", "arm", "seed", "front", "low", "x", "high", "below", "y", "above"))
    for row in comparison.rows:
        learned, kept = row.accuracy_interval, row.retention_kept
        if learned is None or kept is None or row.accuracy is None or row.arm not in comparison.pareto:
            continue
        front = "dominated" if comparison.pareto[row.arm] else "front"
        bounds = (learned.low, row.accuracy, learned.high, kept.low, kept.estimate, kept.high)
        data.add("mean", row.arm, "", front, *bounds)
        for run in row.runs if len(row.seeds) > 1 else ():
            x, y = run.metrics.get(primary, math.nan), row.retention_kept_by_seed.get(run.seed)
            if y is not None and math.isfinite(x):
                data.add("seed", row.arm, str(run.seed), front, None, 100 * x, None, None, y, None)
    if not data.rows:
        return None
    options = {"x_title": f"{comparison.primary.title}, %", "y_title": "retention, % of the base's",
               "marks": {"the base": 100.0, "the criterion": KEPT_THRESHOLD}}  # fmt: skip
    note = (
        "Means over seeds with 95% intervals; small points are single seeds. The Pareto front is filled and joined: "
        "arms that no other arm equals or exceeds in both. It goes by the means, so where intervals overlap, another "
        "run may have another front."
    )
    chart = Chart("place-kept", "What was learned, what was kept", "scatter", options)
    return Panel("places", data, (chart,), note=note)
