"""Sections about what happened while the arms were trained: loss curves, updates, Fisher spectra, ranks."""

from __future__ import annotations

from evaluation.page import charts
from evaluation.page.blocks import Block, Cell, Chart, Control, Panel, Section, Table, Text
from evaluation.page.columns import MOST_POINTS, Dataset
from evaluation.page.context import Context, arm_cell, figures, seeds_control, verdict_cell
from evaluation.page.data import ALL, FAINT, LAST, MOST_LAYERS, MOST_STEPS, Lost
from evaluation.page.words import seeds_text

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
_PROBE_COLUMNS = {
    "angle_to_shadow": "Off AdamW, degrees",
    "lr_ratio": "Length over AdamW's",
    "coverage": "Share of tensors",
    "cos_raw_preconditioned": "cos(raw, preconditioned)",
    "cos_raw_step": "cos(raw, step)",
    "twin_divergence": "Loss curves apart, A/A floors",
}


def loss(context: Context) -> Section | None:
    """Loss curves of training and of the evaluations in between."""
    curves, lost = context.data.curves, context.data.lost
    if not curves.rows and not lost:
        return None
    context.datasets["curves"] = curves
    present = {*curves.levels("arm"), *(part.arm for part in lost)}
    arms = tuple(arm for arm in context.arms if arm in present)
    parts = {"train": "Training loss", "eval": "Loss on held-out items"}
    thinned = {row[2] for row in curves.rows if row[4] is not None}
    drawn = [
        Chart(
            id=f"loss-{part}",
            title=f"{title}, nats per token",
            label=f"{title} over optimizer steps, one line for each arm and seed: {', '.join(arms)}",
            spec=charts.lines(arms, "step", "optimizer step", "loss", "nats per token", detail=["seed"],
                              band=part in thinned, points=part == "eval"),
            data="curves",
            where={"part": part},
            canvas=True,
        )
        for part, title in parts.items()
        if part in curves.levels("part")
    ]  # fmt: skip
    notes = ["One line for each seed."]
    if thinned:
        notes.append(
            f"Of longer runs {MOST_POINTS} points are drawn: means of stretches, in a band of all their values."
        )
    if len(context.data.drawn) < len(context.data.runs):
        notes.append(f"Drawn are {len(context.data.drawn)} of {len(context.data.runs)} runs, the first seeds of each.")
    blocks: list[Block] = [Text(sentence) for sentence in _not_finite(lost)]
    if drawn:
        controls = seeds_control(curves.levels("seed"))
        blocks.append(Panel("loss", tuple(drawn), controls, arms, " ".join(notes), dashed=charts.dashed(arms)))
    return Section("Loss curves", tuple(blocks))


def _not_finite(lost: tuple[Lost, ...]) -> list[str]:
    """Whose losses no curve can show, and from which step on."""
    found: dict[str, list[str]] = {}
    for part in lost:
        where = "training loss" if part.part == "train" else "loss on held-out items"
        since = f"from step {part.step}" if part.lasting else f"first at step {part.step}, later finite again"
        found.setdefault(part.arm, []).append(f"{where} not finite {since} ({seeds_text(part.seeds)})")
    return [f"{arm}: {'; '.join(words)}. No curve can show that." for arm, words in found.items()]


def probes(context: Context) -> Section | None:
    """Whether the optimizers moved as they claim, and the angles over the steps."""
    blocks: list[Block] = []
    known = {name for row in context.comparison.rows for probe in row.probes for name in probe.numbers}
    columns = {name: title for name, title in _PROBE_COLUMNS.items() if name in known}
    rows = [
        (
            arm_cell(row.arm, probe.seed),
            verdict_cell(probe.verdict),
            Cell("yes" if probe.as_claimed else "NO", tone="good" if probe.as_claimed else "bad"),
            *(Cell(figures(probe.numbers.get(name))) for name in columns),
            Cell(probe.reason),
        )
        for row in context.comparison.rows
        for probe in row.probes
    ]
    if rows:
        blocks.append(
            Text(
                "A probe follows every gradient to the weights and computes beside it what plain AdamW would have done "
                "with the same gradients. An arm that claims to precondition and does not is found here. The baseline "
                "has to be plain AdamW: its verdict no_effect is what it claims."
            )
        )
        headers = ("Run", "Verdict", "As claimed", *columns.values(), "Why")
        blocks.append(Table("What the optimizers did: medians over layers and sampled steps", headers, tuple(rows),
                            frozenset({1, 2, len(headers) - 1})))  # fmt: skip
    panel = _layer_panel(context, "probe", _READINGS)
    if panel:
        blocks.append(panel)
    return Section("What the optimizers did", tuple(blocks)) if blocks else None


