"""How often two identical arms are distinguished with one, three and five seeds, and how often intervals are right.

Simulated answers, right or wrong, by a logistic model: an item's difficulty (standard deviation 1.5 logits), how it
suits a single arm (1.0), and a run's luck (`luck`); 60% right on average. The base has one run and no luck. Judged
by the report's own `compare_pairs`; "before" is the outcome by interval and p-value alone, which one seed had until
2026-11-23. A minute of CPU; run as `python -m benchmarks.one_seed`.
"""

from collections.abc import Iterator
from itertools import product

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import brentq
from scipy.special import expit
from tqdm import tqdm

from benchmarks._harness import command, write
from db.runs import BASE
from evaluation.statistics.differences import Difference, Pairs, compare_pairs
from evaluation.statistics.intervals import Array, judge

EXPERIMENTS = {1: 400, 3: 1500, 5: 1500}
"""By seeds; the bootstrap of one seed takes ten times as long as Student's t."""
SHARE, DIFFICULTY, TASTE = 0.6, 1.5, 1.0
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(41)


def answers(rng: np.random.Generator, share: float, difficulty: Array, runs: int, luck: float) -> Array:
    """Right (1) or wrong (0), shape [experiments, runs, items]; `difficulty` has the same shape with one run."""
    spread = np.sqrt(DIFFICULTY**2 + TASTE**2 + luck**2)
    middle = brentq(lambda at: WEIGHTS @ expit(at + spread * NODES) / WEIGHTS.sum() - share, -20, 20)
    experiments, _, items = difficulty.shape
    logits = middle + difficulty + rng.normal(0, TASTE, difficulty.shape) + rng.normal(0, luck, (experiments, runs, 1))
    return (rng.random((experiments, runs, items)) < expit(logits)).astype(float)


def judged(against: str, gain: float, seeds: int, items: int, luck: float) -> Iterator[Difference]:
    """One experiment after the other; `gain`: the true difference, a share."""
    rng = np.random.default_rng([len(against), round(100 * gain), seeds, items, round(10 * luck)])
    difficulty = rng.normal(0, DIFFICULTY, (EXPERIMENTS[seeds], 1, items))
    own = answers(rng, SHARE, difficulty, seeds, luck)
    alone = against == BASE
    other = answers(rng, SHARE - gain, difficulty, 1 if alone else seeds, 0.0 if alone else luck)
    for mine, theirs in zip(own, np.broadcast_to(other, own.shape), strict=True):
        yield compare_pairs({("arm", against): Pairs(against, tuple(range(seeds)), mine, theirs)})["arm"][0]


def percent(found: list[bool]) -> float:
    return 100 * float(np.mean(found))


def main() -> None:
    table = Table("against", "true Δ, points", "items", "luck", "seeds", "named before, %", "named now, %",
                  "95% interval right, %", "t over seeds right, %", title="How often a direction is named")  # fmt: skip
    alike = [
        (against, 0.0, items, luck, seeds)
        for against, (items, luck), seeds in product(
            ("another arm", BASE), ((500, 0.0), (200, 0.3), (500, 0.3)), (1, 3, 5)
        )
    ]
    apart = [(BASE, gain, 500, 0.3, 1) for gain in (0.1, 0.2, 0.3)]
    rows: list[dict[str, object]] = []
    for against, gain, items, luck, seeds in tqdm([*alike, *apart], desc="cases"):
        found, truth = list(judged(against, gain, seeds, items, luck)), 100 * gain
        checks = [d.seeds_only for d in found if d.seeds_only]
        row = {
            "before": percent([judge(d.points, d.p_holm) != "undecided" for d in found]),
            "now": percent([d.outcome != "undecided" for d in found]),
            "covered": percent([d.points.low <= truth <= d.points.high for d in found]),
            "covered_by_t": percent([one.low <= truth <= one.high for one in checks]) if checks else None,
        }
        told = ("–" if value is None else f"{value:.1f}" for value in row.values())
        table.add_row(against, f"{truth:.0f}", str(items), f"{luck}", str(seeds), *told)
        rows.append({"against": against, "points": truth, "items": items, "luck": luck,
                     "seeds": seeds, **row})  # fmt: skip
    Console(width=120).print(table)
    write("one_seed", "How often a direction is named, in percent", experiments=EXPERIMENTS, rows=rows)


if __name__ == "__main__":
    command(main)
