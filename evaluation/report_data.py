"""A comparison as JSON and CSV, for other programs."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

from db.values import plain
from evaluation.all_tasks import TaskRow
from evaluation.arms import ArmRow
from evaluation.comparison import Comparison
from evaluation.criteria import NAMES, for_arm
from evaluation.differences import BASE, Difference
from evaluation.primary import Primary
from evaluation.report_tasks import task_record


def _intervals(primary: Primary) -> dict[str, str]:
    """Column -> the row's interval."""
    return {
        primary.key: "accuracy_interval",
        "retention": "retention_interval",
        "retention_share": "retention_share_interval",
        "delta_speed": "delta_speed_interval",
    }


def as_json(comparison: Comparison) -> str:
    """Return everything as JSON; NaN and infinities are words, since JSON has no such numbers.

    Each element of a list stands on a line of its own: there may be thousands of runs.
    """
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_fields).encode
    parts = []
    for name, value in vars(comparison).items():
        if name == "runs" and value:
            # All at once, which is quicker by far. No text holds the sequence, since its quotation marks are escaped,
            # and no part of a run is a list of mappings.
            lines = "    " + encode(value)[1:-1].replace('}, {"', '},\n    {"')
        else:
            lines = ",\n".join(f"    {encode(element)}" for element in value) if isinstance(value, tuple) else ""
        text = f"[\n{lines}\n  ]" if lines else encode(value)
        parts.append(f'  "{name}": {text}')
    return "{\n" + ",\n".join(parts) + "\n}"


_BY_KEY = ("metrics", "ranges")
"""Of an arm: mappings from (split, name), which is no key in JSON."""


def _fields(record: Any) -> dict[str, Any]:
    """One dataclass as a mapping; the encoder comes back for those inside it."""
    if isinstance(record, TaskRow):
        return plain(task_record(record))
    found = {name: value for name, value in vars(record).items() if name not in _BY_KEY}
    for name, value in found.items():
        if value.__class__ in (float, dict, tuple) and _unfit(value):
            found[name] = plain(value)
    if isinstance(record, ArmRow):
        for name in _BY_KEY:
            by_key = getattr(record, name)
            found[name] = plain({f"{split}/{metric}": value for (split, metric), value in by_key.items()})
    return found


def _unfit(value: object) -> bool:
    """Whether it is or holds a number that JSON does not have; of thousands of values few are."""
    if isinstance(value, float):
        return not math.isfinite(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return any(isinstance(part, float) and not math.isfinite(part) for part in parts)


def as_csv(comparison: Comparison) -> str:
    """Return one line for each arm, with bounds, p-values and the outcome of every criterion in their own columns.

    Columns with `lead` are about the arm in `baseline`, the other differences about the base. What the primary metric's
    columns are called is told in `evaluation.primary`.
    """
    records = [_record(comparison, row) for row in comparison.rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(records[0]) if records else ["model_name"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def _record(comparison: Comparison, row: ArmRow) -> dict[str, object]:
    base, primary = row.arm == BASE, comparison.primary
    record: dict[str, object] = {
        "model_name": row.model_name,
        "arm": row.arm,
        "seeds": len(row.seeds),
        f"{primary.key}_percent": row.accuracy,
        **_difference(row.against(BASE), primary.delta_key, 0.0 if base else None),
        "retention_percent": row.retention,
        "decode_tokens_per_second": row.decode_speed,
        "delta_speed_percent": row.delta_speed,
        "parity_percent": row.parity,
        "retention_share_percent": row.retention_share,
    }
    for name, attribute in _intervals(primary).items():
        bounds = getattr(row, attribute)
        record |= {f"{name}_low": bounds.low if bounds else None, f"{name}_high": bounds.high if bounds else None}
    record["baseline"] = comparison.baseline
    lead = _difference(row.against(comparison.baseline), "lead", None)
    record |= {key if key.startswith("lead") else f"lead_{key}": value for key, value in lead.items()}
    for name in NAMES:
        found = for_arm(comparison.criteria, row.arm, name)
        record[f"criterion_{name.replace(' ', '_')}"] = found.outcome if found else None
    return record | {"task": primary.task, "primary_metric": primary.metric, "updates": row.updates}


def _difference(difference: Difference | None, stem: str, missing: float | None) -> dict[str, object]:
    columns = (
        f"{stem}_points", f"{stem}_low", f"{stem}_high", "items", "p_value", "p_holm", "verdict", "level",
        "items_only_low", "items_only_high", "gained", "lost",
    )  # fmt: skip
    if difference is None:
        return dict(zip(columns, (missing, *[None] * (len(columns) - 1)), strict=True))
    points, alone = difference.points, difference.items_only
    values = (
        points.estimate, points.low, points.high, difference.items, difference.p_value, difference.p_holm,
        difference.verdict, difference.level, alone.low, alone.high, difference.gained, difference.lost,
    )  # fmt: skip
    return dict(zip(columns, values, strict=True))
