"""Prefill and decode speed, measured so that two models can be compared.

One request at a time, fixed numbers of tokens, the models in turn within one process, a warm-up thrown away, and
every prompt with a prefix of its own so that no prompt cache helps. Merged LoRA models of one shape run the same
arithmetic: a difference between them is noise, and this is how large the noise is.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

WARM_UP = -1


class Timed(Protocol):
    """What timing needs of an embedded backend."""

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text."""
        ...

    def prefill(self, ids: Sequence[int]) -> None:
        """Evaluate a prompt."""
        ...

    def decode(self, max_tokens: int, *, ignore_end: bool = False) -> tuple[list[int], str]:
        """Continue it."""
        ...


Measure = Callable[[str, int], Mapping[str, tuple[int, int]]]


def embedded(backend: Timed) -> Measure:
    """Phases of one request to an embedded backend, each as (tokens, nanoseconds)."""

    def measure(prompt: str, tokens: int) -> dict[str, tuple[int, int]]:
        ids = backend.tokenize(prompt)
        t0 = time.perf_counter_ns()
        backend.prefill(ids)
        t1 = time.perf_counter_ns()
        made, _ = backend.decode(tokens, ignore_end=True)
        t2 = time.perf_counter_ns()
        return {"prefill": (len(ids), t1 - t0), "decode": (len(made), t2 - t1)}

    return measure


def alternate(
    contenders: Mapping[str, Measure], prompts: Sequence[str], *, repetitions: int, tokens: int
) -> list[dict[str, Any]]:
    """Time the contenders in turn.

    Args:
        contenders: Arm → one request, timed.
        prompts: Asked by each contender in each repetition.
        repetitions: How often; one more comes first and is thrown away.
        tokens: Decoded for each prompt.

    Returns:
        Rows {arm, phase, repetition, tokens, nanoseconds}, a sum over the prompts each.
    """
    rows: list[dict[str, Any]] = []
    names = list(contenders)
    for repetition in range(WARM_UP, repetitions):
        sums: dict[tuple[str, str], list[int]] = {}
        for number, prompt in enumerate(prompts):
            # Who goes first changes from prompt to prompt, so that drift meets all alike.
            shift = (number + repetition) % len(names)
            for arm in names[shift:] + names[:shift]:
                # The prefix is new for every request: a prompt cache finds nothing.
                text = f"{repetition + 2}{number}{names.index(arm)} {prompt}"
                for phase, (n, ns) in contenders[arm](text, tokens).items():
                    total = sums.setdefault((arm, phase), [0, 0])
                    total[0] += n
                    total[1] += ns
        if repetition != WARM_UP:
            rows += [
                {"arm": arm, "phase": phase, "repetition": repetition, "tokens": n, "nanoseconds": ns}
                for (arm, phase), (n, ns) in sums.items()
            ]
    return rows


def tokens_per_second(rows: Sequence[Mapping[str, Any]], arm: str, phase: str) -> float:
    """Σtokens / Σtime of an arm in a phase; NaN where nothing was measured."""
    mine = [row for row in rows if row["arm"] == arm and row["phase"] == phase]
    seconds = sum(row["nanoseconds"] for row in mine) / 1e9
    return float(sum(row["tokens"] for row in mine) / seconds) if seconds else float("nan")
