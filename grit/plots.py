"""Pictures of a finished `grit_log.jsonl`: spectra, factors, ranks. PNG files; needs matplotlib.

Each `plot_…(log, out)` takes the file or its records (`Manager.history`), writes `out` and returns it; a ValueError
names what the log lacks. matplotlib is imported where it is used, without pyplot, so that no global state changes.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit.config import GRITConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of Okabe & Ito (2008), which colour-blind readers can distinguish; line styles repeat the distinction.
BLUE, ORANGE, GREEN, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#999999"

Log = Path | str | list[dict[str, Any]]

SIDES = {"a": r"$\Sigma_a$ (for B)", "g": r"$\Sigma_g$ (for A)"}
_FLOOR = 1e-9  # relative eigenvalues below this are rounding
_MOST_HEATMAPS = 8


def plot_spectra(log: Log, out: Path) -> Path:
    return save(spectra_figure(log), out)


def spectra_figure(log: Log) -> "Figure":
    """Eigenvalues of Σ_a and Σ_g in the first and the last record, and effective ranks over the steps."""
    places = {"spectra": "layers", "final": "spectra"}
    records = [(r["step"], r[places[r["kind"]]]) for r in _read(log) if r.get(places.get(r["kind"], ""))]
    known = {side: [(step, layers) for step, layers in records if _eigenvalues(layers, side)] for side in SIDES}
    if not any(known.values()):
        raise ValueError(
            "expected records with eigenvalues (kinds 'spectra' and 'final'), found none: no factor had seen enough "
            "tokens, or log_fisher_spectrum was off and training did not end"
        )
    figure, axes = _new_figure(14.0, 4.4, 3)
    for axis, (side, title) in zip(axes, SIDES.items(), strict=False):
        axis.set_title(f"Spectrum of {title}")
        if not known[side]:
            _say(axis, f"no eigenvalues of {title.split()[0]} in this log")
            continue
        if side == "g" and known["a"]:
            axis.sharey(axes[0])
        first, last = known[side][0], known[side][-1]
        styles = [(first, ORANGE, "--", "first record")] if first is not last else []
        for (step, layers), colour, style, name in [*styles, (last, BLUE, "-", "last record")]:
            _spectrum(axis, _eigenvalues(layers, side), colour, style, f"{name}, step {step}")
        axis.set(yscale="log", xlabel="eigenvalue (1 = largest)", ylabel="relative to the largest, λᵢ / λ₁")
        _whole_numbers(axis)
        axis.legend(title="median of layers (thin: each layer)", loc="lower left")
    _effective_ranks(axes[2], known)
    return figure


def eigenvalue_bars(log: Log) -> "Figure":
    """The leading eigenvalues of every layer in the last record, relative to the largest, as bars."""
    records = [r for r in _read(log) if r["kind"] == "final" and r.get("spectra")]
    if not records:
        raise ValueError("expected a final record with spectra, found none: training did not end")
    figure, axes = _new_figure(12.0, 4.4, 2)
    for axis, (side, title) in zip(axes, SIDES.items(), strict=True):
        rows = _eigenvalues(records[-1]["spectra"], side)
        for i, row in enumerate(rows):
            width = 0.8 / len(rows)
            axis.bar([n + i * width for n in range(1, len(row) + 1)], [v / row[0] for v in row], width, color=BLUE)
        axis.set(title=f"Eigenvalues of {title}, each layer", xlabel="eigenvalue (1 = largest)", ylabel="λᵢ / λ₁")
        _whole_numbers(axis)
    return figure


def tracked(log: Log, config: GRITConfig) -> dict[str, "Figure"]:
    """The figures that the configuration wants trackers to show; none for what a short log lacks."""
    wanted = {"grit/spectra": spectra_figure if config.log_fisher_spectrum else None,
              "grit/eigenvalues": eigenvalue_bars if config.log_eigs_bar else None,
              "grit/factors": heatmaps_figure if config.log_eig_heatmaps else None}  # fmt: skip
    figures = {}
    for name, draw in wanted.items():
        with suppress(ValueError, ImportError):  # ImportError: without matplotlib there are no pictures
            if draw is not None:
                figures[name] = draw(log)
    return figures


def _spectrum(axis: "Axes", values: list[list[float]], colour: str, style: str, label: str) -> None:
    import numpy as np

    longest = max(len(row) for row in values)
    rows = np.full((len(values), longest), np.nan)
    for i, row in enumerate(values):
        rows[i, : len(row)] = [v / row[0] if v / row[0] > _FLOOR else np.nan for v in row]
        axis.plot(range(1, len(row) + 1), rows[i, : len(row)], style, color=colour, linewidth=0.7, alpha=0.35)
    medians = [float(np.median(c[~np.isnan(c)])) if not np.isnan(c).all() else np.nan for c in rows.T]
    axis.plot(range(1, longest + 1), medians, style, color=colour, linewidth=2.4, marker="o", markersize=4, label=label)


def _effective_ranks(axis: "Axes", known: dict[str, list[tuple[int, dict[str, Any]]]]) -> None:
    import numpy as np

    for (side, title), colour, style in zip(SIDES.items(), (GREEN, BLUE), ("-", "--"), strict=True):
        key = f"effective_rank_{side}"
        points = {step: [entry[key] for entry in layers.values() if key in entry] for step, layers in known[side]}
        steps = sorted(step for step, values in points.items() if values)
        if not steps:
            continue
        low, middle, high = ([float(np.quantile(points[step], q)) for step in steps] for q in (0.1, 0.5, 0.9))
        axis.plot(steps, middle, style, color=colour, linewidth=2.2, marker="o", markersize=4, label=title)
        axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.set(title="Effective rank", xlabel="optimizer step", ylabel="effective rank (directions)")
    axis.set_ylim(0, 1.35 * axis.dataLim.y1)  # room for the legend
    _whole_numbers(axis)
    axis.legend(title="median of layers (band: 10th to 90th percentile)", loc="upper left")


def plot_heatmaps(log: Log, out: Path) -> Path:
    return save(heatmaps_figure(log), out)


def heatmaps_figure(log: Log) -> "Figure":
    """Σ_a and Σ_g of the layers whose factors are in the last record, as correlations Σ_ij / √(Σ_ii Σ_jj)."""
    import numpy as np

    found = [r for r in _read(log) if r.get("factors")]
    if not found:
        raise ValueError(
            "expected a final record with factors, found none: set log_eig_heatmaps to true and let training end"
        )
    step, factors = found[-1]["step"], found[-1]["factors"]
    layers = sorted(factors, key=_natural)[:_MOST_HEATMAPS]
    which = f", first {len(layers)} of {len(factors)} layers" if len(layers) < len(factors) else ""
    names = _short_names(layers)
    figure, axes = _new_figure(max(2.4 * len(layers) + 1.4, 5.0), 5.6, 2 * len(layers), columns=len(layers))
    figure.suptitle(f"Correlations between coordinates of the rank, step {step}{which}", fontsize=11)
    for place, axis in enumerate(axes):
        row, column = divmod(place, len(layers))
        side = "ag"[row]
        matrix = np.array(factors[layers[column]][f"cov_{side}"], dtype=float)
        scale = np.sqrt(np.clip(np.diag(matrix), 0.0, None))
        with np.errstate(divide="ignore", invalid="ignore"):
            correlation = np.ma.masked_invalid(matrix / np.outer(scale, scale))
        axis.set_facecolor(GREY)  # where a coordinate never moved
        image = axis.imshow(correlation, cmap="PuOr", vmin=-1, vmax=1, interpolation="nearest")
        ticks = sorted({0, (len(matrix) - 1) // 2, len(matrix) - 1})
        axis.set_xticks(ticks, [str(t + 1) for t in ticks])
        axis.set_yticks(ticks, [str(t + 1) for t in ticks])
        if row == 0:
            axis.set_title(names[layers[column]], fontsize=9)
        else:
            axis.set_xlabel("coordinate")
        if column == 0:
            axis.set_ylabel(f"{SIDES[side]}\ncoordinate")
    figure.colorbar(image, ax=axes, label="correlation (grey: no variance)", shrink=0.85)
    return figure


def plot_ranks(log: Log, out: Path) -> Path:
    """The rank that each layer kept, and how much each reprojection changed ΔW."""
    records = _read(log)
    final = [r["ranks"] for r in records if r["kind"] == "final"]
    if not final:
        raise ValueError("expected a final record with ranks, found none: training did not end")
    ranks = {name: final[-1][name] for name in sorted(final[-1], key=_natural)}
    figure, axes = _new_figure(13.0, min(max(4.4, 1.6 + 0.22 * len(ranks)), 40.0), 2)
    _rank_bars(axes[0], ranks)
    _changes(axes[1], [r for r in records if r["kind"] == "reprojection"])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=4)
    if len(ranks) > 25:
        axes[1].set_box_aspect(0.8)
        axes[1].set_anchor("N")
    return save(figure, out)


def _rank_bars(axis: "Axes", ranks: dict[str, dict[str, int]]) -> None:
    names, entries = _short_names(ranks), list(ranks.values())
    places = list(range(len(ranks)))
    axis.barh(places, [e["base_r"] for e in entries], height=0.8, color="#E4E4E4", label="rank at the start")
    axis.barh(places, [e["r"] for e in entries], height=0.5, color=SKY, label="rank of the tensors")
    same = all(entry.get("final_k_a") == entry.get("final_k_b") for entry in entries)
    for side, marker, colour in (("a", "o", BLUE),) if same else (("a", "o", BLUE), ("b", "x", ORANGE)):
        known = {place: e[f"final_k_{side}"] for place, e in enumerate(entries) if f"final_k_{side}" in e}
        label = "directions kept, k" if same else f"directions kept, k of {'A' if side == 'a' else 'B'}"
        axis.scatter(list(known.values()), list(known), marker=marker, s=28, color=colour, zorder=3, label=label)
    axis.set_yticks(places, list(names.values()), fontsize=8 if len(ranks) <= 150 else 1200 / len(ranks))
    axis.set_ylim(len(ranks) - 0.4, -0.6)
    axis.set_xlim(left=0)
    axis.set(title="Rank of each layer", xlabel="rank (directions)")
    axis.grid(axis="y", visible=False)
    _whole_numbers(axis)


def _changes(axis: "Axes", events: list[dict[str, Any]]) -> None:
    import numpy as np

    axis.set_title("Change of ΔW at each reprojection")
    points = [(e["step"], float(said["relative_change"])) for e in events for said in e["layers"].values()]
    points = [(step, change) for step, change in points if change < float("inf")]
    if not points:
        _say(axis, "no reprojection in this log")
        return
    axis.scatter([s for s, _ in points], [c for _, c in points], s=14, color=GREY, label="each layer", zorder=2)
    steps = sorted({step for step, _ in points})
    for quantile, colour, style, label in ((1.0, ORANGE, "--", "largest"), (0.5, BLUE, "-", "median of layers")):
        line = [float(np.quantile([c for s, c in points if s == step], quantile)) for step in steps]
        axis.plot(steps, line, style, color=colour, marker="o", markersize=5, linewidth=2, label=label, zorder=3)
    axis.set_yscale("symlog", linthresh=0.01)  # linear below: 0 is nothing cut off, 1e-8 is rounding
    axis.set_ylim(bottom=-1e-3, top=max(1.0, 1.3 * max(change for _, change in points)))
    axis.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axis.set(xlabel="optimizer step", ylabel="relative change, ‖ΔW′ − ΔW‖ / ‖ΔW‖")
    _whole_numbers(axis)
    axis.legend(loc="best")


def _read(log: Log) -> list[dict[str, Any]]:
    if isinstance(log, list):
        return [r for r in log if "kind" in r and "step" in r]
    records = []
    for number, line in enumerate(Path(log).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            records.append({"step": record["step"], "kind": record["kind"], **record})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{log}: line {number}: expected a record of GRIT, got {line[:60]!r}") from error
    return records


def _eigenvalues(layers: dict[str, Any], side: str) -> list[list[float]]:
    rows = [entry.get(f"eigenvalues_{side}") or [0.0] for entry in layers.values()]
    return [row for row in rows if row[0] > 0]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _short_names(names: Iterable[str]) -> dict[str, str]:
    """Names without the leading parts that all of them share, the number of the layer excepted."""
    parts = {name: name.split(".") for name in names}
    same = 0
    while all(len(p) > same + 1 and not p[same].isdigit() for p in parts.values()) and (
        len({tuple(p[: same + 1]) for p in parts.values()}) == 1
    ):
        same += 1
    return {name: ".".join(p[same:]) for name, p in parts.items()}


def _new_figure(width: float, height: float, panels: int, columns: int | None = None) -> tuple["Figure", "list[Axes]"]:
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


def _whole_numbers(axis: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    if axis.dataLim.x0 == axis.dataLim.x1:  # one point
        axis.set_xlim(axis.dataLim.x0 - 1, axis.dataLim.x0 + 1)


def _say(axis: "Axes", text: str) -> None:
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color="#555555")
    axis.set(xticks=[], yticks=[])


def save(figure: "Figure", out: Path) -> Path:
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")
    return out
