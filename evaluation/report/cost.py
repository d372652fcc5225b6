"""The section about what was trained, with which settings, and what that cost."""

import math
from collections.abc import Callable, Iterable, Mapping
from statistics import fmean
from typing import Any

from db.queries import BASE
from evaluation.report.arms import ArmRow
from evaluation.report.blocks import Block, Cell, Chart, Dataset, Details, Panel, Section, Table, Text
from evaluation.report.comparison import Comparison, Report
from evaluation.report.criteria import KEPT_THRESHOLD
from evaluation.report.text import duration, interval, number, significant

TITLE = "What was trained, and what it cost"
SECONDS = "train_seconds"
_COLUMNS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "saved_parameters": ("Parameters", lambda n: f"{n:,.0f}"),
    "seconds_a_step": ("s a step", lambda n: significant(n, 3)),
    SECONDS: ("Training", duration),
    "peak_memory_bytes": ("Memory, MB", lambda n: f"{n / 1e6:,.0f}"),
}
"""Name of a cost in `ArmRow.costs` → title, and how it is written."""


def cost(row: ArmRow, comparison: Comparison, name: str) -> Cell:
    """A cost, mean over seeds, and beside it how much that is of the baseline's."""
    baseline = next((one for one in comparison.rows if one.arm == comparison.baseline), None)
    own, other = row.costs.get(name), baseline.costs.get(name) if baseline else None
    ratio = f"{significant(own / other, 3)}×" if own and other and own != other else ""
    return Cell("–" if own is None else _COLUMNS[name][1](own), hint=ratio)


def training(report: Report) -> Section | None:
    settings = _settings(report)
    if not settings:
        return None
    blocks: list[Block] = [_arms(report.comparison, settings)]
    blocks.append(
        Text(
            "Times are those of the runs as they were, evaluations and checkpoints included, perhaps side by side "
            "with others; benchmarks/ compares costs in turn. Memory is the peak of the process: what a GPU holds is "
            "not in it. Parameters are those of the saved adapter, whose ranks may have shrunk.",
            "note",
        )
    )
    blocks += [panel] if (panel := _places(report)) else []
    if any(settings.values()):
        blocks.append(Details("Every setting", (_every_setting(settings),)))
    return Section(TITLE, tuple(blocks))


def _settings(report: Report) -> dict[str, Mapping[str, Any]]:
    return {run.arm: report.results.settings[run.id] for run in report.results.runs if run.arm != BASE}


def _arms(comparison: Comparison, settings: Mapping[str, Mapping[str, Any]]) -> Table:
    headers = ("Arm", "r, α", "Rate", "β₁, β₂", "Batch × steps", *(title for title, _ in _COLUMNS.values()),
               "Decode, tokens/s")  # fmt: skip
    lines = []
    for row in comparison.trained:
        own, steps = settings[row.arm], row.costs.get("steps")
        size = ", ".join(_told(own[name]) for name in ("rank", "alpha") if name in own)
        batch = (own.get("batch_size") or 0) * (own.get("gradient_accumulation") or 1)
        seen = " × ".join(f"{count:,.0f}" for count in (batch, steps) if count)
        hint = ", ".join(filter(None, (_method(own), row.preserve)))
        told = (size or "–", _told(own.get("learning_rate")), _betas(own), seen or "–")
        costs = (cost(row, comparison, name) for name in _COLUMNS)
        lines.append((Cell(row.arm, arm=row.arm, hint=hint), *map(Cell, told), *costs,
                      Cell(number(row.decode_speed), hint=_faster(row))))  # fmt: skip
    known = [at for at in range(len(headers)) if any(line[at].text != "–" for line in lines)]
    shown = [[line[at] for at in known] for line in lines]
    return Table(f"Means over seeds; ×: times {comparison.baseline}'s", [headers[at] for at in known], shown)


def _method(own: Mapping[str, Any]) -> str:
    """What was trained by which optimizer, in a few words, by section train of the arm."""
    if "adapter" in own:
        return "trained elsewhere"
    peft = own.get("peft") or {}
    if isinstance(peft, Mapping):
        start = peft.get("init_lora_weights")
        kind = peft.get("peft_type") or ("DoRA" if peft.get("use_dora") else "LoRA")
        ways = [str(kind), *([str(start)] if isinstance(start, str) and start != "gaussian" else [])]
    else:
        ways = [str(peft)]
    ways.append(f"start {own['start']}" if own.get("start") else "")
    ways.append(f"GRIT {own['grit']['mode']}" if (own.get("grit") or {}).get("mode") else "")
    ways.append("GRIT-VLM" if own.get("natural_gradient") else "")
    return ", ".join(filter(None, (*ways, str(own.get("optimizer", "")).replace("adamw_torch", "AdamW"))))


