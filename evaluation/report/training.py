"""Sections about what happened while the arms were trained: loss curves, updates, Fisher spectra, ranks."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np

from evaluation.report.arms import ProbeRow
from evaluation.report.blocks import (
    TONES,
    Block,
    Cell,
    Chart,
    Control,
    Dataset,
    Details,
    Panel,
    Section,
    Table,
    Text,
    spread,
    thin,
)
from evaluation.report.comparison import Report
from evaluation.report.text import seeds_text, significant

MOST_POINTS = 300
"""Of one line; more cannot be told apart on a screen."""
MOST_LAYERS = 40
"""Drawn one by one; medians are over all of them."""
MOST_STEPS = 40
"""Of a single layer's line; the medians have `MOST_POINTS`."""
MOST_SPECTRA = 8
"""Steps of which a layer's spectrum is drawn, besides the last."""
FAINT = 1e-9
"""Share of the largest eigenvalue below which one is rounding error of float32, and is not drawn."""
ALL = "all layers"
LAST = "last"
_READINGS = {
    "angle": ("Angle between the update and plain AdamW's, degrees", "angle, degrees"),
    "cos_raw_step": ("Cosine of the raw gradient and the update", "cosine"),
    "cos_raw_inner": ("Cosine of the raw gradient and what the inner optimizer got", "cosine"),
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
    "angle_to_shadow": "Off AdamW, degrees",
    "lr_ratio": "Length over AdamW's",
    "coverage": "Share of tensors",
    "twin_divergence": "Loss curves apart, A/A floors",
}
_ZERO = 1e-3
"""Of a probe's reading: what is below is rounding."""
_PARTS = {
    "train": ("Training loss", "training loss"),
    "eval": ("Loss on held-out items", "loss on held-out items"),
    "kl": ("KL to the base", "KL to the base"),
}


def loss(report: Report) -> Section | None:
    curves = report.results.curves
    if not curves:
        return None
    data = Dataset(("arm", "seed", "part", "step", "low", "nats", "high"))
    lost: dict[tuple[str, str], list[int]] = defaultdict(list)
    for run in report.results.runs:
        warm = report.results.settings[run.id].get("warmup_steps") or 0
        for part, (_, name) in _PARTS.items():
            own = curves.get((run.id, part), ())
            finite = [(step, value) for step, value in own if math.isfinite(value)]
            # The first losses, of an untrained adapter, would take up the whole axis; a logarithmic one has no zero.
            fit = [
                (step, nats) for step, nats in finite if (step > warm if part == "train" else part != "kl" or nats > 0)
            ]
            for step, *values in thin(fit, MOST_POINTS):
                data.add(run.arm, str(run.seed), part, step, *values)
            if gone := [step for step, value in own if not math.isfinite(value)]:
                lasting = not finite or finite[-1][0] < gone[0]
                since = f"from step {gone[0]}" if lasting else f"first at step {gone[0]}, later finite again"
                lost[run.arm, f"{name} not finite {since}"].append(run.seed)
    sentences: dict[str, list[str]] = defaultdict(list)
    for (arm, words), seeds in lost.items():
        sentences[arm].append(f"{words} ({seeds_text(seeds)})")
    present = {*data.levels("arm"), *sentences}
    arms = tuple(arm for arm in report.comparison.arms if arm in present)
    thinned = {row[2] for row in data.rows if row[4] is not None}
    drawn = tuple(
        Chart(
            id=f"loss-{part}",
            title=f"{title}, nats per token",
            label=f"{title} over optimizer steps, one line for each arm and seed: {', '.join(arms)}",
            draw="lines",
            options={"x": "step", "x_title": "optimizer step", "y": "nats", "detail": ["seed"], "log": part == "kl",
                     "y_title": "nats per token (log)" if part == "kl" else "nats per token",
                     "band": part in thinned, "points": part != "train"},
            where={"part": part},
        )
        for part, (title, _) in _PARTS.items()
        if part in data.levels("part")
    )  # fmt: skip
    note = "One line for each seed; the training loss from the end of the warm-up on."
    if thinned:
        note += f" Of longer runs {MOST_POINTS} points are drawn: means of stretches, in a band of all their values."
    if "kl" in data.levels("part"):
        note += " KL(base ‖ tuned) is measured in every arm, preserved or not, on texts of the base that no loss sees."
    blocks: list[Block] = [
        Text(f"{arm}: {'; '.join(words)}. No curve can show that.") for arm, words in sentences.items()
    ]
    if drawn:
        blocks.append(Panel("loss", data, drawn, arms, _seeds_control(data), note=note))
    return Section("Loss curves", tuple(blocks))


