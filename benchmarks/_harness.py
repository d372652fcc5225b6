"""What every benchmark shares: contenders in turn, ratios with their spread, a JSON file with device and date.

A benchmark is a script `benchmarks/<name>.py` that prints a table and writes `benchmarks/results/<name>.json`, by
`report` where contenders take turns call by call, else by `write`. Speed and memory claims of the README come from
there.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from db.files import git_state, package_versions, torch_device

RESULTS = Path(__file__).parent / "results"


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
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm_up, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter()
            contenders[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
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
    table = {}
    for name, values in seconds.items():
        per_round = [a / b for a, b in zip(values, seconds[against], strict=True)]
        table[name] = {
            "median": statistics.median(per_round),
            "low": min(per_round),
            "high": max(per_round),
        }
    return table


def report(name: str, title: str, seconds: Mapping[str, list[float]], against: str, **facts: Any) -> None:
    """Print the table and write benchmarks/results/<name>.json.

    Args:
        name: Of the script.
        title: What one call does.
        seconds: From `alternate`.
        against: The contender that the others are divided by.
        facts: Further numbers, kept in the file.
    """
    table = Table("contender", "median s", f"time / {against} [min, max]", title=title, title_justify="left")
    shares = ratios(seconds, against)
    for contender, values in seconds.items():
        r = shares[contender]
        table.add_row(
            contender, f"{statistics.median(values):.4f}", f"{r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
        )
    Console().print(table)
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
