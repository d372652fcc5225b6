"""Pictures of a verdict: cosines over the steps layer by layer, and the twin curves with the A/A band. PNG files."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from grit.figures import BLUE, GREY, ORANGE, log_scale, new_figure, save, say, whole_numbers
from probes.evidence import Evidence, median
from probes.twin import Twin

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_ledger(evidence: Evidence, out: Path, title: str = "") -> Path:
    """What preconditioning does to gradients and steps, over the steps, a thin line a layer and a thick median.

    Three panels: cosine of raw gradient and what reaches the optimizer, cosine of the real update and plain AdamW's,
    length of the real update over plain AdamW's.

    Args:
        evidence: The ledger.
        out: PNG file.
        title: Over the figure.

    Raises:
        ValueError: no samples.
    """
    if not evidence.records:
        raise ValueError("expected a ledger with samples, got none")
    figure, axes = new_figure(14.0, 4.2, 3)
    _lines(axes[0], evidence, "cos_raw_inner")
    axes[0].set_title("Raw gradient and what the optimizer gets")
    axes[0].set_ylabel("cosine")
    if evidence.rotates:
        axes[0].text(0.5, 0.08, "moments live in an eigenbasis:\nthe gradient itself is not changed",
                     transform=axes[0].transAxes, ha="center", color="#555555", fontsize=9)  # fmt: skip
    _lines(axes[1], evidence, "angle", lambda degrees: math.cos(math.radians(degrees)))
    axes[1].set_title("Real update and plain AdamW's (shadow)")
    axes[1].set_ylabel("cosine")
    for axis in axes[:2]:
        low, _ = axis.get_ylim()
        axis.set_ylim(min(low, 0.0) - 0.03, 1.03)
        axis.axhline(1.0, color=GREY, linewidth=1, zorder=0)
    _lines(axes[2], evidence, "lr_ratio")
    axes[2].set_title("Length over plain AdamW's")
    axes[2].set_ylabel("‖Δθ‖ / ‖shadow‖")
    axes[2].axhline(1.0, color=GREY, linewidth=1, zorder=0)
    ratios = [e.get("lr_ratio") for r in evidence.records for e in r["units"].values()]
    lengths = [v for v in ratios if v]
    if lengths and max(*lengths, 1.0) > 5 * min(*lengths, 1.0):
        log_scale(axes[2])
    else:
        axes[2].set_ylim(0.0, max(axes[2].get_ylim()[1], 1.2))
    for axis in axes:
        whole_numbers(axis)
        axis.set_xlabel("optimizer step")
    if title:
        figure.suptitle(title)
    return save(figure, out)


def _lines(axis: "Axes", evidence: Evidence, key: str, turn: Callable[[float], float] = float) -> None:
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
    if all(math.isnan(v) for v in shown):
        say(axis, "no sample has this number")


def plot_twin(twin: Twin, out: Path, name: str = "arm") -> Path:
    """Loss curves of the baseline and the arm with the A/A band, and how far they part.

    Args:
        twin: The three curves.
        out: PNG file.
        name: Of the arm.
    """
    figure, axes = new_figure(11.0, 4.2, 2)
    steps = range(1, len(twin.baseline) + 1)
    differences = [abs(a - b) for a, b in zip(twin.baseline, twin.again, strict=True)]
    band = [max(differences[: i + 1]) for i in range(len(differences))]
    again = "baseline again, start moved by one rounding" if twin.perturbed else "baseline again"
    axes[0].fill_between(steps, [a - d for a, d in zip(twin.baseline, band, strict=True)],
                         [a + d for a, d in zip(twin.baseline, band, strict=True)],
                         color=GREY, alpha=0.5, linewidth=0, label=f"A/A band ({again})")  # fmt: skip
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
    log_scale(axes[1])
    ratio = "infinitely many" if math.isinf(twin.ratio) else f"{twin.ratio:.3g}"
    axes[1].set_title(f"Distance from the baseline: {ratio} A/A floors")
    axes[1].set_ylabel("|difference of the losses|")
    axes[1].legend(loc="best", fontsize=8)
    for axis in axes:
        whole_numbers(axis)
        axis.set_xlabel("optimizer step")
    return save(figure, out)
