"""Vega-Lite charts by altair. Every one draws the named data "rows", is as wide as its place, and has no colours.

Colours belong to the page: the scale's range is put in by its script, so that dark mode has its own. Legends too,
since one legend above several charts is shorter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import altair as alt

Spec = Mapping[str, Any]
_SHORT = "abs(log(datum.value)) < 7 ? format(datum.value, '~g') : format(datum.value, '~e')"
"""Label of a logarithmic axis: powers only where the number is far from 1."""
_SHAPES = ("diamond", "circle", "square", "triangle-up", "cross", "triangle-down")
"""Of points that may hide each other: of two in one place, both are seen."""
ROW = 30
"""Height of one line of an interval chart, px."""


def _finished(chart: Any, height: int | None = None) -> Spec:
    """Check a single or layered chart against Vega-Lite's schema and give it the page's width."""
    sized = chart.properties(width="container", **({} if height is None else {"height": height}))
    spec: dict[str, Any] = sized.to_dict()
    spec.pop("config", None)
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    return spec


def _rows() -> alt.Chart:
    return alt.Chart(alt.NamedData(name="rows"))


def _colour(arms: Sequence[str]) -> alt.Color:
    return alt.Color("arm:N", scale=alt.Scale(domain=list(arms)), legend=None)


def dashed(arms: Sequence[str]) -> dict[str, bool]:
    """Every other arm's lines are dashed, the last one's among them: of two that coincide, both are seen."""
    return {arm: (len(arms) - place) % 2 == 1 for place, arm in enumerate(arms)}


def _dash(arms: Sequence[str]) -> alt.StrokeDash:
    dashes = [[6, 4] if dash else [1, 0] for dash in dashed(arms).values()]
    return alt.StrokeDash("arm:N", scale=alt.Scale(domain=list(arms), range=dashes), legend=None)


def _tooltip(**fields: str) -> list[alt.Tooltip]:
    """Title -> column with its type; numbers with four digits."""
    return [
        alt.Tooltip(field, title=title, format=".4~g" if field.endswith(":Q") else alt.Undefined)
        for title, field in fields.items()
    ]


def intervals(
    arms: Sequence[str], title: str, *, lines: int, kinds: Collection[str] = ("interval",), zero: bool = False,
    band: str = "",
) -> Spec:  # fmt: skip
    """Estimates with their intervals, one line each.

    Rows: kind, label, arm, low, value, high. The kind `interval` is a point with a thin bar, `weak` one with a dashed
    bar (less than 95% confidence), `inner` a broad pale bar, `seed` a tick, `band` a grey range that belongs to no arm.

    Args:
        arms: Order of the colours.
        title: Of the axis, with the unit.
        lines: Number of labels.
        kinds: Those that the rows have; a layer without rows would make Vega warn.
        zero: Draw a line at zero, and have it in the picture.
        band: What a grey range means, for its tooltip.
    """
    scale, axis = alt.Scale(zero=False, nice=False, padding=14), alt.Axis(tickCount=6, labelSeparation=6)
    x = alt.X("value:Q", title=title, scale=scale, axis=axis)
    y = alt.Y(
        "label:N",
        title=None,
        sort=None,
        axis=alt.Axis(domain=False, ticks=False, labelLimit=150, labelPadding=8, grid=False),
    )
    low, high = alt.X("low:Q", title=title, scale=scale, axis=axis), alt.X2("high:Q")
    whole = _tooltip(what="label:N", low="low:Q", estimate="value:Q", high="high:Q")

    def of(kind: str) -> alt.Chart:
        return _rows().transform_filter(f"datum.kind === '{kind}'")

    layers = {
        "band": of("band").mark_bar(color="gray", opacity=0.28, height=18, cornerRadius=2).encode(
            x=low, x2=high, y=y, tooltip=_tooltip(**{band or "range": "label:N", "low": "low:Q", "high": "high:Q"})
        ),
        "inner": of("inner").mark_bar(opacity=0.3, height=9, cornerRadius=2).encode(
            x=low, x2=high, y=y, color=_colour(arms), tooltip=whole
        ),
        "interval": of("interval").mark_rule(strokeWidth=2).encode(
            x=low, x2=high, y=y, color=_colour(arms), tooltip=whole
        ),
        "weak": of("weak").mark_rule(strokeWidth=2, strokeDash=[2, 3], opacity=0.7).encode(
            x=low, x2=high, y=y, color=_colour(arms), tooltip=whole
        ),
        "seed": of("seed").mark_tick(thickness=1.5, height=12, opacity=0.75).encode(
            x=x, y=y, color=_colour(arms), tooltip=_tooltip(what="label:N", seed="seed:N", value="value:Q")
        ),
    }  # fmt: skip
    chosen = [layer for kind, layer in layers.items() if kind in kinds]
    points = _rows().transform_filter("datum.kind === 'interval' || datum.kind === 'weak'")
    points = points.mark_point(filled=True, size=75, opacity=1)
    chosen.append(points.encode(x=x, y=y, color=_colour(arms), tooltip=whole))
    if zero:
        line = alt.Chart(alt.InlineData(values=[{"zero": 0}])).mark_rule(strokeDash=[4, 3], color="gray")
        chosen.insert(0, line.encode(x=alt.X("zero:Q", title=title, scale=scale, axis=axis)))
    return _finished(alt.layer(*chosen), ROW * max(lines, 1) + 10)


def lines(
    arms: Sequence[str], x: str, x_title: str, y: str, y_title: str, *, detail: Sequence[str], log: bool = False,
    band: bool = False, points: bool = False, height: int = 260,
) -> Spec:  # fmt: skip
    """Lines of each arm, one for each combination of `detail`.

    Args:
        arms: Order of the colours.
        x: Column, a whole number such as a step.
        x_title: With the unit.
        y: Column.
        y_title: With the unit.
        detail: Columns that make a line of its own.
        log: A logarithmic y-axis.
        band: Draw the range from column `low` to column `high`, where they are known.
        points: Draw the points too.
        height: px.
    """
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False, nice=True)
    whole = [alt.Detail(f"{column}:N") for column in detail]
    across = alt.X(
        f"{x}:Q", title=x_title, axis=alt.Axis(grid=False, tickMinStep=1, tickCount=6, format="d", labelSeparation=6)
    )
    axis = alt.Axis(labelExpr=_SHORT, tickCount=5) if log else alt.Axis(tickCount=6)
    up = alt.Y(f"{y}:Q", title=y_title, scale=scale, axis=axis)
    tooltip = _tooltip(arm="arm:N", **{column: f"{column}:N" for column in detail}, **{x: f"{x}:Q", y: f"{y}:Q"})
    layers: list[alt.Chart] = []
    if band:
        layers.append(
            _rows()
            .transform_filter("datum.low !== null && datum.high !== null")
            .mark_area(opacity=0.18)
            .encode(x=across, y=alt.Y("low:Q", title=y_title, scale=scale, axis=axis), y2="high:Q",
                    color=_colour(arms), detail=whole)
        )  # fmt: skip
    layers.append(
        _rows()
        .mark_line(strokeWidth=1.6, opacity=0.95, clip=True)
        .encode(x=across, y=up, color=_colour(arms), strokeDash=_dash(arms), detail=whole)
    )
    layers.append(
        _rows()
        .mark_circle(size=26, opacity=0.9 if points else 0)
        .encode(x=across, y=up, color=_colour(arms), tooltip=tooltip)
    )
    return _finished(alt.layer(*layers), height)


def scatter(arms: Sequence[str], x_title: str, y_title: str, *, height: int = 240) -> Spec:
    """One point for each arm and seed: columns x, y, arm, seed; the first arm is a diamond, the others follow."""
    scale = alt.Scale(zero=False, nice=False, padding=16)
    shapes = [_SHAPES[place % len(_SHAPES)] for place in range(len(arms))]
    chart = (
        _rows()
        .mark_point(filled=True, size=95, opacity=0.85)
        .encode(
            x=alt.X("x:Q", title=x_title, scale=scale, axis=alt.Axis(tickCount=5, labelSeparation=6)),
            y=alt.Y("y:Q", title=y_title, scale=scale, axis=alt.Axis(tickCount=5)),
            color=_colour(arms),
            shape=alt.Shape("arm:N", scale=alt.Scale(domain=list(arms), range=shapes), legend=None),
            tooltip=[*_tooltip(arm="arm:N", seed="seed:N"), *_tooltip(**{"x": "x:Q", "y": "y:Q"})],
        )
    )
    return _finished(chart, height)


def dots(arms: Sequence[str], x_title: str, labels: Sequence[str], ticks: Sequence[int]) -> Spec:
    """A dot for each arm and seed on a line for each layer: columns layer, value (whole numbers), arm, seed."""
    chart = (
        _rows()
        .mark_circle(size=42, opacity=0.8)
        .encode(
            x=alt.X("value:Q", title=x_title, scale=alt.Scale(zero=False, nice=False, padding=14),
                    axis=alt.Axis(values=list(ticks), format="d", labelSeparation=6)),
            y=alt.Y("layer:N", title=None, sort=list(labels), scale=alt.Scale(domain=list(labels)),
                    axis=alt.Axis(domain=False, ticks=False, labelLimit=190, grid=True)),
            yOffset=alt.YOffset("arm:N", sort=list(arms)),
            color=_colour(arms),
            tooltip=_tooltip(arm="arm:N", seed="seed:N", layer="layer:N", value="value:Q"),
        )
    )  # fmt: skip
    return _finished(chart, 17 * max(len(labels), 1) + 10)
