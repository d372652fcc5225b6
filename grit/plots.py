"""Pictures of what GRIT wrote to `grit_log.jsonl`: spectra, factors, ranks. PNG files; needs matplotlib.

matplotlib is imported where it is used, and by its objects (no pyplot), so that nothing global changes.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    log_scale,
    natural,
    new_figure,
    save,
    say,
    short_names,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Log = Path | str | list[dict[str, Any]]

SIDES = {"a": r"$\Sigma_a$ (for B)", "g": r"$\Sigma_g$ (for A)"}
_FLOOR = 1e-9  # relative eigenvalues below this are rounding
_MOST_HEATMAPS = 8


def plot_spectra(log: Log, out: Path) -> Path:
    """Eigenvalues of Σ_a and Σ_g in the first and the last record, and effective ranks over the steps.

    Args:
        log: `grit_log.jsonl`, or its records (`GRITManager.history`).
        out: The PNG file; its folder is made.

    Returns:
        `out`.

    Raises:
        ValueError: no record has eigenvalues, or the file is not such a log.
    """
    places = {"spectra": "layers", "final": "spectra"}
    records = [(r["step"], r[places[r["kind"]]]) for r in _read(log) if r.get(places.get(r["kind"], ""))]
    known = {side: [(step, layers) for step, layers in records if _eigenvalues(layers, side)] for side in SIDES}
    if not any(known.values()):
        raise ValueError(
            "expected records with eigenvalues (kinds 'spectra' and 'final'), found none: no factor had seen enough "
            "tokens, or log_fisher_spectrum was off and training did not end"
        )
    figure, axes = new_figure(14.0, 4.4, 3)
    for axis, (side, title) in zip(axes, SIDES.items(), strict=False):
        axis.set_title(f"Spectrum of {title}")
        if not known[side]:
            say(axis, f"no eigenvalues of {title.split()[0]} in this log")
            continue
        if side == "g" and known["a"]:
            axis.sharey(axes[0])
        first, last = known[side][0], known[side][-1]
        styles = [(first, ORANGE, "--", "first record")] if first is not last else []
        for (step, layers), colour, style, name in [*styles, (last, BLUE, "-", "last record")]:
            _spectrum(axis, _eigenvalues(layers, side), colour, style, f"{name}, step {step}")
        log_scale(axis)
        whole_numbers(axis)
        axis.set_xlabel("eigenvalue (1 = largest)")
        axis.set_ylabel("relative to the largest, λᵢ / λ₁")
        axis.legend(title="median of layers (thin: each layer)", loc="lower left")
    _effective_ranks(axes[2], known)
    return save(figure, out)


def _spectrum(axis: "Axes", values: list[list[float]], colour: str, style: str, label: str) -> None:
    import numpy as np

    rows = [[v / row[0] for v in row] for row in values]
    rows = [[v if v > _FLOOR else float("nan") for v in row] for row in rows]
    for row in rows:
        axis.plot(range(1, len(row) + 1), row, style, color=colour, linewidth=0.7, alpha=0.35)
    longest = max(len(row) for row in rows)
    columns = [[row[i] for row in rows if len(row) > i and row[i] == row[i]] for i in range(longest)]
    medians = [float(np.median(column)) if column else float("nan") for column in columns]
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
    axis.set_title("Effective rank")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("effective rank (directions)")
    axis.set_ylim(0, 1.35 * axis.dataLim.y1)  # room for the legend
    whole_numbers(axis)
    axis.legend(title="median of layers (band: 10th to 90th percentile)", loc="upper left")


def plot_heatmaps(log: Log, out: Path) -> Path:
    """Σ_a and Σ_g of the layers whose factors are in the last record, as correlations Σ_ij / √(Σ_ii Σ_jj).

    Args, returns: as `plot_spectra`.

    Raises:
        ValueError: no record has factors (`log_eig_heatmaps` was off, or training did not end).
    """
    import numpy as np

    found = [r for r in _read(log) if r.get("factors")]
    if not found:
        raise ValueError(
            "expected a final record with factors, found none: set log_eig_heatmaps to true and let training end"
        )
    step, factors = found[-1]["step"], found[-1]["factors"]
    layers = sorted(factors, key=natural)[:_MOST_HEATMAPS]
    which = f", first {len(layers)} of {len(factors)} layers" if len(layers) < len(factors) else ""
    names = short_names(layers)
    figure, axes = new_figure(max(2.4 * len(layers) + 1.4, 5.0), 5.6, 2 * len(layers), columns=len(layers))
    figure.suptitle(f"Correlations between coordinates of the rank, step {step}{which}", fontsize=11)
    image = None
    for column, name in enumerate(layers):
        for row, side in enumerate(SIDES):
            axis, matrix = axes[row * len(layers) + column], np.array(factors[name][f"cov_{side}"], dtype=float)
            scale = np.sqrt(np.clip(np.diag(matrix), 0.0, None))
            with np.errstate(divide="ignore", invalid="ignore"):
                correlation = np.ma.masked_invalid(matrix / np.outer(scale, scale))
            axis.set_facecolor(GREY)  # where a coordinate never moved
            image = axis.imshow(correlation, cmap="PuOr", vmin=-1, vmax=1, interpolation="nearest")
            ticks = sorted({0, (len(matrix) - 1) // 2, len(matrix) - 1})
            axis.set_xticks(ticks, [str(t + 1) for t in ticks])
            axis.set_yticks(ticks, [str(t + 1) for t in ticks])
            if row == 0:
                axis.set_title(names[name], fontsize=9)
            else:
                axis.set_xlabel("coordinate")
            if column == 0:
                axis.set_ylabel(f"{SIDES[side]}\ncoordinate")
    if image is not None:
        figure.colorbar(image, ax=axes, label="correlation (grey: no variance)", shrink=0.85)
    return save(figure, out)


def plot_ranks(log: Log, out: Path) -> Path:
    """The rank that each layer kept, and how much each reprojection changed ΔW.

    Args, returns: as `plot_spectra`.

    Raises:
        ValueError: no record tells ranks.
    """
    records = _read(log)
    ranks = {name: entry for name, entry in sorted(_ranks(records).items(), key=lambda item: natural(item[0]))}
    if not ranks:
        raise ValueError("expected records with ranks (kinds 'final', 'reprojection' or 'spectra'), found none")
    figure, axes = new_figure(13.0, min(max(4.4, 1.6 + 0.22 * len(ranks)), 40.0), 2)
    _rank_bars(axes[0], ranks)
    _changes(axes[1], [r for r in records if r["kind"] == "reprojection"])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=4)
    if len(ranks) > 25:
        axes[1].set_box_aspect(0.8)
        axes[1].set_anchor("N")
    return save(figure, out)


def _ranks(records: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Layer → base (rank at the start), r (rank of the tensors), k_a and k_b (directions kept); the latest of each."""
    ranks: dict[str, dict[str, int]] = {}
    for record in records:
        layers = record.get("ranks" if record["kind"] == "final" else "layers")
        if record["kind"] not in ("final", "reprojection", "spectra") or not isinstance(layers, dict):
            continue
        for name, said in layers.items():
            entry = ranks.setdefault(name, {"base": said.get("base_r", said["r"])})
            entry["base"] = max(said.get("base_r", 0), said["r"], entry["base"])
            entry["r"] = said["r"]
            for side in "ab":
                for key in ("k", f"k_{side}", f"final_k_{side}"):
                    if key in said:
                        entry[f"k_{side}"] = said[key]
            if record["kind"] == "reprojection" and record.get("shrink"):
                entry["r"] = min(said["k_a"], said["k_b"])
    return ranks


