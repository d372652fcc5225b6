"""Which layers of a model are adapted: glob patterns, and strategies over the layers they match.

A layer is one of the model's numbered blocks. Where a pattern's `*` stands for a number (`layers.*.self_attn.q_proj`),
all modules of one number belong to one layer, and a strategy takes it with all of them or not at all. A module without
such a number, e.g. a projector between the modalities, is a layer of its own. Numbers count within one pattern's stem,
so two encoders (`vision.layers.*`, `text.layers.*`) are never mixed up.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum


class SelectionError(ValueError):
    """Patterns or a strategy that select nothing, or contradict themselves; names what there is."""


class LayerSelectionStrategy(Enum):
    """Which of the matched layers are adapted."""

    ALL = "all"
    FIRST_N = "first_n"
    LAST_N = "last_n"
    EVERY_NTH = "every_nth"
    SPECIFIC = "specific"
    SKIP_FIRST_LAST = "skip_first_last"


@dataclass(frozen=True)
class Match:
    """A module that a pattern matched.

    Attributes:
        name: Of the module.
        layer: What tells layers apart: the name up to and with its first number under a `*`, or the whole name.
        number: That number; None where no `*` stood for one.
    """

    name: str
    layer: str
    number: int | None


def pattern_regex(pattern: str) -> re.Pattern[str]:
    """A glob pattern as a regular expression: `*` matches anything but dots, one character at least.

    Raises:
        SelectionError: the pattern is empty, or has `**`, which would cross dots.
    """
    if not pattern or "**" in pattern:
        raise SelectionError(f"expected a pattern such as 'model.layers.*.self_attn.q_proj', got {pattern!r}")
    return re.compile("".join("([^.]+)" if part == "*" else re.escape(part) for part in re.split(r"(\*)", pattern)))


def match(pattern: str, names: Iterable[str]) -> list[Match]:
    """The modules that a pattern names, in the model's order."""
    regex, found = pattern_regex(pattern), []
    for name in names:
        if (hit := regex.fullmatch(name)) is None:
            continue
        numbered = next((i for i, text in enumerate(hit.groups(), 1) if text.isdecimal()), None)
        if numbered is None:
            found.append(Match(name, name, None))
        else:
            found.append(Match(name, name[: hit.end(numbered)], int(hit[numbered])))
    return found


def near_misses(pattern: str, names: Sequence[str], most: int = 5) -> list[str]:
    """Names that a pattern which matches nothing may have meant: nearest first, one of each kind of layer."""
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), name)
    return difflib.get_close_matches(pattern, list(kinds), n=most, cutoff=0.3)


def match_all(patterns: Sequence[str], names: Sequence[str], where: str) -> list[Match]:
    """What any of the patterns matches, each module once, in the model's order.

    Args:
        patterns: Globs.
        names: Of all modules that can be adapted.
        where: Said in errors, e.g. "vision".

    Raises:
        SelectionError: some patterns match nothing, all of them named with near misses among the names.
    """
    found: dict[str, Match] = {}
    problems = []
    for pattern in patterns:
        hits = match(pattern, names)
        found |= {hit.name: hit for hit in hits if hit.name not in found}
        if not hits:
            near = near_misses(pattern, names)
            meant = f"near misses: {', '.join(near)}" if near else f"there are {len(names)} modules that can be adapted"
            problems.append(f"{where}: the pattern {pattern!r} matches nothing; {meant}")
    if problems:
        raise SelectionError("\n".join(problems))
    place = {name: i for i, name in enumerate(names)}
    return sorted(found.values(), key=lambda hit: place[hit.name])


def layers_of(matches: Sequence[Match]) -> dict[str, list[str]]:
    """Layer → its matched modules; layers in the model's order."""
    layers: dict[str, list[str]] = {}
    for hit in matches:
        layers.setdefault(hit.layer, []).append(hit.name)
    return layers


def select(
    layers: Sequence[str],
    strategy: LayerSelectionStrategy,
    *,
    n_layers: int | None = None,
    step_size: int | None = None,
    specific_indices: Sequence[int] | None = None,
    where: str = "",
) -> list[str]:
    """The layers that a strategy takes.

    Args:
        layers: All matched ones, in order.
        strategy: Which.
        n_layers: How many, of FIRST_N and LAST_N; more than there are means all.
        step_size: Of EVERY_NTH: 2 takes the first, third, fifth, …
        specific_indices: Of SPECIFIC: places among the layers, from 0; negative ones count from the end.
        where: Said in errors.

    Raises:
        SelectionError: the strategy's own parameter is missing or out of range, or nothing would be left.
    """
    count = len(layers)
    needed = {
        LayerSelectionStrategy.FIRST_N: ("n_layers", n_layers),
        LayerSelectionStrategy.LAST_N: ("n_layers", n_layers),
        LayerSelectionStrategy.EVERY_NTH: ("step_size", step_size),
    }
    if strategy in needed:
        name, value = needed[strategy]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SelectionError(f"{where}: {strategy.name} wants {name}, a whole number from 1 on; got {value!r}")
    if strategy is LayerSelectionStrategy.FIRST_N:
        return list(layers[:n_layers])
    if strategy is LayerSelectionStrategy.LAST_N:
        return list(layers[-n_layers:]) if n_layers else []
    if strategy is LayerSelectionStrategy.EVERY_NTH:
        return list(layers[::step_size])
    if strategy is LayerSelectionStrategy.SKIP_FIRST_LAST:
        if count < 3:
            raise SelectionError(f"{where}: SKIP_FIRST_LAST leaves nothing of {count} layers: {', '.join(layers)}")
        return list(layers[1:-1])
    if strategy is LayerSelectionStrategy.SPECIFIC:
        if not specific_indices:
            raise SelectionError(f"{where}: SPECIFIC wants specific_indices, got {specific_indices!r}")
        wrong = [i for i in specific_indices if not -count <= i < count]
        if wrong:
            raise SelectionError(f"{where}: expected specific_indices from {-count} to {count - 1}, got {wrong}")
        return [layers[i] for i in sorted({i % count for i in specific_indices})]
    return list(layers)


def limit(layers: dict[str, list[str]], most: int | None) -> tuple[dict[str, list[str]], str]:
    """Cut to at most `most` modules, whole layers from the front; and what is to be said of it.

    Raises:
        SelectionError: not even the first layer fits.
    """
    total = sum(map(len, layers.values()))
    if most is None or total <= most:
        return layers, ""
    kept: dict[str, list[str]] = {}
    for layer, modules in layers.items():
        if sum(map(len, kept.values())) + len(modules) > most:
            break
        kept[layer] = modules
    if not kept:
        first = next(iter(layers.values()))
        raise SelectionError(
            f"max_layers_per_modality: expected room for the {len(first)} modules of one layer, got {most}"
        )
    return kept, f"limited to {sum(map(len, kept.values()))} of {total} modules by max_layers_per_modality = {most}"
