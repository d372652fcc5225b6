"""One sampled step as numbers: norms, angles and checksums of every point on the way from gradient to weight."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from probes import geometry
from probes.step import Snapshot, StepNotes
from probes.units import Unit, Values, tensors

Record = dict[str, Any]


def step_record(
    step: int, units: list[Unit], now: StepNotes, raw: Snapshot, shadow: Sequence[Tensor], options: dict[str, Any]
) -> Record:
    """What the ledger keeps of a sampled step; readings come on top.

    Args:
        step: Its number.
        units: With their parameters as they are after the step.
        now: What was noted while it ran.
        raw: Gradients as backward passes left them.
        shadow: Δθ of plain AdamW, of each tensor.
        options: Of the shadow.
    """
    points: dict[str, Snapshot] = {"raw": raw, "door": now.door, "inner": now.inner or now.door}
    if now.calls:
        points |= {"before": now.before, "after": now.after}
    loss = now.loss
    record: Record = {
        "step": step,
        "loss": loss if loss is not None and math.isfinite(loss) else None,
        "lr": options["lr"],
        "eps": options["eps"] if options["adam"] else None,
        "passes": max(now.hits, default=0),
        "calls": now.calls,
        "nested": bool(now.inner),
        "tokens": now.tokens_of_all_ranks(now.weights[0].device),
        "units": measure(units, points, now.weights, shadow),
    }
    for i, (unit, _, _) in enumerate(tensors(units) if now.calls else []):
        entry = record["units"].get(unit.name)
        if entry is not None:
            entry["times_changed"] = max(entry.get("times_changed", 0), now.changed[i])
            entry["late_gradients"] = entry.get("late_gradients", False) or now.late[i]
    return record


def mark_claims(record: Record, units: list[Unit], claimed: Callable[[str], bool] | None) -> None:
    """Note for which units preconditioning is claimed; by default for those of two dimensions or more."""
    for unit in units:
        if unit.name in record["units"]:
            matrix = all(p.dim() >= 2 for p in unit.sides.values())
            record["units"][unit.name]["claimed"] = claimed(unit.name) if claimed else matrix


def measure(
    units: list[Unit],
    points: dict[str, Snapshot],
    weights: Sequence[Tensor],
    shadow: Sequence[Tensor],
) -> dict[str, dict[str, Any]]:
    """Numbers of each unit that has gradients.

    Args:
        units: With their parameters as they are after the step.
        points: Name → gradients; "raw", "door" and "inner" always, "before" and "after" of a preconditioner's call.
        weights: Of each tensor before the step.
        shadow: Δθ of plain AdamW, of each tensor.

    Returns:
        Unit → `size` (entries), `norm_<point>`, `norm_weights` (of the tensors), `norm_delta`, `norm_shadow`;
        `angle_raw_door`, `angle_raw_inner`, `angle_call` (before and after the call); `angle` of Δθ and shadow and
        `angle_weights` of the changes of ΔW, whose length is `norm_delta_weights`; `lr_ratio` ‖Δθ‖/‖shadow‖;
        `<name>_<side>` of `angle_raw_inner`, `angle_call`, `angle`, `lr_ratio`; `cos_raw_inner`, `cos_raw_step` of raw
        gradient and −Δθ; `zero_share`, `zero_share_call` of entries zeroed on the way; `hash_<point>_<side>`. Angles in
        degrees; None where one of two vectors is zero.
    """
    numbers: dict[str, dict[str, Tensor]] = {}
    hashes: dict[str, dict[str, Tensor]] = {}
    sizes: dict[str, int] = {}
    grams: dict[tuple[str, str], Tensor] = {}
    names = [*points, "weights", "delta", "shadow"]
    place = 0
    for unit in units:
        at = dict(zip(unit.sides, range(place, place + len(unit.sides)), strict=True))
        place += len(unit.sides)
        if any(points["raw"][i] is None for i in at.values()):
            continue
        vectors: dict[str, Values] = {
            name: {s: _or_zero(snapshot[i], weights[i]) for s, i in at.items()} for name, snapshot in points.items()
        }
        before = {s: weights[i] for s, i in at.items()}
        delta = {s: unit.sides[s].detach().float() - before[s].float() for s in at}
        own = {s: shadow[i] for s, i in at.items()}
        every = {**vectors, "weights": before, "delta": delta, "shadow": own}
        numbers[unit.name] = {"zero_share": geometry.zero_share(vectors["inner"], vectors["raw"])}
        if "after" in vectors:
            numbers[unit.name]["zero_share_call"] = geometry.zero_share(vectors["after"], vectors["before"])
        for side in at:
            grams[unit.name, side] = geometry.products([every[name][side] for name in names])
        if unit.is_pair:
            grams[unit.name, WEIGHTS] = geometry.weight_products(delta, own, before)
        sizes[unit.name] = sum(w.numel() for w in before.values())
        known: dict[int, Tensor] = {}  # door and inner are often the very same tensor
        for values in vectors.values():
            for v in values.values():
                if id(v) not in known:
                    known[id(v)] = geometry.checksum(v)
        hashes[unit.name] = {
            f"hash_{name}_{s}": known[id(v)] for name, values in vectors.items() for s, v in values.items()
        }
    found = _transferred(numbers, hashes)
    products = _lists(grams)
    for name, size in sizes.items():
        own_products = {side: products[unit, side] for unit, side in products if unit == name}
        found[name] = {**_derived(own_products, names), **found[name], "size": size}
    return found


WEIGHTS = "ΔW"


def _lists(grams: dict[tuple[str, str], Tensor]) -> dict[tuple[str, str], list[list[float]]]:
    """Matrices as nested lists, in one transfer for each device and size."""
    alike: dict[tuple[Any, ...], list[tuple[str, str]]] = {}
    for key, gram in grams.items():
        alike.setdefault((gram.device, gram.shape), []).append(key)
    found: dict[tuple[str, str], list[list[float]]] = {}
    for keys in alike.values():
        found.update(zip(keys, torch.stack([grams[key] for key in keys]).tolist(), strict=True))
    return found


def _derived(products: dict[str, list[list[float]]], names: list[str]) -> dict[str, Any]:
    """Norms, angles, cosines and ratios of a unit from the inner products of its sides, and from those of ΔW."""
    in_weights = products.get(WEIGHTS)
    sides = [side for side in products if side != WEIGHTS]

    def dot(one: str, two: str, among: list[str]) -> float:
        return sum(products[side][names.index(one)][names.index(two)] for side in among)

    def norm(name: str, among: list[str]) -> float:
        return math.sqrt(max(0.0, square)) if math.isfinite(square := dot(name, name, among)) else math.nan

    def cosine(one: str, two: str, among: list[str]) -> float | None:
        scale = norm(one, among) * norm(two, among)
        return dot(one, two, among) / scale if math.isfinite(scale) and scale > 0 else None

    def angle(one: str, two: str, among: list[str]) -> float | None:
        return _degrees(cosine(one, two, among))

    def ratio(among: list[str]) -> float | None:
        delta, shadow = norm("delta", among), norm("shadow", among)
        return delta / shadow if math.isfinite(delta) and shadow > 0 else None

    found = {f"norm_{name}": value if math.isfinite(value := norm(name, sides)) else None for name in names}
    pairs = {"angle_raw_door": ("raw", "door"), "angle_raw_inner": ("raw", "inner"), "angle": ("delta", "shadow")}
    if "after" in names:
        pairs["angle_call"] = ("before", "after")
    for key, (one, two) in pairs.items():
        found[key] = angle(one, two, sides)
        for side in sides if key != "angle_raw_door" else ():
            found[f"{key}_{side}"] = angle(one, two, [side])
    found["cos_raw_inner"] = cosine("raw", "inner", sides)
    step = cosine("raw", "delta", sides)
    found["cos_raw_step"] = None if step is None else -step
    found["lr_ratio"] = ratio(sides)
    found |= {f"lr_ratio_{side}": ratio([side]) for side in sides}
    if in_weights is not None:
        (square, mixed), (_, other) = in_weights
        scale = math.sqrt(max(0.0, square) * max(0.0, other)) if math.isfinite(square * other) else 0.0
        found["norm_delta_weights"] = math.sqrt(max(0.0, square)) if math.isfinite(square) else None
        found["angle_weights"] = _degrees(mixed / scale if scale > 0 else None)
    return found


def _degrees(cosine: float | None) -> float | None:
    if cosine is None:
        return None
    return math.degrees(2 * math.asin(math.sqrt(min(1.0, max(0.0, (1 - cosine) / 2)))))


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _transferred(
    numbers: dict[str, dict[str, Tensor]], hashes: dict[str, dict[str, Tensor]]
) -> dict[str, dict[str, Any]]:
    """All numbers in one transfer from each device; what is not finite (an angle with a zero vector) becomes None."""
    result: dict[str, dict[str, Any]] = {name: {} for name in numbers}
    for source, dtype in ((numbers, torch.float64), (hashes, torch.int64)):
        by_device: dict[torch.device, list[tuple[str, str, Tensor]]] = {}
        for unit, entries in source.items():
            for key, value in entries.items():
                by_device.setdefault(value.device, []).append((unit, key, value))
        for members in by_device.values():
            for (unit, key, _), number in zip(
                members, torch.stack([v.to(dtype) for *_, v in members]).tolist(), strict=True
            ):
                if dtype == torch.int64:
                    result[unit][key] = f"{number & (2**64 - 1):016x}"
                else:
                    result[unit][key] = number if math.isfinite(number) else None
    return result