def _betas(own: Mapping[str, Any]) -> str:
    given = (own.get("optim_args") or {}).get("betas")
    if given is None:
        moments = str(own.get("optimizer", "")).startswith("adamw") and (own.get("grit") or {}).get("mode") != "sgd"
        return "0.9, 0.999" if moments else "–"
    return ", ".join(f"{beta:g}" for beta in given)


def _faster(row: ArmRow) -> str:
    found = row.delta_speed_interval
    if row.delta_speed is None:
        return ""
    return f"{interval(found, sign=True) if found else number(row.delta_speed, sign=True)} % of the base's"


def _told(value: Any) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _every_setting(settings: Mapping[str, Mapping[str, Any]]) -> Table:
    flat = {arm: dict(_flat(own)) for arm, own in settings.items()}
    names = dict.fromkeys(name for own in flat.values() for name in own)
    lines = [(name, *(_told(own.get(name)) for own in flat.values())) for name in names]
    return Table("Section train of each arm", ("Setting", *flat), lines)


def _flat(own: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in own.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _places(report: Report) -> Panel | None:
    """What was learnt against what was kept, and against what it cost."""
    comparison, results = report.comparison, report.results
    metric = ("test", comparison.primary.metric)
    data = Dataset(("chart", "kind", "arm", "seed", "front", "low", "x", "high", "below", "y", "above"))
    for row in comparison.rows:
        learnt, kept = row.accuracy_interval, row.retention_share_interval
        seconds = {run.seed: results.costs[run.id].get(SECONDS) for run in results.runs if run.arm == row.arm}
        spent = {seed: value / 60 for seed, value in seconds.items() if value}
        front = "dominated" if comparison.pareto.get(row.arm) else "front"
        places: dict[str, tuple[float | None, float | None, float | None, Mapping[int, float]]] = {}
        if kept and row.arm in comparison.pareto:
            places["kept"] = kept.low, row.retention_share, kept.high, row.kept_by_seed
        if spent:
            places["cost"] = min(spent.values()), fmean(spent.values()), max(spent.values()), spent
        if learnt is None or row.accuracy is None:
            continue
        for chart, (below, y, above, by_seed) in places.items():
            kind = front if chart == "kept" else "plain"
            data.add(chart, "mean", row.arm, "", kind, learnt.low, row.accuracy, learnt.high, below, y, above)
            for run in results.runs if len(row.seeds) > 1 else ():
                x = results.metrics.get(run.id, {}).get(metric, math.nan)
                if run.arm == row.arm and run.seed in by_seed and math.isfinite(x):
                    place = (100 * x, None, None, by_seed[run.seed], None)
                    data.add(chart, "seed", row.arm, str(run.seed), kind, None, *place)
    title = f"{comparison.primary.title}, %"
    pictures = {
        "kept": ("What was learnt, what was kept", "retention, % of the base's",
                 {"the base": 100.0, "the criterion": KEPT_THRESHOLD}),
        "cost": ("What was learnt, at what cost", "training time, minutes", {}),
    }  # fmt: skip
    notes = {
        "kept": "Of what was kept the Pareto front is filled and joined: arms that no other one equals or exceeds in "
        "both. It goes by the means: where intervals overlap, another run may have another front.",
        "cost": "Of time the shortest and the longest run are drawn.",
    }
    shown = data.levels("chart") if data.rows else []
    drawn = tuple(
        Chart(
            id=f"place-{name}",
            title=heading,
            label=f"{heading}: each arm with its interval; across {title}, up {up}",
            draw="places",
            options={"chart": name, "x_title": title, "y_title": up, "marks": marks},
            where={"chart": name},
        )
        for name, (heading, up, marks) in pictures.items()
        if name in shown
    )
    if not drawn:
        return None
    note = " ".join(
        ("Means over seeds with 95% intervals; small points are single seeds.", *(notes[name] for name in shown))
    )
    return Panel("places", data, drawn, tuple(data.levels("arm")), note=note, legend=False)
