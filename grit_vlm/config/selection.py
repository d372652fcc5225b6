"""Which layers of a model are adapted: glob patterns, and strategies that choose among the layers they match.

A layer is one of the model's numbered blocks: all matched modules whose names share that number belong to it, and
a strategy selects all of them or none. The number is the first one matched by a `*` in the pattern
(`layers.*.self_attn.q_proj`), or else the first one in the name. A module without a number, e.g. a projector between
modalities, is a separate layer. The name up to the number identifies the layer, so two encoders (`vision.layers.*`,
`text.layers.*`) are never confused.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum

from grit_vlm.errors import GritVlmError


class LayerSelectionStrategy(Enum):
    ALL = "all"
    FIRST_N = "first_n"
    LAST_N = "last_n"
    EVERY_NTH = "every_nth"
    SPECIFIC = "specific"
    SKIP_FIRST_LAST = "skip_first_last"


def match(pattern: str, names: Iterable[str]) -> dict[str, str]:
    """Name → its layer, for the modules that a pattern matches; `*` matches any characters but dots."""
    regex = re.compile("[^.]*".join(map(re.escape, pattern.split("*"))))
    starred = ["*" in part for part in pattern.split(".")]
    return {name: _layer(name.split("."), starred) for name in names if regex.fullmatch(name)}


def _layer(parts: Sequence[str], starred: Sequence[bool]) -> str:
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    under_star = [i for i in numbers if starred[i]]
    end = (under_star or numbers or [len(parts) - 1])[0] + 1
    return ".".join(parts[:end])


def _starred(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def match_all(
    patterns: Sequence[str], names: Sequence[str], where: str, others: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
    """Layer → its modules that any pattern matches, without duplicates, in the order of `names`.

    `others`: modules that cannot be adapted, name → reason; errors mention those that a pattern matches.
    """
    layer_of: dict[str, str] = {}
    problems = []
    for pattern in patterns:
        hits = match(pattern, names)
        layer_of = hits | layer_of
        if not hits:
            problems.append(f"{where}: the pattern {pattern!r} {_no_match(pattern, names, others or {})}")
    if problems:
        raise GritVlmError("\n".join(problems))
    layers: dict[str, list[str]] = {}
    for name in names:
        if name in layer_of:
            layers.setdefault(layer_of[name], []).append(name)
    return layers


def _no_match(pattern: str, names: Sequence[str], others: Mapping[str, str]) -> str:
    blocked = list(match(pattern, others))
    below = dict.fromkeys(_starred(name) for name in names if name.startswith(tuple(f"{n}." for n in blocked)))
    kinds = dict.fromkeys(map(_starred, names))
    near = list(below)[:5] or difflib.get_close_matches(_starred(pattern), kinds, cutoff=0.0)
    hint = f"near misses: {', '.join(near)}" if near else "the model has no linear layers"
    if not blocked:
        return f"matches nothing; {hint}"
    more = f" and {len(blocked) - 1} more" if len(blocked) > 1 else ""
    return f"matches no layer that can be adapted, but {blocked[0]} ({others[blocked[0]]}){more}; {hint}"


def limit(layers: dict[str, list[str]], most: int | None, where: str = "layers") -> tuple[dict[str, list[str]], str]:
    """The first whole layers with at most `most` modules in total, and a note on what was dropped ("" if nothing)."""
    total = sum(map(len, layers.values()))
    if most is None or total <= most:
        return layers, ""
    selected: dict[str, list[str]] = {}
    room = most
    for layer, modules in layers.items():
        room -= len(modules)
        if room < 0:
            break
        selected[layer] = modules
    if not selected:
        first, modules = next(iter(layers.items()))
        raise GritVlmError(
            f"{where}: expected max_layers_per_modality of at least {len(modules)}, all modules of {first}; got {most}"
        )
    count = sum(map(len, selected.values()))
    return selected, f"limited to {count} of {total} modules by max_layers_per_modality = {most}"
