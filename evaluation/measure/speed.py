"""Speed, measured so that two models can be compared: load, time to first token, prefill, decode.

One request at a time with a fixed number of tokens (on Ollama at most that many: an end token ends its answer), the
models taking turns within one process, after a discarded warm-up. Every prompt gets a unique prefix, so that a prompt
cache finds no more than the part of the template before it. Merged LoRA models of one shape run the same arithmetic:
the difference between them is noise, and this shows how large the noise is.

Tokens of a row: in `prefill` those of the prompts, in `decode` those of the answers, in `ttft` the first ones, one per
request; `load` has none. None marks a figure that a server did not give.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy.special import bdtr

from export.engines.engine import Phases

WARM_UP = -1
Request = Callable[[str, str, int], Phases]
"""(prefix, question, tokens) → times; `Engine.phases`."""


def _rotated(names: list[str], turn: int) -> list[str]:
    """Another contender goes first in every turn, so that drift affects all alike."""
    return names[turn % len(names) :] + names[: turn % len(names)]


def _row(arm: str, phase: str, repetition: int, tokens: int | None, nanoseconds: int | None) -> dict[str, Any]:
    return {"arm": arm, "phase": phase, "repetition": repetition, "tokens": tokens, "nanoseconds": nanoseconds}


def loads(contenders: Mapping[str, Callable[[], int | None]], *, repetitions: int) -> list[dict[str, Any]]:
    """Time the loading of each contender, in turn, from a file that the discarded first load left in the page cache.

    If the file is memory-mapped, its pages are read in the first pass and are not part of the figure. A contender loads
    its model, which must not be loaded yet, and returns the time, ns. Rows as in `alternate`.
    """
    rows = []
    for repetition in range(WARM_UP, repetitions):
        for arm in _rotated(list(contenders), repetition):
            ns = contenders[arm]()
            if repetition != WARM_UP:
                rows.append(_row(arm, "load", repetition, None, ns))
    return rows


def alternate(
    contenders: Mapping[str, Request], prompts: Sequence[str], *, repetitions: int, tokens: int
) -> list[dict[str, Any]]:
    """Time the contenders in turn, after a discarded repetition.

    In each repetition, each contender gets every prompt and decodes `tokens` tokens. Rows {arm, phase, repetition,
    tokens, nanoseconds} are sums over the prompts; None if a figure of any prompt is.
    """
    rows: list[dict[str, Any]] = []
    names = list(contenders)
    for repetition in range(WARM_UP, repetitions):
        parts: dict[tuple[str, str], list[tuple[int | None, int | None]]] = {}
        for number, prompt in enumerate(prompts):
            for arm in _rotated(names, number + repetition):
                prefix = f"{repetition + 2}{number}{names.index(arm)}"  # unique, so that a prompt cache is no help
                for phase, figures in contenders[arm](prefix, prompt, tokens).items():
                    parts.setdefault((arm, phase), []).append(figures)
        if repetition != WARM_UP:
            for (arm, phase), figures_of_all in parts.items():
                n, ns = (_total(column) for column in zip(*figures_of_all, strict=True))
                rows.append(_row(arm, phase, repetition, n, ns))
    return rows


def _total(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """{arm, phase, unit, median, low, high, confidence, repetitions} over the repetitions that have a figure.

    Milliseconds are per request.
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
            **median_interval(figures),
            "repetitions": len(figures),
        }
        for (arm, phase), figures in values.items()
    ]


def _figure(row: Mapping[str, Any]) -> float | None:
    tokens, ns = row["tokens"], row["nanoseconds"]
    if row["phase"] == "load":
        return None if ns is None else ns / 1e6
    if not tokens or not ns:
        return None
    return float(ns / 1e6 / tokens) if row["phase"] == "ttft" else float(tokens * 1e9 / ns)


def median_interval(values: Sequence[float], level: float = 0.95) -> dict[str, float]:
    """{median, low, high, confidence}: the narrowest pair of order statistics that covers the median at this level.

    Whatever the distribution, the k-th smallest and k-th largest of n values miss the median with probability
    2·P(Bin(n, ½) < k). With fewer than six values no pair reaches 95%; then it is the smallest and the largest, and
    `confidence` is what they do reach.
    """
    ordered, n = sorted(values), len(values)
    missed = [2 * float(bdtr(k - 1, n, 0.5)) for k in range(1, max(1, n // 2) + 1)]  # by the k-th pair
    best = max(1, sum(1 - each >= level for each in missed))
    confidence = 1 - missed[best - 1] if n > 1 else 0.0
    return {
        "median": statistics.median(ordered),
        "low": ordered[best - 1],
        "high": ordered[n - best],
        "confidence": confidence,
    }
