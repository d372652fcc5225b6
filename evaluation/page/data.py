"""What the page shows besides the comparison, read from the database: curves, layers, spectra, files, starts."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, tuple_
from sqlalchemy.orm import Session

from db import queries
from db.columns import FINAL_STEP
from db.models import Artifact, Environment, Metric, Run
from db.models_attempts import Attempt
from db.models_layers import LayerMetric, Spectrum
from evaluation.comparison import Comparison, compared_runs
from evaluation.page.columns import MOST_POINTS, Dataset, quantile, spread, thin

MOST_RUNS = 40
"""Drawn in curves and spectra, and shown in the sample browser."""
MOST_LAYERS = 40
"""Drawn one by one; medians are over all of them."""
MOST_STEPS = 40
"""Of a single layer's line; the medians have `MOST_POINTS`."""
MOST_SPECTRA = 8
"""Steps of which a layer's spectrum is kept, besides the last."""
LAYER_NUMBERS = {
    "probe": ("angle", "cos_raw_step", "cos_raw_inner", "lr_ratio"),
    "grit": ("effective_rank_a", "effective_rank_g", "kept_rank", "rank"),
    "weights": ("rank",),
}
"""Split -> names of what is drawn for each layer."""
FAINT = 1e-9
"""Share of the largest eigenvalue below which one is rounding error of float32, and is not drawn."""
ALL = "all layers"
LAST = "last"

FinalMetrics = dict[int, dict[tuple[str, str], queries.FinalMetric]]


@dataclass(frozen=True)
class Lost:
    """Losses of an arm that were NaN or infinite.

    Attributes:
        part: train or eval.
        step: The first of them.
        lasting: None after it was finite.
        seeds: Those of which all this holds.
    """

    arm: str
    part: str
    step: int
    lasting: bool
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class PageData:
    """What the sections need.

    Attributes:
        runs: Those of the comparison, in its order; `drawn` are the ones with curves, spectra and samples.
        metrics: Run id -> (split, name) -> final number.
        curves: Columns arm, seed, part (train or eval), step, low, loss, high (nats per token); bounds where a point
            stands for several steps.
        lost: Losses that were no finite number.
        layers: Columns arm, seed, split, name, layer, step, low, value, high; the layer `ALL` has the median of all
            layers with their 10% and 90% quantiles, others have no bounds.
        layer_names: All layers that were logged or measured, in the model's order.
        spectra: Columns arm, seed, layer, factor, step (a text, and `LAST`), number, eigenvalue.
        spectrum_layers: Layers that have spectra.
    """

    runs: tuple[Run, ...]
    drawn: tuple[Run, ...]
    metrics: FinalMetrics
    curves: Dataset
    lost: tuple[Lost, ...]
    layers: Dataset
    layer_names: tuple[str, ...]
    spectra: Dataset
    spectrum_layers: tuple[str, ...]
    artifacts: tuple[Artifact, ...]
    environments: dict[int, Environment]
    attempts: tuple[Attempt, ...]


def load(session: Session, comparison: Comparison) -> PageData:
    """Read the runs that a comparison is about.

    Args:
        session: Of the database from which the comparison was made.
        comparison: Perhaps of some arms or seeds only.
    """
    runs = tuple(compared_runs(session, comparison))
    drawn = runs[:MOST_RUNS] if len(runs) <= MOST_RUNS else _first_seeds(runs)
    curves, lost = _curves(session, drawn)
    layers, names = _layers(session, drawn)
    spectra, with_spectra = _spectra(session, drawn)
    ids = [run.id for run in runs]
    files = session.scalars(
        select(Artifact).where(Artifact.run_id.in_([run.id for run in drawn])).order_by(Artifact.id)
    )
    places = session.scalars(select(Environment).where(Environment.id.in_([run.environment_id for run in runs])))
    return PageData(
        runs=runs,
        drawn=drawn,
        metrics=queries.final_metrics(session, ids),
        curves=curves,
        lost=lost,
        layers=layers,
        layer_names=names,
        spectra=spectra,
        spectrum_layers=with_spectra,
        artifacts=tuple(files),
        environments={place.id: place for place in places},
        attempts=tuple(session.scalars(select(Attempt).order_by(Attempt.started, Attempt.id))),
    )