def probes(report: Report) -> Section | None:
    blocks: list[Block] = []
    found = [(row.arm, probe) for row in report.comparison.rows for probe in row.probes]
    columns = {
        name: title for name, title in _PROBE_COLUMNS.items() if any(name in probe.numbers for _, probe in found)
    }
    alike: dict[tuple[str, str, bool | None], list[ProbeRow]] = defaultdict(list)
    for arm, probe in found:
        alike[arm, probe.verdict, probe.as_claimed].append(probe)
    rows = [
        (Cell(arm, arm=arm, hint=seeds_text(probe.seed for probe in own)), _verdict(verdict, claimed),
         *(_spread(probe.numbers.get(name) for probe in own) for name in columns), _reason(own))
        for (arm, verdict, claimed), own in alike.items()
    ]  # fmt: skip
    if rows:
        headers = ("Arm", "Verdict", *columns.values(), "Why")
        blocks += [
            Text(
                "A probe follows every gradient to the weights and computes beside it what plain AdamW would have done "
                "with the same gradients. An arm that claims to precondition and does not is found here."
            ),
            Table("What the optimizers did: medians over layers and sampled steps, in brackets from seed to seed",
                  headers, rows),
        ]  # fmt: skip
    if panel := _layer_panel(report, "probe", _READINGS):
        blocks.append(Details("Layer by layer, over the steps", (panel,)))
    return Section("What the optimizers did", tuple(blocks)) if blocks else None


def _verdict(verdict: str, as_claimed: bool | None) -> Cell:
    if verdict == "no_effect" and as_claimed:
        return Cell("plain AdamW", hint="as it should be")
    hint = {True: "as claimed", False: "NOT as claimed", None: ""}[as_claimed]
    return Cell(verdict.replace("_", " "), tone="bad" if as_claimed is False else TONES.get(verdict, ""), hint=hint)


def _reason(probes: Sequence[ProbeRow]) -> str:
    """Of the first seed, where they differ."""
    first = probes[0]
    return first.reason if len({probe.reason for probe in probes}) == 1 else f"seed {first.seed}: {first.reason}"


