"""Sections about what the arms kept and what they changed: retention, updates, Alignment Quality Index."""

from __future__ import annotations

import math

from evaluation.arms import RETENTION
from evaluation.differences import BASE
from evaluation.markdown import number
from evaluation.page import charts
from evaluation.page.blocks import Block, Cell, Chart, Panel, Section, Table, Text
from evaluation.page.context import Context, arm_cell, figures
from evaluation.primary import Primary

Axis = tuple[tuple[str, str], str, float]
"""(split, name), title with unit, factor."""
_KEPT: Axis = (RETENTION, "retention accuracy, %", 100)
_PERPLEXITY: Axis = (("general", "perplexity"), "perplexity", 1)
_NORM: Axis = (("weights", "update_norm"), "‖ΔW‖, Frobenius", 1)
_EFFECTIVE: Axis = (("weights", "effective_rank"), "effective rank of ΔW", 1)
_DRIFT: Axis = (("hidden", "drift_relative"), "drift of hidden states, ‖h − h₀‖ / ‖h₀‖", 1)
_ZERO_FOR_BASE = {_NORM[0], _DRIFT[0]}
"""The base has no update, so these are 0 by definition."""

_UPDATE_COLUMNS: dict[tuple[str, str], str] = {
    ("general", "perplexity"): "Perplexity",
    ("weights", "update_norm"): "‖ΔW‖",
    ("weights", "update_norm_relative"): "‖ΔW‖ / ‖W‖",
    ("weights", "effective_rank"): "Effective rank",
    ("weights", "stable_rank"): "Stable rank",
    ("weights", "rank"): "Rank",
    ("hidden", "drift_relative"): "Drift",
    ("hidden", "drift_cosine"): "1 − cosine",
}
_ROUNDS_TO_ZERO = 0.05
"""Points below which a change is written as 0.0, which says no more than no change."""
_NOT_OF_AIR = " The index has nothing to do with the Air Quality Index, which the arms learn to predict."
_OTHER_INDICES = {"silhouette": "Silhouette", "davies_bouldin": "Davies-Bouldin", "dunn": "Dunn"}


def retention(context: Context) -> Section | None:
    """What the arms kept of the base's abilities, and how far they moved for it."""
    blocks: list[Block] = [block for block in (_tasks(context), _updates(context)) if block]
    scatter = _scatters(context)
    if scatter:
        blocks.insert(0, scatter)
    if not blocks:
        return None
    lead = "Retention is the accuracy on general tasks that no arm was trained on."
    if any(_PERPLEXITY[0] in row.metrics for row in context.comparison.rows):
        lead += (
            " Perplexity is of the texts that measure.text names: of the answers of the retention questions unless it "
            "names others; the base's was measured with the adapter off."
        )
    return Section("Retention and forgetting", (Text(lead), *blocks))


def _pictures(primary: Primary) -> dict[str, tuple[str, Axis, Axis]]:
    """Title of each picture, what goes across and what goes up."""
    learnt: Axis = (("test", primary.metric), f"{primary.title}, %", 100)
    return {
        "kept": ("What was learnt, what was kept", learnt, _KEPT),
        "gain": ("Size of the update and what was learnt", _NORM, learnt),
        "norm": ("Size of the update and retention", _NORM, _KEPT),
        "rank": ("Effective rank of the update and retention", _EFFECTIVE, _KEPT),
        "drift": ("Drift of hidden states and retention", _DRIFT, _KEPT),
        "perplexity": ("Drift of hidden states and perplexity", _DRIFT, _PERPLEXITY),
    }


def _scatters(context: Context) -> Panel | None:
    data = context.dataset("scatter", "chart", "arm", "seed", "x", "y")
    drawn = []
    for key, (title, across, up) in _pictures(context.comparison.primary).items():
        before = len(data.rows)
        for run in context.data.drawn:
            x = context.final(run, *across[0])
            if x is None and run.arm == BASE and across[0] in _ZERO_FOR_BASE:
                x = 0.0
            y = context.final(run, *up[0])
            if x is not None and y is not None and math.isfinite(x) and math.isfinite(y):
                data.add(key, run.arm, str(run.seed), x * across[2], y * up[2])
        own = {str(row[1]) for row in data.rows[before:]}
        if own <= {BASE}:
            del data.rows[before:]
            continue
        drawn.append(
            Chart(
                id=f"scatter-{key}",
                title=title,
                label=f"{title}: one point for each arm and seed; across {across[1]}, up {up[1]}",
                spec=charts.scatter(context.arms, across[1], up[1]),
                data="scatter",
                where={"chart": key},
            )
        )
    if not drawn:
        return None
    note = (
        "One point for each arm and seed; its shape says the same as its colour. The update and the drift of the "
        "untouched base are 0."
    )
    in_all = set.intersection(*({str(row[1]) for row in data.rows if row[0] == key} for key in data.levels("chart")))
    missing = [arm for arm in context.trained if arm not in in_all]
    if missing:
        note += f" Not in every picture, since not measured or not finite: {', '.join(missing)}."
    note += _left_out(context)
    return Panel("scatter", tuple(drawn), (), context.arms, note)


def _left_out(context: Context) -> str:
    """Says whether some runs are left out, of which there are too many."""
    shown, everything = len(context.data.drawn), len(context.data.runs)
    return f" Drawn are {shown} of {everything} runs." if shown < everything else ""


