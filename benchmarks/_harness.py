"""What every benchmark shares: contenders in turn, ratios with their spread, tables, a JSON file with device and date.

A benchmark is a script `benchmarks/<name>.py` that prints a table and writes `benchmarks/results/<name>.json`, by
`report` where contenders take turns call by call, else by `write`. Speed and memory claims of the README come from
there.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from db.files import git_state, package_versions, torch_device

FOLDER = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
Interval = tuple[float, float, float]  # mean, and the ends of its 95% interval


def command(main: Callable[[], Any]) -> None:
    """Run a script that takes no options, or with --help say what it measures."""
    form = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=sys.modules["__main__"].__doc__, formatter_class=form).parse_args()
    sys.exit(main())


def alternate(contenders: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every call, the contenders in turn; who goes first changes from round to round.

    Args:
        contenders: Name → one unit of work.
        rounds: Calls of each that count.
        warm_up: Calls of each before, thrown away.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-warm_up, rounds):
        for name in in_turn(list(contenders), number):
            started = time.perf_counter()
            contenders[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def in_turn(names: list[str], number: int) -> list[str]:
    """The names in the order of a round; another one goes first in the next round."""
    shift = number % len(names)
    return names[shift:] + names[:shift]


def blocks_in_turn(
    steps: Mapping[str, Callable[[], float]], blocks: int, size: int, warm_up: int
) -> dict[str, list[float]]:
    """Seconds a step in each block, the contenders taking turns step by step.

    Args:
        steps: Name → one step, which returns its seconds.
        blocks: Blocks that count.
        size: Steps of each contender in a block.
        warm_up: Steps of each before, thrown away.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for block in range(-1, blocks):
        total = dict.fromkeys(steps, 0.0)
        for number in range(size if block >= 0 else warm_up):
            for name in in_turn(list(steps), number):
                total[name] += steps[name]()
        for name, value in total.items() if block >= 0 else ():
            seconds[name].append(value / size)
    return seconds


def peak_tensor_bytes(work: Callable[[], Any]) -> int:
    """Most bytes that torch's allocator on the CPU held at any moment of some work."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return int(peak)


def ratios(seconds: Mapping[str, list[float]], against: str) -> dict[str, dict[str, float]]:
    """Each contender's time over the reference's, round by round: median, smallest and largest."""
    return {name: spread([a / b for a, b in zip(s, seconds[against], strict=True)]) for name, s in seconds.items()}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def step_time(seconds: Mapping[str, list[float]], contender: str, against: str) -> dict[str, Any]:
    """The ratio of two contenders' times in each block, for a row of a result file."""
    values = [a / b for a, b in zip(seconds[contender], seconds[against], strict=True)]
    middle, low, high = spread(values).values()
    return {
        "step_time_ratio": middle, "step_time_ratio_low": low, "step_time_ratio_high": high, "blocks": values,
    }  # fmt: skip


def step_time_text(row: Mapping[str, Any]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*(row[f"step_time_ratio{end}"] for end in ("", "_low", "_high")))


def interval(values: Sequence[float]) -> Interval:
    """Student's t over the values; NaN where there is no interval."""
    from scipy import stats

    mean = math.fsum(values) / len(values) if values else math.nan
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return mean, math.nan, math.nan
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(stats.sem(values))
    return mean, mean - half, mean + half


def interval_text(values: Interval | list[float], digits: int) -> str:
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*values, d=digits)


def show(
    title: str, columns: Mapping[str, Callable[[Any], object]], rows: Iterable[Any], width: int | None = None
) -> None:
    """Print a table; `columns`: header → what it shows of a row."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(str(cell(row)) for cell in columns.values()))
    Console(width=width).print(table)


def report(name: str, title: str, seconds: Mapping[str, list[float]], against: str, **facts: Any) -> None:
    """Print the table and write benchmarks/results/<name>.json.

    Args:
        name: Of the script.
        title: What one call does.
        seconds: From `alternate`.
        against: The contender that the others are divided by.
        facts: Further numbers, kept in the file.
    """
    shares = ratios(seconds, against)
    columns: dict[str, Callable[[str], object]] = {
        "contender": str,
        "median s": lambda name: f"{statistics.median(seconds[name]):.4f}",
        f"time / {against} [min, max]": lambda name: "{median:.3f} [{low:.3f}, {high:.3f}]".format(**shares[name]),
    }
    show(title, columns, seconds)
    write(name, title, seconds=dict(seconds), ratios={"against": against, **shares}, **facts)


def write(name: str, title: str, **facts: Any) -> None:
    """Write benchmarks/results/<name>.json: the facts with date, device, commit and package versions."""
    content = {
        "benchmark": name,
        "title": title,
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch_device(),
        "git": git_state(),
        "packages": package_versions(),
        **facts,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"written: benchmarks/results/{name}.json")