def spectra(context: Context) -> Section | None:
    """Eigenvalues of the Fisher factors, and the ranks that follow from them."""
    blocks: list[Block] = []
    data = context.data.spectra
    if data.rows:
        context.datasets["spectra"] = data
        arms = _arms(context, data)
        steps = [step for step in data.levels("step") if step != LAST]
        controls = (
            Control("layer", "Layer", tuple((name, name) for name in context.data.spectrum_layers)),
            Control("step", "Step", ((LAST, LAST), *((step, step) for step in sorted(steps, key=int)))),
            *seeds_control(data.levels("seed")),
        )
        factors = {"a": "Σ_a: activations behind A", "g": "Σ_g: gradients that reach A's output"}
        drawn = tuple(
            Chart(
                id=f"spectrum-{factor}",
                title=f"Eigenvalues of {title}",
                label=f"Eigenvalues of {title}, largest first, logarithmic, for each arm: {', '.join(arms)}",
                spec=charts.lines(arms, "number", "number of the eigenvalue", "eigenvalue", "eigenvalue (log)",
                                  detail=["seed"], log=True, points=True),
                data="spectra",
                where={"factor": factor},
            )
            for factor, title in factors.items()
            if factor in data.levels("factor")
        )  # fmt: skip
        blocks += [
            Text(
                "The two r×r factors of K-FAC, of which the natural gradient is made. The faster the eigenvalues fall, "
                "the more the preconditioner turns the gradient, and the fewer directions the adapter needs."
            ),
            Panel("spectra", drawn, controls, arms, f"Eigenvalues below {FAINT:g} of the largest one are rounding "
                  "error and are not drawn.", dashed=charts.dashed(arms)),
        ]  # fmt: skip
    panel = _layer_panel(context, "grit", _RANKS)
    if panel:
        blocks.append(panel)
    final = _final_ranks(context)
    if final:
        blocks.append(final)
    return Section("Fisher spectra and ranks", tuple(blocks)) if blocks else None


def _arms(context: Context, data: Dataset) -> tuple[str, ...]:
    present = set(data.levels("arm"))
    return tuple(arm for arm in context.arms if arm in present)


def _layer_panel(context: Context, split: str, readings: dict[str, tuple[str, str]]) -> Panel | None:
    """Numbers over the steps, of one layer or of all as a band, one chart for each reading."""
    rows = [row for row in context.data.layers.rows if row[2] == split and row[3] in readings and row[5] != -1]
    if not rows:
        return None
    data = Dataset(context.data.layers.names, rows)
    context.datasets[split] = data
    arms = _arms(context, data)
    present = set(data.levels("layer"))
    names = [name for name in context.data.layer_names if name in present]
    options = ((ALL, f"{ALL}: median, 10% to 90%"), *((name, name) for name in names))
    found = {name for name in readings if name in data.levels("name")}
    note = "All layers: the line is the median over layers and seeds, the band holds the middle 80% of them."
    if "cos_raw_inner" in found and all(
        abs(float(row[7] or 0) - 1) < 1e-6 for row in rows if row[3] == "cos_raw_inner"
    ):
        found.remove("cos_raw_inner")
        note += " The inner optimizers got the raw gradient itself (cosine 1 everywhere)."
    drawn = tuple(
        Chart(
            id=f"{split}-{name}".replace("_", "-"),
            title=title,
            label=f"{title}, over optimizer steps, for each arm: {', '.join(arms)}",
            spec=charts.lines(
                arms, "step", "optimizer step", "value", unit, detail=["seed", "layer"], band=True, height=220
            ),
            data=split,
            where={"name": name},
            canvas=True,
        )
        for name, (title, unit) in readings.items()
        if name in found
    )
    if len(data.levels("step")) > MOST_STEPS:
        note += f" The lines of single layers have {MOST_STEPS} steps, evenly spaced."
    if len(names) == MOST_LAYERS:
        note += f" {MOST_LAYERS} of all layers can be chosen, evenly spaced; the median is over all."
    controls = (Control("layer", "Layer", options),)
    return Panel(f"layers-{split}", drawn, controls, arms, note, dashed=charts.dashed(arms))


def _final_ranks(context: Context) -> Panel | None:
    """What rank every layer had at the end."""
    wanted = {"weights": "rank", "grit": "rank"}
    source = context.data.layers.rows
    rows = [row for row in source if row[4] != ALL and row[5] == -1 and wanted.get(str(row[2])) == row[3]]
    if any(row[2] == "weights" for row in rows):
        rows = [row for row in rows if row[2] == "weights"]
    if len({row[7] for row in rows}) < 2:  # one rank everywhere needs no picture
        return None
    data = Dataset(context.data.layers.names, rows)
    context.datasets["ranks"] = data
    arms = _arms(context, data)
    present = set(data.levels("layer"))
    labels = [name for name in context.data.layer_names if name in present]
    chart = Chart(
        id="final-ranks",
        title="Rank of every layer after training",
        label=f"Rank of every layer's adapter after training, for each arm: {', '.join(arms)}",
        spec=charts.dots(arms, "rank", labels, sorted({int(float(row[7] or 0)) for row in rows})),
        data="ranks",
    )
    return Panel("ranks", (chart,), seeds_control(data.levels("seed")), arms, wide=True)
