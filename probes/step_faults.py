"""Faults around the step: what the optimizer is given is not what was preconditioned."""

from probes.evidence import Evidence
from probes.finding import Finding, fraction


def wrapper_bypassed(e: Evidence) -> Finding | None:
    """Steps that went into the wrapped optimizer past the wrapper that preconditions."""
    share = fraction(e.events["inner_called_directly"], e.steps)
    if share <= e.thresholds.often:
        return None
    return Finding(
        "wrapper_bypassed",
        f"{share:.0%} of the steps entered the wrapped optimizer directly, past its wrapper: whoever steps must hold "
        "the wrapper (wrap before accelerate's prepare and before the scheduler is made)",
        {"steps": e.steps, "inner_called_directly": e.events["inner_called_directly"]},
    )


def never_called(e: Evidence) -> Finding | None:
    """A preconditioner that nobody calls."""
    called = e.events["calls"] + e.events["calls_after_step"] + e.events["calls_before_backward"]
    if not e.watched or called or not e.steps:
        return None
    return Finding(
        "never_called",
        f"the preconditioner was not called once in {e.steps} steps: is the callback registered (add_callback), and "
        "its event one that exists?",
        {"steps": e.steps, "calls": 0},
    )


def preconditioned_after_step(e: Evidence) -> Finding | None:
    """Gradients changed when the optimizer has used them already."""
    after, changed = e.events["calls_after_step"], e.events["gradients_changed_after_step"]
    late_calls = e.watched and after > e.events["calls"]
    late_changes = changed > e.thresholds.often * e.steps
    if not (late_calls or late_changes):
        return None
    return Finding(
        "preconditioned_after_step",
        "gradients are preconditioned after optimizer.step() has used them (on_optimizer_step, on_step_end): nothing "
        "reaches the weights; do it inside the optimizer's step, or in on_pre_optimizer_step",
        {"steps": e.steps, "calls_after_step": after, "gradients_changed_after_step": changed},
    )


def applied_repeatedly(e: Evidence) -> Finding | None:
    """More than one call changes the same gradient in one step."""
    times = [n for u in e.units for n in e.values(u, "times_changed") if n]
    several = fraction(sum(n > 1 for n in times), len(times))
    if several <= e.thresholds.often:
        return None
    most = max(times)
    return Finding(
        "applied_repeatedly",
        f"the same gradient was preconditioned up to {most} times before one step (once for each micro-batch, or by "
        "two callers): P is applied as P^n; call it once a step",
        {"share_of_samples": several, "most_times": most},
    )


def gradient_recomputed(e: Evidence) -> Finding | None:
    """A backward pass after the call."""
    late = [bool(v) for u in e.units for v in e.values(u, "late_gradients") if v is not None]
    share = fraction(sum(late), len(late))
    if share <= e.thresholds.often:
        return None
    return Finding(
        "gradient_recomputed",
        f"in {share:.0%} of the samples a backward pass ran after preconditioning and overwrote or diluted its result; "
        "precondition after the last backward pass of a step",
        {"share_of_samples": share},
    )


def gradient_restored(e: Evidence) -> Finding | None:
    """The call changed gradients, but the optimizer got the old ones."""
    changed = restored = 0
    for record in e.judged:
        for entry in record["units"].values():
            sides = [k.removeprefix("hash_before_") for k in entry if k.startswith("hash_before_")]
            moved = [s for s in sides if entry[f"hash_before_{s}"] != entry[f"hash_after_{s}"]]
            changed += bool(moved)
            # Clipping may have scaled the old gradient: then the direction tells.
            back = all(entry[f"hash_before_{s}"] == entry[f"hash_inner_{s}"] for s in moved)
            turned_back = (entry.get("angle_call") or 0) > e.thresholds.min_gradient_angle and (
                (entry.get("angle_raw_inner") or 0) < 0.01 * entry["angle_call"]
            )
            restored += bool(moved) and (back or turned_back)
    share = fraction(restored, changed)
    if share <= 0.5:
        return None
    return Finding(
        "gradient_restored",
        f"preconditioning changed the gradients, but in {share:.0%} of these cases the optimizer got the raw ones: "
        "something puts a copy back in between",
        {"changed": changed, "restored": restored},
    )
