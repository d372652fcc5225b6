"""Faults of the preconditioner and of what it makes of gradients."""

from probes.evidence import Evidence, median
from probes.finding import Finding, fraction


def no_statistics(e: Evidence) -> Finding | None:
    """Readings that have seen nothing."""
    readings = e.readings()
    samples = [r["samples"] for r in readings if r["samples"] is not None]
    if not readings or any(r["ready"] for r in readings) or not samples or max(samples) > 0:
        return None
    return Finding(
        "no_statistics",
        f"not one token reached the statistics in {e.steps} steps: hooks on lora_A do not fire where fused kernels "
        "read the weights themselves; use statistics made of gradients, or switch the fusing off",
        {"samples": 0, "layers": len({n for r in e.judged for n, u in r["units"].items() if "reading" in u})},
    )


def zero_factors(e: Evidence) -> Finding | None:
    """Statistics that have seen tokens but are zero."""
    norms: dict[str, list[float]] = {}
    for reading in e.readings():
        for key, value in reading.items() if reading["samples"] else ():
            if key.startswith("factor_norm_"):
                norms.setdefault(key.removeprefix("factor_norm_"), []).append(value)
    shares = {side: fraction(sum(v == 0 for v in values), len(values)) for side, values in norms.items()}
    zero = {side: share for side, share in shares.items() if share > 0.5}
    if not zero:
        return None
    told = ", ".join(f"{share:.0%} of those of side {side}" for side, share in zero.items())
    return Finding(
        "zero_factors",
        f"factors are exactly zero although tokens were counted ({told}): what is added up is not what flows (a "
        "detached or zeroed tensor, B still at zero)",
        {f"zero_share_{side}": share for side, share in zero.items()},
    )


def empty_inverse(e: Evidence) -> Finding | None:
    """A preconditioner that is called ready and is nothing."""
    flags = [v for r in e.readings() if r["ready"] for k, v in r.items() if k.startswith("empty_")]
    share = fraction(sum(map(bool, flags)), len(flags))
    if share <= e.thresholds.often:
        return None
    return Finding(
        "empty_inverse",
        f"{share:.0%} of the preconditioners that are called ready are missing, zero, not finite, or the identity "
        "although their factor is not: the inversion failed and nobody looked",
        {"share": share, "preconditioners": len(flags)},
    )


def nothing_changed(e: Evidence) -> Finding | None:
    """A preconditioner that is never ready, or works on something else than the gradients."""
    readings = e.readings()
    changed = [n for u in e.units for n in e.values(u, "times_changed") if n is not None]
    never_ready = bool(readings) and not any(r["ready"] for r in readings)
    no_change = bool(changed) and not any(changed) and not e.rotates
    if not (never_ready or no_change):
        return None
    why = (
        "no layer was ever ready (a minimum of samples that is never reached, a warm-up longer than the run)"
        if never_ready
        else "its calls left every gradient as it was (it works on copies or on other tensors)"
    )
    return Finding("nothing_changed", f"the preconditioner has changed nothing in {e.steps} steps: {why}", {})


def gradient_lost(e: Evidence) -> Finding | None:
    """Entries that become exactly zero on the way (NaN replaced by 0)."""
    lost = [max(entry.get("zero_share") or 0.0, entry.get("zero_share_call") or 0.0)
            for r in e.judged for entry in r["units"].values() if "norm_raw" in entry]  # fmt: skip
    share = fraction(sum(v > e.thresholds.lost for v in lost), len(lost))
    if share <= 0.02:
        return None
    return Finding(
        "nan_to_zero",
        f"in {share:.0%} of the samples gradients that were not zero became exactly zero on the way: a NaN or infinity "
        "was replaced by 0 (nan_to_num) instead of being looked at",
        {"share_of_samples": share},
    )


