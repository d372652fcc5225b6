"""Which layers of a model are adapted: glob patterns, and strategies over the layers they match.

A layer is one of the model's numbered blocks: all matched modules whose name goes through the same number belong to
it, and a strategy takes it with all of them or not at all. The number is the first one that a pattern's `*` stands for
(`layers.*.self_attn.q_proj`), or, where none does, the first one in the name. A module without a number, e.g. a
projector between the modalities, is a layer of its own. The name up to the number is part of the layer, so that two
encoders (`vision.layers.*`, `text.layers.*`) are never mixed up.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum


class SelectionError(ValueError):
    """Patterns or a strategy that do not fit the model; the message names what there is."""


class LayerSelectionStrategy(Enum):
    """Which of the matched layers are adapted."""

    ALL = "all"
    FIRST_N = "first_n"
    LAST_N = "last_n"
    EVERY_NTH = "every_nth"
    SPECIFIC = "specific"
    SKIP_FIRST_LAST = "skip_first_last"


_NUMBER_OF = {
    LayerSelectionStrategy.FIRST_N: "n_layers",
    LayerSelectionStrategy.LAST_N: "n_layers",
    LayerSelectionStrategy.EVERY_NTH: "step_size",
}


def whole(value: object, least: int = 1) -> bool:
    """Whether a value is a whole number of at least `least` (True and False are none)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def match(pattern: str, names: Iterable[str]) -> dict[str, str]:
    """Name → its layer, of the modules that a pattern names, in the order of `names`.

    Args:
        pattern: `*` stands for any characters but dots; every other character for itself.
        names: Of modules, parts joined by dots.
    """
    regex = re.compile("[^.]*".join(map(re.escape, pattern.split("*"))))
    starred = ["*" in part for part in pattern.split(".")]
    return {name: _layer(name.split("."), starred) for name in names if regex.fullmatch(name)}


def _layer(parts: Sequence[str], starred: Sequence[bool]) -> str:
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    under_star = [i for i in numbers if starred[i]]
    end = (under_star or numbers or [len(parts) - 1])[0] + 1
    return ".".join(parts[:end])


def near_misses(pattern: str, names: Iterable[str], most: int = 3) -> list[str]:
    """What a pattern that matches nothing may have meant, nearest first; numbers are written as `*`.

    Names are near that share parts with the pattern (compared part by part, so that a missing or another first part
    does not matter) or are spelled like it.

    Args:
        pattern: That matches none of `names`.
        names: Of all modules that can be adapted.
        most: How many to name.
    """
    wanted = _starred(pattern)
    parts = [part for part in wanted.split(".") if part != "*"]

    def nearness(name: str) -> float:
        own = [part for part in name.split(".") if part != "*"]
        similar = [max(difflib.SequenceMatcher(None, part, one).ratio() for one in own) for part in parts]
        shared = sum(similar) / max(len(parts), len(own), 1)
        return shared + difflib.SequenceMatcher(None, wanted, name).ratio()

    kinds = dict.fromkeys(map(_starred, names))
    return sorted(kinds, key=nearness, reverse=True)[:most]


