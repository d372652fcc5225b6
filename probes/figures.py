"""Pictures of a verdict: cosines over the steps layer by layer, and the twin curves with the A/A band. PNG files."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from probes.evidence import Evidence, median
from probes.twin_curves import Twin

# Colors of Okabe & Ito (2008), which color-blind readers can distinguish; line styles repeat the distinction.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"


def _figure(width: float, height: float, panels: int) -> tuple[Any, list[Any]]:
    # Matplotlib's objects, not pyplot, so that no global state changes.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=140, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for axis in axes:
        axis.grid(visible=True, color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, axes: list[Any], out: Path) -> Path:
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_xlabel("optimizer step")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")
    return out


def plot_ledger(evidence: Evidence, out: Path, title: str = "") -> Path:
    """What preconditioning does to gradients and steps, thin lines per layer and a thick median; needs samples."""
    # With moments in an eigenbasis the optimizer gets the unchanged gradient, and a flat line would say nothing.
    figure, axes = _figure(*(9.6, 4.2, 2) if evidence.rotates else (14.0, 4.2, 3))
    *first, turned, longer = axes
    for axis in first:
        _lines(axis, evidence, "cos_raw_inner")
        axis.set_title("Raw gradient and what the optimizer gets")
    _lines(turned, evidence, "angle", lambda degrees: math.cos(math.radians(degrees)))
    turned.set_title("Real update and plain AdamW's (shadow)")
    for axis in (*first, turned):
        axis.set_ylabel("cosine")
        low, _ = axis.get_ylim()
        axis.set_ylim(min(low, 0.0) - 0.03, 1.03)
        axis.axhline(1.0, color=GREY, linewidth=1, zorder=0)
    _lines(longer, evidence, "lr_ratio")
    longer.set_title("Length over plain AdamW's")
    longer.set_ylabel("‖Δθ‖ / ‖shadow‖")
    longer.axhline(1.0, color=GREY, linewidth=1, zorder=0)
    lengths = [v for r in evidence.records for e in r["units"].values() if (v := e.get("lr_ratio"))]
    if lengths and max(*lengths, 1.0) > 5 * min(*lengths, 1.0):
        longer.set_yscale("log")
    else:
        longer.set_ylim(0.0, max(longer.get_ylim()[1], 1.2))
    if title:
        figure.suptitle(title)
    return _save(figure, axes, out)


def _lines(axis: Any, evidence: Evidence, key: str, turn: Callable[[float], float] = float) -> None:
    steps = [r["step"] for r in evidence.records]
    units = list(dict.fromkeys(n for r in evidence.records for n, u in r["units"].items() if "norm_raw" in u))
    rows = []
    for unit in units:
        values = [r["units"].get(unit, {}).get(key) for r in evidence.records]
        rows.append([math.nan if v is None else turn(v) for v in values])
        axis.plot(steps, rows[-1], color=BLUE, linewidth=0.6, alpha=0.3)
    middle = [median(row[i] for row in rows) for i in range(len(steps))]
    shown = [math.nan if v is None else v for v in middle]
    axis.plot(steps, shown, color=BLUE, linewidth=2.2, label=f"median of {len(units)} layers (thin: each)")
    axis.legend(loc="best", fontsize=8)


def plot_twin(twin: Twin, out: Path, name: str = "arm") -> Path:
    figure, axes = _figure(11.0, 4.2, 2)
    steps = range(1, len(twin.baseline) + 1)
    differences = [abs(a - b) for a, b in zip(twin.baseline, twin.again, strict=True)]
    band = [max(differences[: i + 1]) for i in range(len(differences))]
    again = "baseline again, start moved by one rounding"
    low, high = ([a + sign * d for a, d in zip(twin.baseline, band, strict=True)] for sign in (-1, 1))
    axes[0].fill_between(steps, low, high, color=GREY, alpha=0.5, linewidth=0, label=f"A/A band ({again})")
    axes[0].plot(steps, twin.baseline, color=ORANGE, linewidth=1.6, linestyle="--", label="baseline")
    axes[0].plot(steps, twin.arm, color=BLUE, linewidth=1.6, label=name)
    axes[0].set_title("Same seed, same batches")
    axes[0].set_ylabel("training loss")
    axes[0].legend(loc="best", fontsize=8)
    apart = [(twin.arm, BLUE, "-", f"{name} − baseline"), (twin.again, GREY, "-", again)]
    for curve, colour, style, label in apart:
        # A logarithmic axis has no zero: a gap where curves coincide, a line far below where they do all the way.
        distance = [abs(a - b) or math.nan for a, b in zip(twin.baseline, curve, strict=True)]
        if all(math.isnan(d) for d in distance):
            distance, label = [1e-9] * len(distance), f"{label} (no difference)"
        axes[1].plot(steps, distance, style, color=colour, linewidth=1.6, label=label)
    axes[1].set_yscale("log")
    ratio = "infinitely many" if math.isinf(twin.ratio) else f"{twin.ratio:.3g}"
    axes[1].set_title(f"Distance from the baseline: {ratio} A/A floors")
    axes[1].set_ylabel("|difference of the losses|")
    axes[1].legend(loc="best", fontsize=8)
    return _save(figure, axes, out)
