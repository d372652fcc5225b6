"""Vega-Lite charts made with altair. Each draws the named data "rows", fills the width of its place, and has no legend.

The page's script adds the colors, so that dark mode has its own.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import altair as alt

from evaluation.report.blocks import Panel

Spec = Mapping[str, Any]
_SHORT = (
    "indexof('125', format(datum.value, '.0e')[0]) < 0 ? '' : "
    "abs(log(datum.value)) < 7 ? format(datum.value, '~g') : format(datum.value, '~e')"
)
"""Label of a logarithmic axis: 1, 2, 5, 10, …; powers only where the number is far from 1."""
_SHAPES = ("diamond", "circle", "square", "triangle-up", "cross", "triangle-down")
"""Arms have different shapes, so that two points in one place stay visible."""
ROW = 30
"""Height of one line of an interval chart, px."""


def _finished(chart: Any, height: int) -> Spec:
    spec: dict[str, Any] = chart.properties(width="container", height=height).to_dict()
    spec.pop("config", None)
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    spec["padding"] = {"left": 5, "top": 5, "right": 14, "bottom": 5}  # the last number of an axis extends beyond it
    return spec


def _rows(kind: str = "") -> alt.Chart:
    chart = alt.Chart(alt.NamedData(name="rows"))
    return chart.transform_filter(f"datum.kind === '{kind}'") if kind else chart


def _color(panel: Panel) -> alt.Color:
    return alt.Color("arm:N", scale=alt.Scale(domain=panel.arms), legend=None)


def _tooltip(**fields: str) -> list[alt.Tooltip]:
    return [
        alt.Tooltip(field, title=title, format=".4~g" if field.endswith(":Q") else alt.Undefined)
        for title, field in fields.items()
    ]


def intervals(panel: Panel, x_title: str, *, lines: int, kinds: Collection[str]) -> Spec:
    """Estimates with their intervals, `lines` of them; `x_title` is the axis's, with the unit.

    Rows: kind, label, arm, low, value, high. The kind `interval` is a point with a bar, `seed` a tick. `kinds` are
    those that have rows, since Vega warns of empty layers.
    """
    scale, axis = alt.Scale(zero=False, nice=False, padding=14), alt.Axis(tickCount=6, labelSeparation=6)
    x = alt.X("value:Q", title=x_title, scale=scale, axis=axis)
    labels = alt.Axis(domain=False, ticks=False, labelLimit=150, labelPadding=8, grid=False)
    y = alt.Y("label:N", title=None, sort=None, axis=labels)
    ends = {"x": alt.X("low:Q", title=x_title, scale=scale, axis=axis), "x2": alt.X2("high:Q")}
    tooltip = _tooltip(what="label:N", low="low:Q", estimate="value:Q", high="high:Q")
    of_arm = {"y": y, "color": _color(panel), "tooltip": tooltip}
    of_seed = _tooltip(what="label:N", seed="seed:N", value="value:Q")
    layers = {
        "interval": _rows("interval").mark_rule(strokeWidth=2).encode(**ends, **of_arm),
        "seed": _rows("seed").mark_tick(thickness=1.5, height=12, opacity=0.75)
        .encode(x=x, **of_arm | {"tooltip": of_seed}),
    }  # fmt: skip
    zero = alt.Chart(alt.InlineData(values=[{"zero": 0}])).mark_rule(strokeDash=[4, 3], color="gray")
    chosen: list[Any] = [zero.encode(x=alt.X("zero:Q", title=x_title, scale=scale, axis=axis))]
    chosen += [layer for kind, layer in layers.items() if kind in kinds]
    chosen.append(_rows("interval").mark_point(filled=True, size=75, opacity=1).encode(x=x, **of_arm))
    return _finished(alt.layer(*chosen), ROW * max(lines, 1) + 10)


def lines(
    panel: Panel, x: str, x_title: str, y: str, y_title: str, *, detail: Sequence[str], log: bool = False,
    band: bool = False, points: bool = False, height: int = 260,
) -> Spec:  # fmt: skip
    """Lines of each arm, one for each combination of the columns `detail`; column `x` holds whole numbers.

    `log` makes the y-axis logarithmic. `band` draws the range from column `low` to column `high` where they are known.
    """
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False, nice=True)
    whole = [alt.Detail(f"{column}:N") for column in detail]
    whole_numbers = alt.Axis(grid=False, tickMinStep=1, tickCount=6, format="d", labelSeparation=6)
    across = alt.X(f"{x}:Q", title=x_title, axis=whole_numbers)
    axis = alt.Axis(labelExpr=_SHORT, tickCount=5) if log else alt.Axis(tickCount=6)
    up = alt.Y(f"{y}:Q", title=y_title, scale=scale, axis=axis)
    tooltip = _tooltip(arm="arm:N", **{column: f"{column}:N" for column in detail}, **{x: f"{x}:Q", y: f"{y}:Q"})
    dashes = [[6, 4] if dash else [1, 0] for dash in panel.dashed.values()]
    dash = alt.StrokeDash("arm:N", scale=alt.Scale(domain=panel.arms, range=dashes), legend=None)
    color = _color(panel)
    layers: list[Any] = []
    if band:
        area = _rows().transform_filter("datum.low !== null && datum.high !== null").mark_area(opacity=0.18)
        low = alt.Y("low:Q", title=y_title, scale=scale, axis=axis)
        layers.append(area.encode(x=across, y=low, y2="high:Q", color=color, detail=whole))
    line = _rows().mark_line(strokeWidth=1.6, opacity=0.95, clip=True)
    layers.append(line.encode(x=across, y=up, color=color, strokeDash=dash, detail=whole))
    circle = _rows().mark_circle(size=26, opacity=0.9 if points else 0)
    layers.append(circle.encode(x=across, y=up, color=color, tooltip=tooltip))
    return _finished(alt.layer(*layers), height)


def scatter(
    panel: Panel, x_title: str, y_title: str, *, log_x: bool = False, marks: Mapping[str, float] | None = None
) -> Spec:  # fmt: skip
    """Points whose shape and color both mark the arm; those of the Pareto front are filled and joined.

    Rows: kind (mean or seed), arm, seed, front (front, dominated or plain), low, x, high, below, y, above. `marks`, the
    names of lines across, also draws the intervals of means in both directions.
    """
    scale = alt.Scale(type="log" if log_x else "linear", zero=False, nice=False, padding=16)
    x_axis = alt.Axis(tickCount=5, labelSeparation=6, format="~g")
    x = partial(alt.X, title=x_title, axis=x_axis, scale=scale)
    up = alt.Scale(zero=False, nice=False, padding=16)
    y = partial(alt.Y, title=y_title, axis=alt.Axis(tickCount=5), scale=up)
    shapes = [_SHAPES[place % len(_SHAPES)] for place in range(len(panel.arms))]
    color, at = _color(panel), {"x": x("x:Q"), "y": y("y:Q")}
    shape = alt.Shape("arm:N", scale=alt.Scale(domain=panel.arms, range=shapes), legend=None)
    seed = _tooltip(arm="arm:N", seed="seed:N", **{x_title: "x:Q", y_title: "y:Q"})
    means = _rows("mean")
    layers: list[Any] = []
    if marks:
        tooltip = _tooltip(arm="arm:N", **{x_title: "x:Q", "from": "low:Q", "to": "high:Q"},
                           **{y_title: "y:Q", "up from": "below:Q", "up to": "above:Q"})  # fmt: skip
        layers = [
            means.transform_filter("datum.front === 'front'").mark_line(color="gray", strokeWidth=1).encode(**at),
            means.mark_rule(opacity=0.5).encode(x=x("low:Q"), x2="high:Q", y=at["y"], color=color),
            means.mark_rule(opacity=0.5).encode(y=y("below:Q"), y2="above:Q", x=at["x"], color=color),
            *(
                means.transform_filter(f"(datum.front === 'dominated') === {str(not filled).lower()}")
                .mark_point(filled=filled, size=110, strokeWidth=2, opacity=1)
                .encode(**at, color=color, shape=shape, tooltip=tooltip)
                for filled in (False, True)
            ),
        ]
    size, opacity = (16, 0.6) if marks else (95, 0.85)
    seeds = _rows("seed").mark_point(filled=True, size=size, opacity=opacity)
    layers.insert(-2, seeds.encode(**at, color=color, shape=shape, tooltip=seed))
    if marks:
        lines = alt.Chart(alt.InlineData(values=[{"y": value, "arm": name} for name, value in marks.items()]))
        layers = [
            lines.mark_rule(strokeDash=[4, 3], color="gray").encode(y=at["y"]),
            lines.mark_text(align="left", dx=3, dy=-9, fill="gray").encode(x=alt.value(0), y=at["y"], text="arm:N"),
            *layers,
        ]
    return _finished(alt.layer(*layers), 340 if marks else 240)
