"""Faults of the statistics behind a preconditioner, and of the training itself."""

import itertools
from typing import Any

from probes.evidence import Evidence, median
from probes.finding import Finding, fraction


def _gained(e: Evidence) -> list[tuple[float, dict[str, float], int]]:
    return [
        (entry["reading"]["samples_gained"], r["tokens"], r["passes"])
        for r in e.judged
        for entry in r["units"].values()
        if entry.get("reading", {}).get("samples_gained") and r["tokens"]["attended"]
    ]


def _near(value: float, target: float) -> bool:
    return abs(value - target) <= 0.02 * target


def overcounted(e: Evidence) -> Finding | None:
    """Statistics that count more tokens than there are."""
    gained = _gained(e)
    if not gained:
        return None
    padding = [_near(n, t["all"]) and t["attended"] < 0.98 * t["all"] for n, t, _ in gained]
    ratio = median(n / t["attended"] for n, t, _ in gained) or 0.0
    passes = max(p for *_, p in gained)
    numbers = {"ratio": ratio, "passes": passes}
    if fraction(sum(padding), len(gained)) > 0.5:
        return Finding(
            "padding_counted",
            f"statistics count every position, padding too: {ratio:.2f} times the attended tokens; leave out positions "
            "with attention_mask 0",
            numbers,
        )
    if ratio <= 1.02:
        return None
    multiple = [_near(n, p * t["attended"]) or _near(n, p * t["all"]) for n, t, p in gained if p > 1]
    if fraction(sum(multiple), len(gained)) > 0.5:
        return Finding(
            "accumulation_overcounted",
            f"statistics count {ratio:.2f} times the tokens of a step, which has {passes} backward passes: every "
            "micro-batch is added once for each of them",
            numbers,
        )
    return Finding(
        "samples_overcounted",
        f"statistics count {ratio:.2f} times the tokens of a step (checkpointing runs the forward pass twice: count in "
        "the backward pass)",
        numbers,
    )


def _longest(seen: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
    """The longest run of samples with the same matrices."""
    stretches = [list(members) for _, members in itertools.groupby(seen, key=lambda entry: entry[1]["hash"])]
    return max(stretches, key=len, default=[])


def stale_factors(e: Evidence) -> Finding | None:
    """The very same matrices all the time."""
    stale, longest = [], 0
    for unit in dict.fromkeys(n for r in e.judged for n, u in r["units"].items() if "reading" in u):
        seen = [(r["step"], r["units"][unit]["reading"]) for r in e.judged if "reading" in r["units"].get(unit, {})]
        stretch = _longest([(step, reading) for step, reading in seen if reading["ready"]])
        if len(stretch) < 3:
            continue
        told = stretch[0][1].get("refresh_every")
        span = stretch[-1][0] - stretch[0][0]
        if span >= (3 * told if told else e.thresholds.stale_after):
            stale.append(unit)
            longest = max(longest, span)
    if not stale or fraction(len(stale), len(e.units)) <= e.thresholds.often:
        return None
    return Finding(
        "stale_factors",
        f"the preconditioners of {len(stale)} layers stayed the same to the bit over {longest} steps, while A and B "
        "moved: refresh them",
        {"layers": len(stale), "steps": longest},
    )


def diverging(e: Evidence) -> Finding | None:
    """A loss that rises or is not a number."""
    losses = [r["loss"] for r in e.records if r.get("loss") is not None]
    bad = e.events["nonfinite_losses"]
    if bad > e.thresholds.often * len(e.records) or e.events["nonfinite_gradients"] > e.thresholds.often * e.steps:
        return Finding(
            "not_finite",
            f"{bad} sampled losses and the gradients of {e.events['nonfinite_gradients']} steps are NaN or infinite: "
            "lower the learning rate, look at the data",
            {"losses": bad, "nonfinite_gradients": e.events["nonfinite_gradients"]},
        )
    part = max(3, len(losses) // 5)
    if len(losses) < 2 * part:
        return None  # too few samples to tell a rise from a hard batch
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    apart = min(losses[-part:]) > max(losses[:part])
    if not apart or last - first <= e.thresholds.blow_up * abs(first):
        return None
    return Finding(
        "diverging",
        f"the loss rose from {first:.3g} to {last:.3g}: lower the learning rate",
        {"from": first, "to": last},
    )
