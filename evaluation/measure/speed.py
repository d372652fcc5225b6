"""Speed, measured so that two models can be compared: load, time to first token, prefill, decode.

One request at a time, fixed numbers of tokens (on Ollama at most that many: an end token ends its answer), the models
in turn within one process, a warm-up thrown away, and every prompt with a prefix of its own, so that a prompt cache
finds no more than what the template has in front of it. Merged LoRA models of one shape run the same arithmetic: a
difference between them is noise, and this is how large the noise is.

What a row's tokens are: in `prefill` those of the prompts, in `decode` those of the answers, in `ttft` the first
ones, one for each request; `load` has none. None is a figure that a server did not give.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from export.engines.base import Phases

WARM_UP = -1
Request = Callable[[str, str, int], Phases]
"""(prefix, question, tokens) → times; `Engine.phases`."""


def loads(contenders: Mapping[str, Callable[[], int | None]], *, repetitions: int) -> list[dict[str, Any]]:
    """Time loading the contenders, in turn, from a file that the system has in memory since the load thrown away.

    Where the file is mapped, its pages come with the first pass, and are not part of the figure. A contender loads the
    model, which must not be loaded, and gives the time, ns. Rows as of `alternate`.
    """
    names = list(contenders)
    rows = []
    for repetition in range(WARM_UP, repetitions):
        shift = repetition % len(names)
        for arm in names[shift:] + names[:shift]:
            ns = contenders[arm]()
            if repetition != WARM_UP:
                rows.append({"arm": arm, "phase": "load", "repetition": repetition, "tokens": None, "nanoseconds": ns})
    return rows


def alternate(
    contenders: Mapping[str, Request], prompts: Sequence[str], *, repetitions: int, tokens: int
) -> list[dict[str, Any]]:
    """Time the contenders in turn; one repetition more comes first and is thrown away.

    Each is asked every prompt in each repetition and decodes so many tokens. Rows {arm, phase, repetition, tokens,
    nanoseconds} are a sum over the prompts each; None where a figure of one of them is.
    """
    rows: list[dict[str, Any]] = []
    names = list(contenders)
    for repetition in range(WARM_UP, repetitions):
        parts: dict[tuple[str, str], list[tuple[int | None, int | None]]] = {}
        for number, prompt in enumerate(prompts):
            # Who goes first changes from prompt to prompt, so that drift meets all alike.
            shift = (number + repetition) % len(names)
            for arm in names[shift:] + names[:shift]:
                # The prefix is new for every request: a prompt cache finds nothing.
                prefix = f"{repetition + 2}{number}{names.index(arm)}"
                for phase, figures in contenders[arm](prefix, prompt, tokens).items():
                    parts.setdefault((arm, phase), []).append(figures)
        if repetition != WARM_UP:
            for (arm, phase), figures_of_all in parts.items():
                n, ns = (_total(column) for column in zip(*figures_of_all, strict=True))
                rows.append({"arm": arm, "phase": phase, "repetition": repetition, "tokens": n, "nanoseconds": ns})
    return rows


def _total(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def tokens_per_second(rows: Sequence[Mapping[str, Any]], arm: str, phase: str) -> float:
    """Σtokens / Σtime of an arm in a phase; NaN where nothing was measured."""
    mine = [row for row in rows if row["arm"] == arm and row["phase"] == phase and None not in row.values()]
    seconds = sum(row["nanoseconds"] for row in mine) / 1e9
    return float(sum(row["tokens"] for row in mine) / seconds) if seconds else float("nan")


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Median and interval over the repetitions, of each arm and phase.

    {arm, phase, unit, median, low, high, confidence, repetitions}; ms are for each request. Repetitions without a
    figure are left out.
    """
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        value = _figure(row)
        if value is not None:
            values.setdefault((row["arm"], row["phase"]), []).append(value)
    return [
        {
            "arm": arm,
            "phase": phase,
            "unit": "ms" if phase in ("load", "ttft") else "tokens/s",
            **median_interval(found),
            "repetitions": len(found),
        }
        for (arm, phase), found in values.items()
    ]


def _figure(row: Mapping[str, Any]) -> float | None:
    tokens, ns = row["tokens"], row["nanoseconds"]
    if row["phase"] == "load":
        return None if ns is None else ns / 1e6
    if not tokens or not ns:
        return None
    return float(ns / 1e6 / tokens) if row["phase"] == "ttft" else float(tokens * 1e9 / ns)


def median_interval(values: Sequence[float], level: float = 0.95) -> dict[str, float]:
    """{median, low, high, confidence}: the narrowest pair of order statistics that holds the median so surely.

    Whatever the distribution, the k-th smallest and k-th largest of n values miss the median with probability
    2·P(Bin(n, ½) < k). With fewer than six values none reaches 95%; then it is smallest and largest, and the
    confidence says how much that is.
    """
    ordered, n = sorted(values), len(values)
    best, confidence = _rank(n, level)
    return {
        "median": statistics.median(ordered),
        "low": ordered[best - 1],
        "high": ordered[n - best],
        "confidence": confidence,
    }


@cache  # the numbers are as long as there are repetitions
def _rank(n: int, level: float) -> tuple[int, float]:
    """Return k of the pair of order statistics, and its confidence."""
    best, confidence = 1, 0.0
    missed, ways = 0, 1  # of 2ⁿ equally likely sign patterns: those with fewer than k, and with exactly k, below
    for k in range(1, n // 2 + 1):
        missed, ways = missed + ways, ways * (n - k + 1) // k
        reached = 1 - 2 * missed / 2**n
        if k > 1 and reached < level:
            break
        best, confidence = k, reached
    return best, confidence
