"""What plots share: colours, axes, names, files.

matplotlib is imported where it is used, and by its objects (no pyplot), so that nothing global changes.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of Okabe & Ito (2008), which colour-blind readers tell apart; line styles say the same once more.
BLUE, ORANGE, GREEN, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#999999"


def natural(name: str) -> list[tuple[int, str]]:
    """For sorting: layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Names without the leading parts that all of them share, the number of the layer excepted."""
    parts = {name: name.split(".") for name in names}
    same = 0
    while all(len(p) > same + 1 and not p[same].isdigit() for p in parts.values()) and (
        len({tuple(p[: same + 1]) for p in parts.values()}) == 1
    ):
        same += 1
    return {name: ".".join(p[same:]) for name, p in parts.items()}


def new_figure(width: float, height: float, panels: int, columns: int | None = None) -> tuple["Figure", "list[Axes]"]:
    """A white figure with `panels` axes in rows of `columns` (default: one row, with grids)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=140, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    columns = columns or panels
    axes = [figure.add_subplot(panels // columns, columns, i + 1) for i in range(panels)]
    if columns == panels:
        for axis in axes:
            axis.grid(visible=True, color="#DDDDDD", linewidth=0.6)
            axis.set_axisbelow(True)
    return figure, axes


def whole_numbers(axis: "Axes") -> None:
    """Ticks of the x axis at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    if axis.dataLim.x0 == axis.dataLim.x1:  # one point
        axis.set_xlim(axis.dataLim.x0 - 1, axis.dataLim.x0 + 1)


def log_scale(axis: "Axes") -> None:
    """A logarithmic y axis with few, plain labels."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axis.yaxis.set_major_locator(LogLocator(base=10.0, subs=subs, numticks=12))
    axis.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def say(axis: "Axes", text: str) -> None:
    """A sentence in the place of a plot."""
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color="#555555")
    axis.set_xticks([])
    axis.set_yticks([])


def save(figure: "Figure", out: Path) -> Path:
    """Write the PNG file; its folder is made."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")
    return out
