"""A simulation of `python -m pipelines.distribute` on clusters that we do not have.

The graph of stages is DVC's, the seconds of each kind of stage those that it took here when it last ran
(logs/stages/seconds.json), the bytes those of dvc.lock. A worker takes the next stage that is ready, pulls what it
lacks through a link that all share, computes, pushes. Needs what `make repro` leaves.
"""

import heapq
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from statistics import mean
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks._harness import RESULTS, command, write
from pipelines.dvc_internals import CHECK, LOCK
from pipelines.repro import TIMES

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1000)
SEEDS = (1, 3, 10, 25, 100)
LINKS = {"1 GB/s": 1e9, "100 MB/s": 1e8, "10 MB/s": 1e7}
Stage = tuple[str, str, str]  # kind, arm, seed; empty where it has none


def parse(name: str) -> Stage:
    kind, arm, seed = re.fullmatch(r"(\w+)(?:@(\w+?)(?:-(\d+))?)?", name).groups("")  # type: ignore[union-attr]
    return kind, arm, seed


def graph() -> dict[str, set[str]]:
    """Kind of stage → kinds that it waits for."""
    from dvc.repo import Repo

    kinds = defaultdict[str, set[str]](set)
    with Repo() as repo:
        for stage in repo.index.graph:
            kind = parse(stage.addressing)[0]
            kinds[kind] |= {parse(other.addressing)[0] for other in repo.index.graph.successors(stage)} - {CHECK}
    return {kind: before for kind, before in kinds.items() if kind not in (CHECK, "compare")}


def matrix(kinds: dict[str, set[str]], which: set[Stage], seeds: int) -> dict[Stage, set[Stage]]:
    """The graph for a number of seeds: a stage waits for those of its arm and seed, and for those that have neither."""
    with_arm, with_seed = {kind for kind, arm, _ in which if arm}, {kind for kind, _, seed in which if seed}
    arms = sorted({arm for _, arm, _ in which if arm})

    def all_of(kind: str) -> Iterator[Stage]:
        for arm in arms if kind in with_arm else [""]:
            for seed in range(seeds) if kind in with_seed else [""]:
                yield kind, arm, str(seed)

    def one(kind: str, stage: Stage) -> Stage:
        return kind, stage[1] if kind in with_arm else "", stage[2] if kind in with_seed else ""

    return {stage: {one(before, stage) for before in kinds[kind]} for kind in kinds for stage in all_of(kind)}


def simulate(stages: dict[Stage, set[Stage]], seconds: dict[str, float], sizes: dict[str, float], workers: int,
             link: float, overhead: float) -> tuple[float, float]:  # fmt: skip
    """Makespan in seconds, and the share of it during which the link is busy."""
    after = defaultdict(list)
    waits = {stage: len(before) for stage, before in stages.items()}
    for stage, before in stages.items():
        for other in before:
            after[other].append(stage)
    depth = dict[Stage, int]()

    def height(stage: Stage) -> int:
        if stage not in depth:
            depth[stage] = 1 + max((height(later) for later in after[stage]), default=0)
        return depth[stage]

    ready = [(-height(stage), stage) for stage, count in waits.items() if not count]
    heapq.heapify(ready)
    has = [set[Stage]() for _ in range(workers)]
    idle, now, free, busy = list(range(workers)), 0.0, 0.0, 0.0
    ends: list[tuple[float, int, int, Stage]] = []  # when, 0: computed, 1: pushed
    while ready or ends:
        while ready and idle:
            _, stage = heapq.heappop(ready)
            worker = max(idle, key=lambda w: sum(sizes[s[0]] for s in stages[stage] & has[w]))
            idle.remove(worker)
            wanted = sum(sizes[other[0]] for other in stages[stage] - has[worker]) / link
            free, busy = max(free, now) + wanted, busy + wanted
            has[worker] |= stages[stage] | {stage}
            heapq.heappush(ends, (free + overhead + seconds[stage[0]], 0, worker, stage))
        now, pushed, worker, stage = heapq.heappop(ends)
        if not pushed:
            wanted = sizes[stage[0]] / link
            free, busy = max(free, now) + wanted, busy + wanted
            heapq.heappush(ends, (free, 1, worker, stage))
            continue
        idle.append(worker)
        for later in after[stage]:
            waits[later] -= 1
            if not waits[later]:
                heapq.heappush(ready, (-height(later), later))
    return now, busy / now


def main() -> None:
    took, lock = json.loads(TIMES.read_text()), yaml.safe_load(LOCK.read_text())["stages"]
    kinds, which = graph(), {parse(name) for name in lock}
    seconds = {kind: mean(s for name, s in took.items() if parse(name)[0] == kind) for kind in kinds}
    bytes_of = {name: sum(out.get("size", 0) for out in entry.get("outs", [])) for name, entry in lock.items()}
    sizes = {kind: mean(size for name, size in bytes_of.items() if parse(name)[0] == kind) for kind in kinds}
    measured = RESULTS / "distribute.json"
    overhead = json.loads(measured.read_text())["overhead_seconds_a_stage"] if measured.is_file() else 3.0
    # Assumed, not measured: a model whose stages take 30 times as long, and whose files are 2,000 times as large.
    sizes_of = {"as here": (seconds, sizes), "30 x the time, 2,000 x the bytes": (
        {kind: 30 * s for kind, s in seconds.items()}, {kind: 2000 * s for kind, s in sizes.items()})}  # fmt: skip
    arms = len({arm for _, arm, _ in which if arm})
    rows: list[dict[str, Any]] = []
    for scale, (each, files) in sizes_of.items():
        for seeds in SEEDS:
            stages = matrix(kinds, which, seeds)
            work = sum(each[kind] + overhead for kind, _, _ in stages)
            for link_name, link in LINKS.items():
                for workers in WORKERS:
                    makespan, busy = simulate(stages, each, files, workers, link, overhead)
                    rows.append({"scale": scale, "runs": arms * seeds, "stages": len(stages), "link": link_name,
                                 "workers": workers, "hours": makespan / 3600, "link_busy": busy,
                                 "efficiency": work / (workers * makespan)})  # fmt: skip
    table = Table("scale", "runs", "link", *map(str, WORKERS), title="hours, and efficiency in percent, by workers")
    for scale in sizes_of:
        for runs in dict.fromkeys(row["runs"] for row in rows):
            for link_name in LINKS:
                cells = [r for r in rows if (r["scale"], r["runs"], r["link"]) == (scale, runs, link_name)]
                table.add_row(
                    scale, str(runs), link_name, *(f"{r['hours']:.2g} {100 * r['efficiency']:.0f}%" for r in cells)
                )
    Console(width=200).print(table)
    write(
        "scale",
        "schedule of distribute, simulated",
        seconds=seconds,
        bytes=sizes,
        overhead_seconds_a_stage=overhead,
        rows=rows,
    )


if __name__ == "__main__":
    command(main)