def _spread(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    text, *ends = (
        f"{value:,.0f}" if 100 <= abs(value) < math.inf else significant(value if abs(value) > _ZERO else 0.0, 2)
        for value in (fmean(known), min(known), max(known))
    )
    return f"{text} ({ends[0]} to {ends[1]})" if len({*ends}) > 1 else text


def spectra(report: Report) -> Section | None:
    panels = (_spectrum_panel(report), _layer_panel(report, "grit", _RANKS), _final_ranks(report))
    blocks: list[Block] = [panel for panel in panels if panel]
    if panels[0]:
        words = (
            "The two r×r factors of K-FAC, of which the natural gradient is made. The faster the eigenvalues fall, the "
            "more the preconditioner turns the gradient, and the fewer directions the adapter needs."
        )
        blocks.insert(0, Text(words))
    return Section("Fisher spectra and ranks", tuple(blocks)) if blocks else None


def layer_name(text: str) -> str:
    """A module's name without what PEFT and the model put before it, the same for every source."""
    return re.sub(r"^(base_model\.)?(model\.)*", "", text) or text


def _in_order(names: Iterable[str]) -> list[str]:
    parts = {name: re.split(r"(\d+)", name) for name in set(names)}
    return sorted(parts, key=lambda name: [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts[name]])


def _seeds_control(data: Dataset) -> tuple[Control, ...]:
    seeds = data.levels("seed")
    return (Control("seed", "Seed", (("", "all"), *((s, s) for s in seeds))),) if len(seeds) > 1 else ()


def _arms(report: Report, data: Dataset) -> tuple[str, ...]:
    present = set(data.levels("arm"))
    return tuple(arm for arm in report.comparison.arms if arm in present)


def _spectrum_panel(report: Report) -> Panel | None:
    runs = {run.id: (run.arm, str(run.seed)) for run in report.results.runs}
    rows = [row for run_id in runs for row in report.results.spectra.get(run_id, ())]
    layers = spread(_in_order(layer_name(row.layer) for row in rows), MOST_LAYERS)
    steps = set(spread(sorted({row.step for row in rows}), MOST_SPECTRA))
    newest = {run_id: max(row.step for row in own) for run_id, own in report.results.spectra.items()}
    data = Dataset(("arm", "seed", "layer", "factor", "step", "number", "share"))
    for row in rows:
        names = [str(row.step)] if row.step in steps else []
        names += [LAST] if row.step == newest[row.run_id] else []
        values = [float(v) for v in row.eigenvalues if isinstance(v, int | float) and math.isfinite(v)]
        most = max(values, default=0.0)
        for name in names if layer_name(row.layer) in layers else ():
            for number, value in enumerate(values, start=1):
                if value > FAINT * most:  # what a logarithmic axis can show
                    data.add(*runs[row.run_id], layer_name(row.layer), row.factor, name, number, value / most)
    if not data.rows:
        return None
    arms = _arms(report, data)
    drawn = tuple(
        Chart(
            id=f"spectrum-{factor}",
            title=f"Eigenvalues of {title}",
            label=f"Eigenvalues of {title}, largest first, logarithmic, for each arm: {', '.join(arms)}",
            draw="lines",
            options={"x": "number", "x_title": "number of the eigenvalue", "y": "share",
                     "y_title": "share of the largest (log)", "detail": ["seed"], "log": True, "points": True},
            where={"factor": factor},
        )
        for factor, title in _FACTORS.items()
        if factor in data.levels("factor")
    )  # fmt: skip
    shown = sorted({*data.levels("step")} - {LAST}, key=int)
    controls = (
        Control("layer", "Layer", tuple((name, name) for name in layers)),
        Control("step", "Step", tuple((step, step) for step in (LAST, *shown))),
        *_seeds_control(data),
    )
    note = f"Shares of the layer's largest one; below {FAINT:g} is rounding error."
    return Panel("spectra", data, drawn, arms, controls, note=note)


class _Number(NamedTuple):
    """A finite number of a layer under the name that it has in every source."""

    arm: str
    seed: str
    name: str
    layer: str
    step: int
    value: float


def _numbers(report: Report, split: str, names: Iterable[str], *, final: bool) -> list[_Number]:
    return [
        _Number(run.arm, str(run.seed), row.name, layer_name(row.layer), row.step, row.value)
        for run in report.results.runs
        for row in report.results.layers.get(run.id, ())
        if row.split == split and row.name in names and (row.step == -1) is final and row.value is not None
    ]


def _layer_panel(report: Report, split: str, readings: Mapping[str, tuple[str, str]]) -> Panel | None:
    """Numbers over the steps, of one layer or of all as a band, one chart for each reading."""
    rows = _numbers(report, split, readings, final=False)
    if not rows:
        return None
    pooled: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for row in rows:
        pooled[row.arm, row.name, row.step].append(row.value)
    names = spread(_in_order(row.layer for row in rows), MOST_LAYERS)
    steps = sorted({row.step for row in rows})
    of_all, of_one = set(spread(steps, MOST_POINTS)), set(spread(steps, MOST_STEPS))
    data = Dataset(("arm", "seed", "name", "layer", "step", "low", "value", "high"))
    for (arm, name, step), values in pooled.items():
        if step in of_all:
            data.add(arm, "all", name, ALL, step, *map(float, np.quantile(values, (0.1, 0.5, 0.9))))
    for row in rows:
        if row.layer in names and row.step in of_one:
            data.add(*row[:5], None, row.value, None)
    arms = _arms(report, data)
    found = {name for name in readings if name in data.levels("name")}
    note = "All layers: the line is the median over layers and seeds, the band holds the middle 80% of them."
    if "cos_raw_inner" in found and all(abs(row.value - 1) < 1e-6 for row in rows if row.name == "cos_raw_inner"):
        found.remove("cos_raw_inner")
        note += " The inner optimizers got the raw gradient itself (cosine 1 everywhere)."
    if len(steps) > MOST_STEPS:
        note += f" The lines of single layers have {MOST_STEPS} steps, evenly spaced."
    if len(names) == MOST_LAYERS:
        note += f" {MOST_LAYERS} of all layers can be chosen, evenly spaced; the median is over all."
    drawn = tuple(
        Chart(
            id=f"{split}-{name}".replace("_", "-"),
            title=title,
            label=f"{title}, over optimizer steps, for each arm: {', '.join(arms)}",
            draw="lines",
            options={"x": "step", "x_title": "optimizer step", "y": "value", "y_title": unit,
                     "detail": ["seed", "layer"], "band": True, "height": 220},
            where={"name": name},
        )
        for name, (title, unit) in readings.items()
        if name in found
    )  # fmt: skip
    control = Control("layer", "Layer", ((ALL, f"{ALL}: median, 10% to 90%"), *((name, name) for name in names)))
    return Panel(f"layers-{split}", data, drawn, arms, (control,), note=note)


def _final_ranks(report: Report) -> Panel | None:
    rows = _numbers(report, "weights", ("rank",), final=True) or _numbers(report, "grit", ("rank",), final=True)
    if len({row.value for row in rows}) < 2:  # one rank everywhere needs no picture
        return None
    labels = spread(_in_order(row.layer for row in rows), MOST_LAYERS)
    data = Dataset(("arm", "seed", "layer", "value"))
    for row in rows:
        if row.layer in labels:
            data.add(row.arm, row.seed, row.layer, row.value)
    arms = _arms(report, data)
    chart = Chart(
        id="final-ranks",
        title="Rank of every layer after training",
        label=f"Rank of every layer's adapter after training, for each arm: {', '.join(arms)}",
        draw="dots",
        options={"x_title": "rank", "labels": labels, "ticks": sorted({int(row.value) for row in rows})},
    )
    return Panel("ranks", data, (chart,), arms, _seeds_control(data), wide=True)