def _starred(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def match_all(
    patterns: Sequence[str], names: Sequence[str], where: str, others: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
    """Layer → its modules that any of the patterns matches, each once; all in the model's order.

    Args:
        patterns: Globs.
        names: Of all modules that can be adapted, in the model's order.
        where: Said in errors, e.g. "vision".
        others: Name → class of modules that cannot be adapted, to say so where a pattern matches only such.

    Raises:
        SelectionError: some patterns match nothing; all of them are named, with near misses among the names.
    """
    found: dict[str, str] = {}
    problems = []
    for pattern in patterns:
        hits = match(pattern, names)
        found = hits | found
        if not hits:
            problems.append(f"{where}: the pattern {pattern!r} {_instead(pattern, names, others or {})}")
    if problems:
        raise SelectionError("\n".join(problems))
    layers: dict[str, list[str]] = {}
    for name in names:
        if name in found:
            layers.setdefault(found[name], []).append(name)
    return layers


def _instead(pattern: str, names: Sequence[str], others: Mapping[str, str]) -> str:
    """What a pattern without a match does match, and what was meant perhaps."""
    blocked = list(match(pattern, others))
    below = dict.fromkeys(_starred(name) for name in names if name.startswith(tuple(f"{n}." for n in blocked)))
    near = list(below)[:5] or near_misses(pattern, names)
    meant = f"near misses: {', '.join(near)}" if near else "the model has no linear layers"
    if not blocked:
        numbers = [_numbers(name) for name in match(_starred(pattern), names)]
        only = sorted(int(one) for one, *more in numbers if not more)
        beyond = f" (numbers there go from {only[0]} to {only[-1]})" if only else ""
        return f"matches nothing{beyond}; {meant}"
    more = f" and {len(blocked) - 1} more" if len(blocked) > 1 else ""
    return f"matches no layer that can be adapted, but {blocked[0]} ({others[blocked[0]]}){more}; {meant}"


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdecimal()]


def parameter_problem(
    strategy: LayerSelectionStrategy,
    n_layers: int | None = None,
    step_size: int | None = None,
    specific_indices: Sequence[int] | None = None,
) -> str | None:
    """What is wrong, whatever the model, with the one parameter that a strategy needs; None: nothing."""
    if strategy in _NUMBER_OF:
        name = _NUMBER_OF[strategy]
        value = {"n_layers": n_layers, "step_size": step_size}[name]
        return None if whole(value) else f"{name}: {strategy.name} wants a whole number from 1 on, got {value!r}"
    if strategy is LayerSelectionStrategy.SPECIFIC:
        usual = isinstance(specific_indices, (list, tuple)) and specific_indices
        if not usual or not all(isinstance(i, int) and not isinstance(i, bool) for i in specific_indices or ()):
            return f"specific_indices: SPECIFIC wants a list of whole numbers, got {specific_indices!r}"
    return None


def select(
    layers: Sequence[str],
    strategy: LayerSelectionStrategy,
    *,
    n_layers: int | None = None,
    step_size: int | None = None,
    specific_indices: Sequence[int] | None = None,
    where: str = "layers",
) -> list[str]:
    """The layers that a strategy takes, in their order.

    Args:
        layers: All matched ones, in order.
        strategy: Which.
        n_layers: How many, of FIRST_N and LAST_N.
        step_size: Of EVERY_NTH: 2 takes the first, third, fifth, …
        specific_indices: Of SPECIFIC: places among the layers, from 0; negative ones count from the end.
        where: Said in errors.

    Raises:
        SelectionError: the strategy's own parameter is missing or out of range, or nothing would be left.
    """
    count = len(layers)
    problem = parameter_problem(strategy, n_layers, step_size, specific_indices)
    if strategy is LayerSelectionStrategy.SPECIFIC and not problem:
        wrong = [i for i in specific_indices or () if not -count <= i < count]
        if wrong:
            problem = f"specific_indices: expected {-count} to {count - 1}, for there are {count} layers; got {wrong}"
    elif strategy in (LayerSelectionStrategy.FIRST_N, LayerSelectionStrategy.LAST_N) and not problem:
        if (n_layers or 0) > count:
            problem = f"n_layers: expected at most {count}, for so many layers there are; got {n_layers}"
    elif strategy is LayerSelectionStrategy.SKIP_FIRST_LAST and count < 3:
        problem = f"strategy: SKIP_FIRST_LAST wants at least 3 layers, got {count} ({', '.join(layers)})"
    if problem:
        raise SelectionError(f"{where}.{problem}")
    places = {
        LayerSelectionStrategy.FIRST_N: range(n_layers or 0),
        LayerSelectionStrategy.LAST_N: range(count - (n_layers or 0), count),
        LayerSelectionStrategy.EVERY_NTH: range(0, count, step_size or 1),
        LayerSelectionStrategy.SPECIFIC: sorted({i % count for i in specific_indices or ()}),
        LayerSelectionStrategy.SKIP_FIRST_LAST: range(1, count - 1),
    }.get(strategy, range(count))
    return [layers[i] for i in places]


def limit(layers: dict[str, list[str]], most: int | None, where: str = "layers") -> tuple[dict[str, list[str]], str]:
    """Cut to at most `most` modules, whole layers from the front; and what is to be said of it ("" where nothing is).

    Args:
        layers: Layer → its modules.
        most: Modules; None: no limit.
        where: Said in errors.

    Raises:
        SelectionError: not even the first layer fits.
    """
    total = sum(map(len, layers.values()))
    if most is None or total <= most:
        return layers, ""
    kept: dict[str, list[str]] = {}
    room = most
    for layer, modules in layers.items():
        room -= len(modules)
        if room < 0:
            break
        kept[layer] = modules
    if not kept:
        first, modules = next(iter(layers.items()))
        raise SelectionError(
            f"{where}: expected max_layers_per_modality of at least {len(modules)}, the modules of {first}; got {most}"
        )
    return kept, f"limited to {sum(map(len, kept.values()))} of {total} modules by max_layers_per_modality = {most}"
