"""Figures of a run's records (`Manager.history`) for trackers: spectra, eigenvalues and factors; needs matplotlib.

matplotlib is imported where it is used, without pyplot, so that no global state changes.
"""

from contextlib import suppress
from itertools import zip_longest
from statistics import median
from typing import TYPE_CHECKING, Any

from grit.config import GRITConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = list[dict[str, Any]]

# Colors of Okabe & Ito (2008), which color-blind readers can distinguish; line styles repeat the distinction.
BLUE, ORANGE = "#0072B2", "#D55E00"
SIDES = {"a": r"$\Sigma_a$ (for B)", "g": r"$\Sigma_g$ (for A)"}
_AXES = {"xlabel": "eigenvalue (1 = largest)", "ylabel": "relative to the largest, λᵢ / λ₁"}
_MOST_HEATMAPS = 8


def tracked(records: Records, config: GRITConfig) -> dict[str, "Figure"]:
    """The figures that the configuration asks for; short runs lack the records for some of them."""
    drawings = [
        ("grit/spectra", spectra_figure, config.log_fisher_spectrum),
        ("grit/eigenvalues", eigenvalue_bars, config.log_eigs_bar),
        ("grit/factors", heatmaps_figure, config.log_eig_heatmaps),
    ]
    figures = {}
    for name, draw, switch in drawings:
        with suppress(ValueError, ImportError):  # ImportError: without matplotlib there are no figures
            if switch:
                figures[name] = draw(records)
    return figures


def spectra_figure(records: Records) -> "Figure":
    """Median over layers of the eigenvalues of Σ_a and Σ_g, in the first and the last record that has them."""
    figure, axes = _new_figure(9.5, 4.4, 2)
    for axis, side in zip(axes, SIDES, strict=True):
        spectra = _spectra(records, side)
        for (step, rows), color, style in ((spectra[0], ORANGE, "--"), (spectra[-1], BLUE, "-")):
            medians = [median(v for v in values if v is not None) for values in zip_longest(*rows)]
            label = f"step {step}, median of {len(rows)} layers"
            axis.plot(range(1, len(medians) + 1), medians, style, color=color, marker="o", markersize=4, label=label)
        axis.set(title=f"Spectrum of {SIDES[side]}", yscale="log", **_AXES)
        axis.legend(loc="lower left")
    return figure


def eigenvalue_bars(records: Records) -> "Figure":
    """The leading eigenvalues of every layer in the last record, as bars."""
    figure, axes = _new_figure(12.0, 4.4, 2)
    for axis, (side, title) in zip(axes, SIDES.items(), strict=True):
        _, rows = _spectra(records, side)[-1]
        width = 0.8 / len(rows)
        for i, row in enumerate(rows):
            axis.bar([n + i * width for n in range(1, len(row) + 1)], row, width, color=BLUE)
        axis.set(title=f"Eigenvalues of {title}, each layer", **_AXES)
    return figure


def heatmaps_figure(records: Records) -> "Figure":
    """Σ_a and Σ_g of the layers whose factors are in the last record, as correlations Σ_ij / √(Σ_ii Σ_jj)."""
    import numpy as np

    with_factors = [record for record in records if record.get("factors")]
    if not with_factors:
        raise ValueError("expected a final record with factors, got none")
    factors = list(with_factors[-1]["factors"].items())[:_MOST_HEATMAPS]
    figure, axes = _new_figure(max(2.4 * len(factors) + 1.4, 5.0), 5.6, len(factors), rows=2)
    for row, side in enumerate(SIDES):
        for column, (name, covariances) in enumerate(factors):
            axis, matrix = axes[row * len(factors) + column], np.array(covariances[f"cov_{side}"], dtype=float)
            scale = np.sqrt(np.clip(np.diag(matrix), 0.0, None))
            with np.errstate(divide="ignore", invalid="ignore"):
                correlation = np.ma.masked_invalid(matrix / np.outer(scale, scale))
            axis.set_facecolor("#999999")  # where a coordinate never moved
            image = axis.imshow(correlation, cmap="PuOr", vmin=-1, vmax=1, interpolation="nearest")
            axis.set_title(".".join(name.split(".")[-3:]), fontsize=8)
            axis.set_ylabel("" if column else f"{SIDES[side]}\ncoordinate")
    figure.colorbar(image, ax=axes, label="correlation (gray: no variance)", shrink=0.85)
    return figure


def _spectra(records: Records, side: str) -> list[tuple[int, list[list[float]]]]:
    """Step, and the eigenvalues of every layer relative to its largest; ValueError if no record has any."""
    places = {"spectra": "layers", "final": "spectra"}
    layers = [(r["step"], r[places[r["kind"]]]) for r in records if r.get(places.get(r["kind"], ""))]
    values = [(step, [entry.get(f"eigenvalues_{side}") or [0.0] for entry in of.values()]) for step, of in layers]
    shares = [(step, [[v / row[0] for v in row] for row in rows if row[0] > 0]) for step, rows in values]
    if not any(rows for _, rows in shares):
        raise ValueError(f"expected records with eigenvalues of Σ_{side}, got none")
    return [(step, rows) for step, rows in shares if rows]


def _new_figure(width: float, height: float, columns: int, rows: int = 1) -> tuple["Figure", "list[Axes]"]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=140, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
