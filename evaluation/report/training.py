"""Chapters about what happened during training: loss curves, what the optimizers did, Fisher spectra and ranks."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from db.records import FINAL_STEP
from evaluation.report.blocks import TONES, Block, Cell, Chart, Control, Dataset, Panel, Section, Table, Text
from evaluation.report.comparison import Comparison
from evaluation.report.results import Probe
from evaluation.report.text import seeds_text, significant

MOST_POINTS = 300
"""Of one line; a screen cannot show more."""
MOST_LAYERS = 40
"""Layers whose spectra can be chosen."""
MOST_SPECTRA = 8
"""Steps whose spectra are drawn, the last among them."""
FAINT = 1e-9
"""Share of the largest eigenvalue below which one is float32 rounding error, and is not drawn."""
_READINGS = {
    "angle": ("Angle between the update and plain AdamW's, degrees", "angle, degrees"),
    "cos_raw_step": ("Cosine of the raw gradient and the update", "cosine"),
    "cos_raw_inner": ("Cosine of the raw gradient and the inner optimizer's input", "cosine"),
    "lr_ratio": ("Length of the update over plain AdamW's", "ratio"),
}
_RANKS = {
    "effective_rank_a": ("Effective rank of the activations' factor Σ_a", "effective rank"),
    "effective_rank_g": ("Effective rank of the gradients' factor Σ_g", "effective rank"),
    "kept_rank": ("Directions that the rank rule keeps", "directions"),
    "rank": ("Rank of the tensors", "rank"),
}
_FACTORS = {"a": "Σ_a: activations behind A", "g": "Σ_g: gradients that reach A's output"}
_PROBE_COLUMNS = {
    "angle_to_shadow": "Angle to AdamW, degrees",
    "lr_ratio": "Length vs AdamW's",
    "coverage": "Share of tensors",
}
_ZERO = 1e-3
"""A probe's reading below this is rounding."""
_PARTS = {"train": "Training loss", "eval": "Loss on held-out items", "kl": "KL to the base"}


# Loss curves


def loss(comparison: Comparison) -> Section | None:
    if not any(run.curves for run in comparison.runs):
        return None
    data = Dataset(("arm", "seed", "part", "step", "nats"))
    divergences: dict[tuple[str, str], list[int]] = defaultdict(list)
    for run in comparison.runs:
        warmup = run.settings.get("warmup_steps") or 0
        for part, title in _PARTS.items():
            curve = run.curves.get(part, ())
            finite = [(step, nats) for step, nats in curve if math.isfinite(nats)]
            # The first losses, of an untrained adapter, would fill the whole axis; a logarithmic axis has no zero.
            points = [(s, nats) for s, nats in finite if (s > warmup if part == "train" else part != "kl" or nats > 0)]
            for step, nats in spread(points, MOST_POINTS):
                data.add(run.arm, str(run.seed), part, step, nats)
            if diverged := [step for step, nats in curve if not math.isfinite(nats)]:
                divergences[run.arm, f"{title[0].lower()}{title[1:]} not finite from step {diverged[0]}"].append(
                    run.seed
                )
    sentences: dict[str, list[str]] = defaultdict(list)
    for (arm, words), seeds in divergences.items():
        sentences[arm].append(f"{words} ({seeds_text(seeds)})")
    blocks: list[Block] = [
        Text(f"{arm}: {'; '.join(words)}. No curve can show that.") for arm, words in sentences.items()
    ]
    parts = data.levels("part")
    charts = []
    for part in (part for part in _PARTS if part in parts):
        log = part == "kl"
        options = {"detail": ["seed"], "log": log, "points": part != "train"}
        axes = ("step", "optimizer step", "nats", f"nats per token{' (log)' * log}")
        heading = f"{_PARTS[part]}, nats per token"
        charts.append(_lines(f"loss-{part}", heading, axes, {"part": part}, **options))
    note = f"One line per seed, of at most {MOST_POINTS} points; the training loss starts after the warm-up."
    if "kl" in parts:
        note += " KL(base ‖ tuned) is measured for every arm, preserved or not, on base texts that no loss sees."
    if charts:
        blocks.append(Panel("loss", data, tuple(charts), note=note))
    return Section("Loss curves", tuple(blocks))


def spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the values, at least two, evenly spaced, including the first and the last."""
    if len(values) <= most:
        return list(values)
    places = sorted({round(at * (len(values) - 1) / (most - 1)) for at in range(most)})
    return [values[at] for at in places]


# What the optimizers did


def probes(comparison: Comparison) -> Section | None:
    alike: dict[tuple[str, str, bool | None], list[Probe]] = defaultdict(list)
    for row in comparison.rows:
        for probe in row.probes:
            alike[row.arm, probe.verdict, probe.as_claimed].append(probe)
    measured = {name for group in alike.values() for probe in group for name in probe.numbers}
    columns = {name: title for name, title in _PROBE_COLUMNS.items() if name in measured}
    lines = [
        (Cell(arm, arm=arm, hint=seeds_text(probe.seed for probe in group)), _verdict(verdict, claimed),
         *(_range(probe.numbers.get(name) for probe in group) for name in columns), _reason(group))
        for (arm, verdict, claimed), group in alike.items()
    ]  # fmt: skip
    blocks: list[Block] = []
    if lines:
        words = (
            "A probe follows every gradient to the weights and computes what plain AdamW would have done with the same "
            "gradients. It exposes an arm that claims to precondition and does not."
        )
        caption = "What the optimizers did: medians over layers and sampled steps, with the range of seeds in brackets"
        blocks = [Text(words), Table(caption, ("Arm", "Verdict", *columns.values(), "Why"), lines)]
    if panel := _layer_panel(comparison, "probe", _READINGS):
        blocks.append(panel)
    return Section("What the optimizers did", tuple(blocks)) if blocks else None


def _verdict(verdict: str, as_claimed: bool | None) -> Cell:
    if verdict == "no_effect" and as_claimed:
        return Cell("plain AdamW", hint="as it should be")
    hint = {True: "as claimed", False: "NOT as claimed", None: ""}[as_claimed]
    return Cell(verdict.replace("_", " "), tone="bad" if as_claimed is False else TONES.get(verdict, ""), hint=hint)


def _reason(probes: Sequence[Probe]) -> str:
    """The reason of the first seed, where seeds differ."""
    first = probes[0]
    return first.reason if len({probe.reason for probe in probes}) == 1 else f"seed {first.seed}: {first.reason}"


def _range(values: Iterable[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "–"
    text, *ends = (
        f"{value:,.0f}" if 100 <= abs(value) < math.inf else significant(value if abs(value) > _ZERO else 0.0, 2)
        for value in (fmean(numbers), min(numbers), max(numbers))
    )
    return f"{text} ({ends[0]} to {ends[1]})" if len({*ends}) > 1 else text


# Fisher spectra and ranks


def spectra(comparison: Comparison) -> Section | None:
    panels = (_spectrum_panel(comparison), _layer_panel(comparison, "grit", _RANKS))
    blocks: list[Block] = [panel for panel in panels if panel]
    if panels[0]:
        words = (
            "The two r×r factors of K-FAC from which the natural gradient is made. The faster the eigenvalues fall, "
            "the more the preconditioner turns the gradient, and the fewer directions the adapter needs."
        )
        blocks.insert(0, Text(words))
    return Section("Fisher spectra and ranks", tuple(blocks)) if blocks else None


def _in_order(names: Iterable[str]) -> list[str]:
    parts = {name: re.split(r"(\d+)", name) for name in set(names)}
    return sorted(parts, key=lambda name: [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts[name]])


def _lines(name: str, title: str, axes: tuple[str, str, str, str], where: Mapping[str, str], **options: Any) -> Chart:
    """A chart of lines; `axes` are column and title across, then up."""
    titles = dict(zip(("x", "x_title", "y", "y_title"), axes, strict=True))
    return Chart(name, title, "lines", titles | options, where)


def _spectrum_panel(comparison: Comparison) -> Panel | None:
    rows = [(run, row) for run in comparison.runs for row in run.spectra]
    layers = spread(_in_order(row.layer for _, row in rows), MOST_LAYERS)
    steps = set(spread(sorted({row.step for _, row in rows}), MOST_SPECTRA))
    data = Dataset(("arm", "seed", "layer", "factor", "step", "number", "share"))
    for run, row in rows:
        values = [float(v) for v in row.eigenvalues if isinstance(v, int | float) and math.isfinite(v)]
        most = max(values, default=0.0)
        for number, value in enumerate(values, start=1) if row.layer in layers and row.step in steps else ():
            if value > FAINT * most:  # what a logarithmic axis can show
                data.add(run.arm, str(run.seed), row.layer, row.factor, str(row.step), number, value / most)
    if not data.rows:
        return None
    axes = ("number", "number of the eigenvalue", "share", "share of the largest (log)")
    charts = tuple(
        _lines(f"spectrum-{factor}", f"Eigenvalues of {title}", axes, {"factor": factor}, detail=["seed"],
               log=True, points=True)
        for factor, title in _FACTORS.items()
        if factor in data.levels("factor")
    )  # fmt: skip
    controls = (
        Control("layer", "Layer", tuple((name, name) for name in layers)),
        Control("step", "Step", tuple((step, step) for step in sorted(data.levels("step"), key=int, reverse=True))),
    )
    note = f"Shares of the layer's largest eigenvalue; below {FAINT:g} is rounding error."
    return Panel("spectra", data, charts, controls, note=note)


def _layer_panel(comparison: Comparison, split: str, readings: Mapping[str, tuple[str, str]]) -> Panel | None:
    """Numbers of layers over the steps, as a median in a band; one chart for each reading."""
    pooled: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for run in comparison.runs:
        for row in run.layers:
            if row.split == split and row.step != FINAL_STEP and row.value is not None:
                pooled[run.arm, row.name, row.step].append(row.value)
    if not pooled:
        return None
    steps = set(spread(sorted({step for _, _, step in pooled}), MOST_POINTS))
    data = Dataset(("arm", "name", "step", "low", "value", "high"))
    for (arm, name, step), values in pooled.items():
        if step in steps:
            data.add(arm, name, step, *map(float, np.quantile(values, (0.1, 0.5, 0.9))))
    note = "The line is the median over layers and seeds, the band holds the middle 80%."
    charts = tuple(
        _lines(f"{split}-{name}".replace("_", "-"), title, ("step", "optimizer step", "value", unit),
               {"name": name}, detail=[], band=True, height=220)
        for name, (title, unit) in readings.items()
        if name in data.levels("name")
    )  # fmt: skip
    return Panel(f"layers-{split}", data, charts, note=note)
