"""The fault catalogue: one function per fault, from the evidence to a finding or None.

They are listed by precedence: weights that do not move first, then what happens around the step, what becomes of the
gradient, the preconditioner's own state, its statistics, and the training. A verdict asks `FIRST`, `OF_A_CLAIM` and
`OF_ANY`, at the end.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from probes.evidence import Evidence, median
from probes.tally import TURNED


@dataclass(frozen=True)
class Finding:
    """One fault: the diagnosis, and a sentence on what is wrong and what to do."""

    name: str
    reason: str
    tensors: list[str] = field(default_factory=list)  # that stand still, or are left out


def _share(flags: Iterable[object]) -> float:
    values = list(flags)
    return sum(map(bool, values)) / len(values) if values else 0.0


def _listed(names: Collection[str], most: int = 4) -> str:
    return ", ".join(list(names)[:most]) + (" …" if len(names) > most else "")


# Weights that do not move


_WHY_STILL = {  # a count of the tally, or another symptom → the cause
    "put_back": "a step moves them, but they are back before the next one: something restores the weights",
    "not_held": "no group of the optimizer has them: it was made with other tensors (before the model was wrapped, "
    "moved, or given its adapter)",
    "rate_zero": "their learning rate is 0",
    "lost": "backward had computed a gradient, and the optimizer found none, or zeros (is zero_grad() called before "
    "step()?)",
    "16 bit": "a step is smaller than the rounding of 16-bit weights: keep them in float32, or raise the rate",
    "": "a step is less than the rounding of the weights (a learning rate that is far too low), or it computes "
    "nothing, or elsewhere",
}


def _not_moving(e: Evidence) -> Finding | None:
    causes: dict[str, str] = {}
    for name in e.tally:
        short = (median(e.values(name.rpartition(".")[0], "bits")) or 32) < 32
        stuck = e.share(name, "still") + e.share(name, "put_back")
        vanished = max(e.share(name, "overflow"), 0.0 if short else e.share(name, "rounded")) > stuck / 2
        if stuck > e.thresholds.stuck and not vanished:
            counted = (c for c in ("put_back", "not_held", "rate_zero", "lost") if e.share(name, c) >= stuck / 2)
            causes[name] = next(counted, "16 bit" if short else "")
    if not causes:
        return None
    mean = sum(e.share(name, "still") + e.share(name, "put_back") for name in causes) / len(causes)
    parts = "; ".join(
        f"{count} of {len(e.tally)} tensors do not move in {mean:.0%} of the steps "
        f"({_listed([name for name, why in causes.items() if why == cause], 2)}): {_WHY_STILL[cause]}"
        for cause, count in Counter(causes.values()).most_common()
    )
    return Finding("not_moving", parts, list(causes))


def _steps_unseen(e: Evidence) -> Finding | None:
    unseen = e.events["dropped_since"]
    if unseen < 5 or unseen < e.thresholds.often * e.steps:
        return None
    return Finding(
        "steps_unseen",
        f"after the last of {e.steps} steps that the probe saw, gradients came and were cleared {unseen} times: "
        "another optimizer took over, or none steps any more",
    )


def _no_gradient(e: Evidence) -> Finding | None:
    without = [name for name, row in e.tally.items() if not row["steps"]]
    if e.steps < 3 or e.events["nonfinite_gradients"] > e.steps / 2 or len(without) <= 0.1 * len(e.tally):
        return None
    return Finding(
        "no_gradient",
        f"backward computed no gradient, or zeros, for {len(without)} of {len(e.tally)} tensors in {e.steps} steps "
        f"({_listed(without)}): is their output used, and nothing on the way detached or frozen?",
    )


# Around the step: what the optimizer is given is not what was preconditioned


def _wrapper_bypassed(e: Evidence) -> Finding | None:
    share = e.events["inner_called_directly"] / max(e.steps, 1)
    if share <= e.thresholds.often:
        return None
    return Finding(
        "wrapper_bypassed",
        f"{share:.0%} of the steps entered the wrapped optimizer directly, past its wrapper: whoever steps must hold "
        "the wrapper (wrap before accelerate's prepare and before the scheduler is made)",
    )


def _never_called(e: Evidence) -> Finding | None:
    called = e.events["calls"] + e.events["calls_after_step"] + e.events["calls_before_backward"]
    if not e.watched or called or not e.steps or e.reached:  # it may be called through a name that was bound earlier
        return None
    return Finding(
        "never_called",
        f"the preconditioner was not called once in {e.steps} steps: is the callback registered (add_callback), and "
        "its event one that exists?",
    )


def _preconditioned_after_step(e: Evidence) -> Finding | None:
    late_calls = e.watched and e.events["calls_after_step"] > e.events["calls"]
    late_changes = e.events["gradients_changed_after_step"] > e.thresholds.often * e.steps
    if not (late_calls or late_changes):
        return None
    return Finding(
        "preconditioned_after_step",
        "gradients are preconditioned after optimizer.step() has used them (on_optimizer_step, on_step_end): nothing "
        "reaches the weights; do it inside the optimizer's step, or in on_pre_optimizer_step",
    )


def _applied_repeatedly(e: Evidence) -> Finding | None:
    times = [n for n in e.of_all("times_changed") if n]
    if _share(n > 1 for n in times) <= e.thresholds.often:
        return None
    return Finding(
        "applied_repeatedly",
        f"the same gradient was preconditioned up to {max(times)} times before one step (once for each micro-batch, or "
        "by two callers): P is applied as P^n; call it once a step",
    )


def _gradient_recomputed(e: Evidence) -> Finding | None:
    share = _share(v for v in e.of_all("late_gradients") if v is not None)
    if share <= e.thresholds.often:
        return None
    return Finding(
        "gradient_recomputed",
        f"in {share:.0%} of the samples a backward pass ran after preconditioning and overwrote or diluted its result; "
        "precondition after the last backward pass of a step",
    )


def _gradient_restored(e: Evidence) -> Finding | None:
    def restored(entry: dict[str, float]) -> bool:
        # Clipping may have scaled the old gradient, so compare directions too.
        turned = entry.get("angle_call") or 0.0
        turned_back = turned > e.thresholds.min_gradient_angle and (entry.get("angle_raw_inner") or 0) < 0.01 * turned
        return bool(entry.get("restored")) or turned_back

    share = _share(restored(u) for r in e.judged for u in r["units"].values() if u.get("times_changed"))
    if share <= 0.5:
        return None
    return Finding(
        "gradient_restored",
        f"preconditioning changed the gradients, but in {share:.0%} of these cases the optimizer got the raw ones: "
        "something puts a copy back in between",
    )


# The preconditioner, and what it does to gradients


def _against(e: Evidence) -> dict[str, bool]:
    """Tensors that are read against their gradient more than now and then → whether by chance, as noise would be.

    A positive definite matrix never turns a gradient by 90° or more; a running mean of gradients may for some steps,
    but points along them in the mean. In a few dimensions every cosine may be chance.
    """
    chance = {}
    for name, row in e.tally.items():
        count, size = row["against"], e.sizes.get(name, 0)
        if not count or e.share(name, "against") <= 0.02 or (count < 2 and row["steps"] > 25):
            continue
        by_chance = abs(row["cos_against"] / count) <= 3 / math.sqrt(max(size, 1))
        if e.share(name, "against") > 0.75:
            chance[name] = by_chance and size >= 32
        elif size >= 32 and not (
            by_chance and e.share(name, "against") < 0.2 and row["cos_gradient"] / row["steps"] > 0.15
        ):
            chance[name] = by_chance
    return chance


def _uphill(e: Evidence) -> Finding | None:
    """An occasional step may point up the gradient because of momentum; most must not."""
    against = [name for name, by_chance in _against(e).items() if not by_chance]
    steps = [
        name
        for name, row in e.tally.items()
        if row["steps"] >= 5
        and e.share(name, "uphill") > 0.75
        and row["cos_step"] / row["steps"] < -3 / math.sqrt(max(e.sizes.get(name, 0), 1))
    ]
    wrong = list(dict.fromkeys((*against, *steps)))
    if not wrong:
        return None
    column = "against" if against else "uphill"
    share = sum(e.share(name, column) for name in wrong) / len(wrong)
    what = "what the optimizer reads points away from the gradient" if against else "updates point up the gradient"
    return Finding(
        "uphill",
        f"{what} in {share:.0%} of the steps, in {len(wrong)} of {len(e.tally)} tensors ({_listed(wrong)}): a sign, an "
        "inverse that is not positive definite, a negative rate, or maximize=True",
    )


def _unrelated(e: Evidence) -> Finding | None:
    against = _against(e)
    noise = [name for name, by_chance in against.items() if by_chance]
    if noise and len(noise) < len(against) / 2:
        return None  # a direction that is wrong in most of them is not chance but uphill
    if noise:
        share = sum(e.share(name, "against") for name in noise) / len(noise)
        what = f"what is read points away from the gradient in {share:.0%} of the steps, as a random direction would"
    else:
        rows = [row for name, row in e.tally.items() if row["steps"] >= 5 and e.sizes.get(name, 0) >= 16]
        if len(rows) < 2 or against:
            return None
        step, shadow = (sum(row[key] / row["steps"] for row in rows) / len(rows) for key in ("cos_step", "cos_shadow"))
        if abs(step) >= min(0.05, 0.15 * shadow):
            return None
        noise = [name for name, row in e.tally.items() if row in rows]
        what = f"updates follow the gradient with a cosine of {step:.2f} in the mean (plain AdamW's {shadow:.2f})"
    return Finding(
        "unrelated_to_gradient",
        f"{what}, in {len(noise)} of {len(e.tally)} tensors ({_listed(noise)}): noise, an old gradient or another "
        "tensor's, or mixed-up entries",
    )


def _no_statistics(e: Evidence) -> Finding | None:
    readings = e.readings()
    samples = [r["samples"] for r in readings if r["samples"] is not None]
    if not readings or any(r["ready"] for r in readings) or not samples or max(samples) > 0:
        return None
    return Finding(
        "no_statistics",
        f"not one token reached the statistics in {e.steps} steps: hooks on lora_A do not fire where fused kernels "
        "read the weights themselves; use statistics made of gradients, or switch the fusing off",
    )


def _zero_factors(e: Evidence) -> Finding | None:
    counted = [r for r in e.readings() if r["samples"]]
    shares = {side: _share(r[key] == 0 for r in counted if key in r) for side, key in _sides("factor_norm_", counted)}
    zero = {side: share for side, share in shares.items() if share > 0.5}
    if not zero:
        return None
    parts = ", ".join(f"{share:.0%} of those of side {side}" for side, share in zero.items())
    why = "a detached or zeroed tensor is added up, B is still at zero, or products below 6e-8 became 0 in float16"
    if any(reading.get("factor_bits", 32) < 32 for reading in e.readings()):
        why = "they are kept in 16 bit, where small products become 0: keep them in float32"
    return Finding("zero_factors", f"factors are exactly zero although tokens were counted ({parts}): {why}")


def _sides(prefix: str, readings: Collection[dict[str, float]]) -> list[tuple[str, str]]:
    """(side, key) of the numbers with this prefix."""
    return [(k.removeprefix(prefix), k) for k in sorted({k for r in readings for k in r if k.startswith(prefix)})]


def _empty_inverse(e: Evidence) -> Finding | None:
    share = _share(v for r in e.readings() if r["ready"] for k, v in r.items() if k.startswith("empty_"))
    if share <= e.thresholds.often:
        return None
    return Finding(
        "empty_inverse",
        f"{share:.0%} of the preconditioners that are called ready are missing, zero, not finite, or the identity "
        "although their factor is not: the inversion failed and nobody looked",
    )


def _nothing_changed(e: Evidence) -> Finding | None:
    readings = e.readings()
    changed = [n for n in e.of_all("times_changed") if n is not None]
    never_ready = bool(readings) and not any(r["ready"] for r in readings)
    no_change = bool(changed) and not any(changed) and not e.rotates and not e.reached  # with hooks, calls say little
    untouched = not e.rotates and not any(
        row["turned"] or row["off"] or row["log_ratio_sq"] > 1e-12 for row in e.tally.values()
    )
    if never_ready:
        why = "no layer was ever ready (a minimum of samples that is never reached, a warm-up longer than the run)"
    elif no_change:
        why = "its calls left every gradient as it was (it works on copies or on other tensors)"
    elif untouched and not e.watched and not e.reached:
        why = "every gradient reached the optimizer as backward left it, and the updates are plain AdamW's"
    else:
        return None
    return Finding("nothing_changed", f"the preconditioner has changed nothing in {e.steps} steps: {why}")


def _gradient_overflow(e: Evidence) -> Finding | None:
    shares = {name: e.share(name, "overflow") for name in e.tally if e.share(name, "overflow") > e.thresholds.often}
    if not shares:
        return None
    return Finding(
        "gradient_overflow",
        f"in {max(shares.values()):.0%} of the steps what the optimizer reads is not finite, or its square is not, in "
        f"{len(shares)} of {len(e.tally)} tensors ({_listed(shares)}), though the gradient was finite",
    )


def _gradient_lost(e: Evidence) -> Finding | None:
    share = _share(
        max(entry.get("zero_share") or 0.0, entry.get("zero_share_call") or 0.0) > e.thresholds.lost
        for r in e.judged
        for entry in r["units"].values()
        if "norm_raw" in entry
    )
    if share <= 0.02:
        return None
    return Finding(
        "nan_to_zero",
        f"in {share:.0%} of the samples entries of gradients that were not zero became exactly zero on the way: was a "
        "NaN or infinity replaced by 0 (nan_to_num) instead of being looked at, or are they masked?",
    )


def _clipped_to_nothing(e: Evidence) -> Finding | None:
    shares, still = [], []
    for record in e.judged:
        for entry in record["units"].values():
            longest = entry.get("norm_after") or entry.get("norm_raw")
            if not longest or entry.get("norm_inner") is None:
                continue
            shares.append(entry["norm_inner"] / max(longest, entry.get("norm_raw") or 0.0))
            typical = entry["norm_inner"] / entry["size"] ** 0.5
            below_eps = record["eps"] is not None and typical < 10 * record["eps"]
            still.append(below_eps or entry["norm_delta"] < 1e-7 * entry["norm_weights"])
    share = median(shares)
    if not share or share > 0.01 or _share(still) <= 0.5:
        return None
    return Finding(
        "clipped_to_nothing",
        f"what the optimizer reads is {share:.1e} of the gradient's length, below Adam's ε: the weights hardly "
        f"move ({median(e.of_all('lr_ratio')) or 0.0:.1e} times as far as plain AdamW's); graft the raw norm back, or "
        "clip before preconditioning",
    )


def _damping_swamps(e: Evidence) -> Finding | None:
    if e.coverage >= e.thresholds.min_coverage:
        return None
    swamped = {}
    for side, key in _sides("damping_share_", e.readings()):
        ready = [r for r in e.readings() if r["ready"] and f"anisotropy_{side}" in r]
        share, spread = (median(r.get(name) for r in ready) for name in (key, f"anisotropy_{side}"))
        if share is not None and spread is not None and share > e.thresholds.swamped and spread < e.thresholds.scalar:
            swamped[side] = share
    if not swamped:
        return None
    parts = ", ".join(f"{share:.3g} times that of side {side}" for side, share in swamped.items())
    return Finding(
        "damping_swamps_factors",
        f"damping λ is far above the factors' mean eigenvalue ({parts}), so (Σ + λI)⁻¹ is I/λ there, a scalar, which "
        "AdamW cancels; make λ relative to tr(Σ)/r, and undo the loss's mean in δ before Σ_g",
    )


def _scalar_preconditioner(e: Evidence) -> Finding | None:
    rows = [row for name, row in e.tally.items() if name in e.tensors and row["steps"] > row["lost"]]
    if e.rotates or e.reached or not rows or any(row["turned"] > 0.1 * row["steps"] for row in rows):
        return None
    logs = [(row["log_ratio"] / n, row["log_ratio_sq"] / n) for row in rows for n in [row["steps"] - row["lost"]]]
    ratio = math.exp(median(mean for mean, _ in logs) or 0.0)
    spread = median(math.sqrt(max(0.0, square - mean**2)) for mean, square in logs) or 0.0
    anisotropy = e.reading_median("anisotropy")
    changed = any(n for name in e.tensors for n in e.values(name.rpartition(".")[0], "times_changed"))
    scalar = (anisotropy is not None and anisotropy < e.thresholds.scalar) or changed
    if not scalar and spread <= 0.02 and abs(math.log(ratio)) <= 0.02:
        return None
    if spread > 0.2:
        what = (
            f"the preconditioner multiplies each gradient by one number, which changes from step to step (about "
            f"{ratio:.3g}, by a factor of {math.exp(spread):.2g}), and turns none by more than {TURNED}°: that weighs "
            "the steps against each other, which Adam does not cancel, but there is no curvature in it"
        )
    else:
        what = (
            f"the preconditioner multiplies every gradient by one number (about {ratio:.3g}) and turns none by more "
            f"than {TURNED}°: Adam cancels that, and to SGD it is another learning rate"
        )
    return Finding("scalar_preconditioner", what)


def _turned_in_vain(e: Evidence) -> Finding | None:
    turned = [name for name in e.tensors if e.share(name, "turned") > 0.5]
    if e.reached or not turned or len(turned) < 0.5 * len(e.tensors):
        return None
    angle = median(median(e.values(unit, "angle_raw_inner")) for unit in e.units) or 0.0
    if (median(e.of_all("sign_kept")) or 0.0) > 0.999:
        return Finding(
            "diagonal_preconditioner",
            f"gradients of {len(turned)} of {len(e.tensors)} tensors are turned by {angle:.1f}°, but no entry changes "
            "its sign, and the updates are plain AdamW's: each entry is multiplied by a positive number that stays the "
            "same, which Adam cancels",
        )
    return Finding(
        "gradient_not_used",
        f"the gradients are turned by {angle:.1f}° when the optimizer steps, but its updates are plain AdamW's of the "
        "raw ones: it computes with another copy (master weights, gradients saved by a hook)",
    )


def _modules_missing(e: Evidence) -> Finding | None:
    elsewhere = any(row["turned"] for name, row in e.tally.items() if name not in e.tensors)  # biases alone
    if e.coverage >= e.thresholds.min_coverage or not (e.coverage or elsewhere):
        return None
    left_out = [name for name, reached in e.tensors.items() if not reached]
    return Finding(
        "modules_missing",
        f"{len(left_out)} of {len(e.tensors)} tensors are not preconditioned: {_listed(left_out)}",
        left_out,
    )


def _steps_missing(e: Evidence) -> Finding | None:
    if not e.reached:
        return None
    rows, last_step = [e.tally[name] for name in e.reached], e.steps - 1
    first = median(row[f"{e.effect}_first"] for row in rows) or 0.0
    last = median(row[f"{e.effect}_last"] for row in rows) or 0.0
    total = sum(e.share(name, e.effect) for name in e.reached) / len(rows)
    called = e.events["steps_called"]
    often = [share >= e.thresholds.min_steps for share in e.step_shares.values()]
    if sum(often) >= e.thresholds.min_coverage * len(often):
        if first <= e.thresholds.late * e.steps:
            return None
        when = f"it begins at step {first:.0f} only"
    elif e.watched and 0 < called < e.thresholds.min_steps * e.steps:
        when = f"its method was called in {called} of them"
    elif last < 0.9 * last_step:
        when = f"the last is step {last:.0f}"
    else:
        when = "it comes and goes"
    return Finding("steps_missing", f"preconditioning reaches {total:.0%} of the {e.steps} steps: {when}")


# Statistics, and the training itself


def _overcounted(e: Evidence) -> Finding | None:
    gained = [
        (entry["reading"]["samples_gained"], r["tokens"], r["passes"])
        for r in e.judged
        for entry in r["units"].values()
        if entry.get("reading", {}).get("samples_gained") and r["tokens"]["attended"]
    ]
    if not gained:
        return None

    def near(value: float, target: float) -> bool:
        return abs(value - target) <= 0.02 * target

    ratio = median(n / t["attended"] for n, t, _ in gained) or 0.0
    if _share(near(n, t["all"]) and t["attended"] < 0.98 * t["all"] for n, t, _ in gained) > 0.5:
        return Finding(
            "padding_counted",
            f"statistics count every position, padding too: {ratio:.2f} times the attended tokens; leave out positions "
            "with attention_mask 0",
        )
    if ratio <= 1.02:
        return None
    multiple = [near(n, p * t["attended"]) or near(n, p * t["all"]) for n, t, p in gained if p > 1]
    if sum(multiple) > 0.5 * len(gained):
        return Finding(
            "accumulation_overcounted",
            f"statistics count {ratio:.2f} times the tokens of a step, which has {max(p for *_, p in gained)} backward "
            "passes: every micro-batch is added once for each of them",
        )
    return Finding(
        "samples_overcounted",
        f"statistics count {ratio:.2f} times the tokens of a step (checkpointing runs the forward pass twice: count in "
        "the backward pass)",
    )


def _stale_factors(e: Evidence) -> Finding | None:
    spans = []
    for unit in dict.fromkeys(n for r in e.judged for n, u in r["units"].items() if "reading" in u):
        samples = [(r["step"], r["units"][unit]["reading"]) for r in e.judged if "reading" in r["units"].get(unit, {})]
        ready = [(step, reading) for step, reading in samples if reading["ready"]]
        same = (list(members) for _, members in itertools.groupby(ready, key=lambda entry: entry[1]["hash"]))
        stretch = max(same, key=len, default=[])
        if len(stretch) < 3:
            continue
        interval = stretch[0][1].get("refresh_every")
        span = stretch[-1][0] - stretch[0][0]
        if span >= (3 * interval if interval else e.thresholds.stale_after):
            spans.append(span)
    if not spans or len(spans) <= e.thresholds.often * len(e.units):
        return None
    return Finding(
        "stale_factors",
        f"the preconditioners of {len(spans)} layers stayed the same to the bit over {max(spans)} steps, while A and B "
        "moved: refresh them",
    )


def _not_finite(e: Evidence) -> Finding | None:
    bad, gradients = e.events["nonfinite_losses"], e.events["nonfinite_gradients"]
    if bad <= e.thresholds.often * len(e.records) and gradients <= e.thresholds.often * e.steps:
        return None
    return Finding(
        "not_finite",
        f"{bad} sampled losses and the gradients of {gradients} steps are NaN or infinite: lower the learning rate, "
        "look at the data",
    )


def _diverging(e: Evidence) -> Finding | None:
    losses = [r["loss"] for r in e.records if r.get("loss") is not None]
    part = max(3, len(losses) // 5)
    if len(losses) < 2 * part:
        return None  # too few samples to distinguish a rise from a hard batch
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    apart = min(losses[-part:]) > max(losses[:part])
    if not apart or last - first <= e.thresholds.blow_up * abs(first):
        return None
    return Finding("diverging", f"the loss rose from {first:.3g} to {last:.3g}: lower the learning rate")


Fault = Callable[[Evidence], Finding | None]

# fmt: off
FIRST: tuple[Fault, ...] = (_steps_unseen, _clipped_to_nothing, _not_moving, _not_finite, _no_gradient)
OF_A_CLAIM: tuple[Fault, ...] = (
    _wrapper_bypassed, _never_called, _preconditioned_after_step, _applied_repeatedly, _gradient_recomputed,
    _gradient_restored, _no_statistics, _zero_factors, _empty_inverse, _nothing_changed, _gradient_lost,
    _gradient_overflow, _damping_swamps, _scalar_preconditioner, _turned_in_vain, _unrelated, _uphill, _modules_missing,
    _steps_missing, _overcounted, _stale_factors,
)
OF_ANY: tuple[Fault, ...] = (_unrelated, _uphill, _diverging)