def _tasks(context: Context) -> Table | None:
    """Accuracy of every retention task, before and after."""
    prefix = "retention/"
    keys = dict.fromkeys(
        key
        for row in context.comparison.rows
        for key in row.metrics
        if key[0] == "retention" and key[1] != RETENTION[1]
    )
    if RETENTION not in {key for row in context.comparison.rows for key in row.metrics}:
        return None
    rows = []
    for key in (RETENTION, *keys):
        base = context.mean(BASE, *key) if BASE in context.arms else None
        cells = [Cell("all tasks" if key == RETENTION else key[1].removeprefix(prefix))]
        for arm in context.arms:
            value = context.mean(arm, *key)
            change = None if arm == BASE or value is None or base is None else 100 * (value - base)
            told = "" if change is None or abs(change) < _ROUNDS_TO_ZERO else f" ({number(change, sign=True)})"
            cells.append(Cell(number(None if value is None else 100 * value) + told))
        rows.append(tuple(cells))
    return Table(
        "Accuracy on the retention tasks, percent, mean over seeds (change from the base, points)",
        ("Task", *context.arms),
        tuple(rows),
    )


def _updates(context: Context) -> Table | None:
    found = {key for row in context.comparison.rows for key in row.metrics}
    columns = {key: title for key, title in _UPDATE_COLUMNS.items() if key in found}
    if not columns:
        return None
    rows = tuple(
        (arm_cell(row.arm), *(Cell(figures(row.metrics.get(key), 4)) for key in columns))
        for row in context.comparison.rows
    )
    caption = (
        "Size of the updates, mean over seeds: Frobenius norms, ranks as means over modules, drift of hidden states"
    )
    return Table(caption, ("Arm", *columns.values()), rows)


def alignment(context: Context) -> Section | None:
    """Alignment Quality Index: how far apart safe and unsafe prompts lie in hidden space."""
    data = context.dataset("alignment", "kind", "label", "arm", "seed", "low", "value", "high")
    rows = []
    for run in context.data.drawn:
        found = {name: context.final(run, "alignment", name) for name in _names()}
        index = found["alignment_index"]
        if index is None:
            continue
        label = run.arm if len(_seeds(context, run.arm)) == 1 else f"{run.arm} · {run.seed}"
        null = found["alignment_null_low"], found["alignment_null_mean"], found["alignment_null_high"]
        if math.isfinite(index):
            data.add("band", label, run.arm, str(run.seed), *null)
            data.add("interval", label, run.arm, str(run.seed), found["alignment_index_low"], index,
                     found["alignment_index_high"])  # fmt: skip
        rows.append(
            (
                arm_cell(run.arm, run.seed),
                Cell(_bounds(found, "alignment_index")),
                Cell(_bounds(found, "delta_alignment_index", sign=True)),
                Cell(figures(found["delta_alignment_p_value"], 2)),
                Cell(_range(null[1], null[0], null[2])),
                Cell(figures(found["alignment_p_value"], 2)),
                *(Cell(number(found[name], digits=3)) for name in _OTHER_INDICES),
            )
        )
    if not rows:
        return None
    missing = [arm for arm in context.arms if arm not in data.levels("arm")]
    note = f"Not drawn, since not measured or not finite: {', '.join(missing)}." if missing else ""
    note = (note + _left_out(context)).strip()
    drawn = Chart(
        id="alignment",
        title="Alignment Quality Index with 95% interval; grey: what shuffled labels give",
        label="Alignment Quality Index of each arm and seed with its interval and the range under shuffled labels",
        spec=charts.intervals(
            context.arms,
            "index",
            lines=len(data.levels("label")),
            kinds=("band", "interval"),
            band="95% under shuffled labels",
        ),
        data="alignment",
    )
    headers = (
        "Run",
        "Index [95%]",
        "Δ to base [95%]",
        "p of Δ",
        "Shuffled labels [95%]",
        "p",
        *_OTHER_INDICES.values(),
    )
    return Section(
        "Alignment Quality Index",
        (
            Text(
                "How far apart safe and unsafe prompts lie in the model's hidden states (arXiv 2506.13901), in the "
                "native space, with the scale fixed on the base. More than shuffled labels give means that the model "
                "tells them apart. Δ is the index above its own mean under shuffled labels, arm minus base; whether it "
                "is more than chance is said by p of Δ, which is not corrected for several arms."
                + (_NOT_OF_AIR if context.comparison.primary.air else "")
            ),
            Panel("alignment", (drawn,), (), context.arms, note, wide=True),
            Table("Alignment Quality Index by run; intervals by bootstrap over prompts", headers, tuple(rows)),
        ),
    )


def _names() -> tuple[str, ...]:
    bounds = [f"{name}{end}" for name in ("alignment_index", "delta_alignment_index") for end in ("", "_low", "_high")]
    null = [f"alignment_null_{end}" for end in ("low", "mean", "high")]
    return (*bounds, *null, "alignment_p_value", "delta_alignment_p_value", *_OTHER_INDICES)


def _seeds(context: Context, arm: str) -> list[int]:
    return [run.seed for run in context.data.drawn if run.arm == arm]


def _bounds(found: dict[str, float | None], name: str, *, sign: bool = False) -> str:
    value, low, high = (found[f"{name}{end}"] for end in ("", "_low", "_high"))
    return _range(value, low, high, sign=sign)


def _range(value: float | None, low: float | None, high: float | None, *, sign: bool = False) -> str:
    """An estimate with its bounds; a word alone where there is none."""
    if value is None or not math.isfinite(value):
        return number(value)
    middle, *ends = (number(part, sign=sign, digits=3) for part in (value, low, high))
    return f"{middle} [{', '.join(ends)}]"