def clipped_to_nothing(e: Evidence) -> Finding | None:
    """What clipping leaves does not move the weights."""
    kept, still = [], []
    for record in e.judged:
        for entry in record["units"].values():
            made = entry.get("norm_after") or entry.get("norm_raw")
            if not made or entry.get("norm_inner") is None:
                continue
            kept.append(entry["norm_inner"] / made)
            typical = entry["norm_inner"] / entry["size"] ** 0.5
            below_eps = record["eps"] is not None and typical < 10 * record["eps"]
            still.append(below_eps or entry["norm_delta"] < 1e-7 * entry["norm_weights"])
    left = median(kept)
    if left is None or left > 0.01 or fraction(sum(still), len(still)) <= 0.5:
        return None
    ratio = median(v for u in e.units for v in e.values(u, "lr_ratio"))
    return Finding(
        "clipped_to_nothing",
        f"clipping left {left:.1e} of the preconditioned gradient's length, below Adam's ε: the weights hardly "
        f"move ({ratio or 0.0:.1e} times as far as plain AdamW's); graft the raw norm back, or clip before "
        "preconditioning",
        {"kept": left, "lr_ratio": ratio},
    )


def damping_swamps(e: Evidence) -> Finding | None:
    """Damping far above the eigenvalues, of one side or all."""
    if e.coverage >= e.thresholds.min_coverage:
        return None
    sides = {k.removeprefix("damping_share_") for r in e.readings() for k in r if k.startswith("damping_share_")}
    swamped = {}
    for side in sorted(sides):
        ready = [r for r in e.readings() if r["ready"] and f"anisotropy_{side}" in r]
        share, spread = (median(r.get(f"{k}_{side}") for r in ready) for k in ("damping_share", "anisotropy"))
        if share is not None and spread is not None and share > e.thresholds.swamped and spread < e.thresholds.scalar:
            swamped[side] = share
    if not swamped:
        return None
    told = ", ".join(f"{share:.3g} times that of side {side}" for side, share in swamped.items())
    return Finding(
        "damping_swamps_factors",
        f"damping λ is far above the factors' mean eigenvalue ({told}), so (Σ + λI)⁻¹ is I/λ there, a scalar, which "
        "AdamW cancels; make λ relative to tr(Σ)/r, and undo the loss's mean in δ before Σ_g",
        {f"damping_share_{side}": share for side, share in swamped.items()} | {"coverage": e.coverage},
    )


def scalar_preconditioner(e: Evidence) -> Finding | None:
    """Gradients keep their direction."""
    if not e.gradient_should_change or e.coverage > e.thresholds.max_missing:
        return None
    angle, turned = (median(e.of_tensors(key).values()) for key in ("angle_raw_inner", "angle_call"))
    ratio = median(
        entry["norm_inner"] / entry["norm_raw"]
        for r in e.judged
        for entry in r["units"].values()
        if entry.get("norm_raw") and entry.get("norm_inner")
    )
    spread = e.reading_median("anisotropy")
    scalar = spread is not None and spread < e.thresholds.scalar
    changed = any(n for u in e.units for n in e.values(u, "times_changed"))
    scaled = changed and turned is not None and turned <= e.thresholds.min_gradient_angle
    if angle is None or angle > e.thresholds.min_gradient_angle or not (scalar or scaled):
        return None
    return Finding(
        "scalar_preconditioner",
        f"the preconditioner multiplies every gradient by one number (about {ratio:.3g}; its direction turns by "
        f"{angle:.1e}°): Adam cancels that, and to SGD it is another learning rate",
        {"angle_raw_inner": angle, "norm_ratio": ratio, "anisotropy": spread},
    )


def modules_missing(e: Evidence) -> Finding | None:
    """Some tensors are left out."""
    if not e.thresholds.max_missing < e.coverage < e.thresholds.min_coverage:
        return None
    left_out = [name for name, reached in e.tensors.items() if not reached]
    return Finding(
        "modules_missing",
        f"{len(left_out)} of {len(e.tensors)} tensors are not preconditioned: {', '.join(left_out[:4])}"
        f"{' …' if len(left_out) > 4 else ''}",
        {"coverage": e.coverage, "left_out": left_out},
    )