def _first_seeds(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """As many runs as are drawn, the first seeds of every arm."""
    by_arm: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_arm[run.arm].append(run)
    each = max(1, MOST_RUNS // len(by_arm))
    return tuple(run for own in by_arm.values() for run in own[:each])[:MOST_RUNS]


def layer_name(text: str) -> str:
    """A module's name without what PEFT and the model put before it, the same for every source."""
    return re.sub(r"^(base_model\.)?(model\.)*", "", text) or text


def _in_order(names: Iterable[str]) -> list[str]:
    """Layer 2 before layer 10."""
    return sorted(set(names), key=lambda name: [(not p.isdigit(), int(p) if p.isdigit() else 0, p)
                                                for p in re.split(r"(\d+)", name)])  # fmt: skip


def _curves(session: Session, runs: tuple[Run, ...]) -> tuple[Dataset, tuple[Lost, ...]]:
    found: dict[tuple[int, str], list[tuple[int, float]]] = defaultdict(list)
    gone: dict[tuple[int, str], list[int]] = defaultdict(list)
    query = select(Metric.run_id, Metric.split, Metric.step, Metric.value).where(
        Metric.run_id.in_([run.id for run in runs]),
        Metric.name == "loss",
        Metric.split.in_(("train", "eval")),
        Metric.step != FINAL_STEP,
    )
    for run_id, split, step, value in session.execute(query.order_by(Metric.step)):
        if value is None or not math.isfinite(value):
            gone[run_id, split].append(step)
        else:
            found[run_id, split].append((step, value))
    curves = Dataset(("arm", "seed", "part", "step", "low", "loss", "high"))
    lost: dict[tuple[str, str, int, bool], list[int]] = defaultdict(list)
    for run in runs:
        for part in ("train", "eval"):
            own, steps = found[run.id, part], gone[run.id, part]
            for step, *numbers in thin(own):
                curves.add(run.arm, str(run.seed), part, step, *numbers)
            if steps:
                lost[run.arm, part, steps[0], not own or own[-1][0] < steps[0]].append(run.seed)
    return curves, tuple(Lost(*key, tuple(seeds)) for key, seeds in lost.items())


def _layers(session: Session, runs: tuple[Run, ...]) -> tuple[Dataset, tuple[str, ...]]:
    """Numbers of layers: of each over all layers and seeds of an arm, and one by one."""
    arms = {run.id: (run.arm, str(run.seed)) for run in runs}
    wanted = [(split, name) for split, names in LAYER_NUMBERS.items() for name in names]
    query = select(
        LayerMetric.run_id, LayerMetric.split, LayerMetric.name, LayerMetric.layer, LayerMetric.step, LayerMetric.value
    ).where(
        LayerMetric.run_id.in_(arms), tuple_(LayerMetric.split, LayerMetric.name).in_(wanted)
    ).order_by(LayerMetric.run_id, LayerMetric.step)  # fmt: skip
    single: list[tuple[str, str, str, str, str, int, float]] = []
    pooled: dict[tuple[str, str, str, int], list[float]] = defaultdict(list)
    steps: dict[str, set[int]] = defaultdict(set)
    for run_id, split, name, layer, step, number in session.execute(query):
        if number is None:
            continue
        arm, seed = arms[run_id]
        single.append((arm, seed, split, name, layer_name(layer), step, number))
        pooled[arm, split, name, step].append(number)
        steps[split].add(step)
    names = _in_order({row[4] for row in single})
    shown = set(spread(names, MOST_LAYERS))
    of_all, of_one = (
        {s: set(spread(sorted(own), most)) for s, own in steps.items()} for most in (MOST_POINTS, MOST_STEPS)
    )
    found = Dataset(("arm", "seed", "split", "name", "layer", "step", "low", "value", "high"))
    for (arm, split, name, step), values in pooled.items():
        if step in of_all[split]:
            low, middle, high = (quantile(values, share) for share in (0.1, 0.5, 0.9))
            found.add(arm, "all", split, name, ALL, step, low, middle, high)
    for arm, seed, split, name, layer, step, number in single:
        if layer in shown and step in of_one[split]:
            found.add(arm, seed, split, name, layer, step, None, number, None)
    return found, tuple(name for name in names if name in shown)


def _spectra(session: Session, runs: tuple[Run, ...]) -> tuple[Dataset, tuple[str, ...]]:
    arms = {run.id: (run.arm, str(run.seed)) for run in runs}
    query = select(
        Spectrum.run_id, Spectrum.layer, Spectrum.factor, Spectrum.step, Spectrum.eigenvalues
    ).where(Spectrum.run_id.in_(arms)).order_by(Spectrum.run_id, Spectrum.step)  # fmt: skip
    rows: list[tuple[str, str, str, str, int, list[Any]]] = [
        (*arms[run_id], layer_name(layer), factor, step, values)
        for run_id, layer, factor, step, values in session.execute(query)
    ]
    layers = spread(_in_order(row[2] for row in rows), MOST_LAYERS)
    steps = set(spread(sorted({row[4] for row in rows}), MOST_SPECTRA))
    newest: dict[tuple[str, str], int] = {}
    for arm, seed, _, _, step, _ in rows:
        newest[arm, seed] = max(step, newest.get((arm, seed), step))
    found = Dataset(("arm", "seed", "layer", "factor", "step", "number", "eigenvalue"))
    for arm, seed, layer, factor, step, values in rows:
        if layer not in layers:
            continue
        named = [str(step)] if step in steps else []
        if step == newest[arm, seed]:
            named.append(LAST)
        for name in named:
            for number, value in enumerate(_drawable(values), start=1):
                found.add(arm, seed, layer, factor, name, number, value)
    return found, tuple(layers)


def _drawable(values: list[Any]) -> list[float]:
    """The eigenvalues that a logarithmic axis can show."""
    numbers = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
    return [v for v in numbers if v > FAINT * max(numbers)]