def _rank_bars(axis: "Axes", ranks: dict[str, dict[str, int]]) -> None:
    names = short_names(ranks)
    places = list(range(len(ranks)))
    axis.barh(places, [e["base"] for e in ranks.values()], height=0.8, color="#E4E4E4", label="rank at the start")
    axis.barh(places, [e["r"] for e in ranks.values()], height=0.5, color=SKY, label="rank of the tensors")
    same = all(entry.get("k_a") == entry.get("k_b") for entry in ranks.values())
    for side, marker, colour in (("a", "o", BLUE),) if same else (("a", "o", BLUE), ("b", "x", ORANGE)):
        known = {place: entry[f"k_{side}"] for place, entry in enumerate(ranks.values()) if f"k_{side}" in entry}
        label = "directions kept, k" if same else f"directions kept, k of {'A' if side == 'a' else 'B'}"
        axis.scatter(list(known.values()), list(known), marker=marker, s=28, color=colour, zorder=3, label=label)
    axis.set_yticks(places, [names[name] for name in ranks], fontsize=8 if len(ranks) <= 150 else 1200 / len(ranks))
    axis.set_ylim(len(ranks) - 0.4, -0.6)
    axis.set_xlim(left=0)
    axis.set_title("Rank of each layer")
    axis.set_xlabel("rank (directions)")
    axis.grid(axis="y", visible=False)
    whole_numbers(axis)


def _changes(axis: "Axes", events: list[dict[str, Any]]) -> None:
    import numpy as np

    axis.set_title("Change of ΔW at each reprojection")
    points = [(e["step"], float(said["relative_change"])) for e in events for said in e["layers"].values()]
    points = [(step, change) for step, change in points if change < float("inf")]
    if not points:
        say(axis, "no reprojection in this log")
        return
    axis.scatter([s for s, _ in points], [c for _, c in points], s=14, color=GREY, label="each layer", zorder=2)
    steps = sorted({step for step, _ in points})
    for quantile, colour, style, label in ((1.0, ORANGE, "--", "largest"), (0.5, BLUE, "-", "median of layers")):
        line = [float(np.quantile([c for s, c in points if s == step], quantile)) for step in steps]
        axis.plot(steps, line, style, color=colour, marker="o", markersize=5, linewidth=2, label=label, zorder=3)
    axis.set_yscale("symlog", linthresh=0.01)  # linear below: 0 is nothing cut off, 1e-8 is rounding
    axis.set_ylim(bottom=-1e-3, top=max(1.0, 1.3 * max(change for _, change in points)))
    axis.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("relative change, ‖ΔW′ − ΔW‖ / ‖ΔW‖")
    whole_numbers(axis)
    axis.legend(loc="best")


def _read(log: Log) -> list[dict[str, Any]]:
    if isinstance(log, list):
        return [r for r in log if "kind" in r and "step" in r]
    lines = Path(log).read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records.append({"step": record["step"], "kind": record["kind"], **record})
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and isinstance(error, ValueError):
                break  # cut short by a kill
            raise ValueError(f"{log}: line {number}: expected a record of GRIT, got {line[:60]!r}") from error
    return records


def _eigenvalues(layers: dict[str, Any], side: str) -> list[list[float]]:
    rows = [entry.get(f"eigenvalues_{side}") or [0.0] for entry in layers.values()]
    return [row for row in rows if row[0] > 0]
