"""Which layers of a model are adapted: glob patterns, and strategies over the layers they match.

A layer is one of the model's numbered blocks: all matched modules whose name goes through the same number belong to
it, and a strategy takes it with all of them or not at all. The number is the first one that a pattern's `*` stands for
(`layers.*.self_attn.q_proj`), or, where none does, the first one in the name. A module without a number, e.g. a
projector between the modalities, is a layer of its own. The name up to the number is part of the layer, so two
encoders (`vision.layers.*`, `text.layers.*`) are never mixed up.
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
    """Name → its layer, for the modules that a pattern names; `*` matches any characters but dots."""
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
    """Layer → its modules that any of the patterns matches, each once; all in the order of `names`.

    `others`: modules that cannot be adapted, name → why; an error names those that a pattern does match.
    """
    found: dict[str, str] = {}
    problems = []
    for pattern in patterns:
        hits = match(pattern, names)
        found = hits | found
        if not hits:
            problems.append(f"{where}: the pattern {pattern!r} {_instead(pattern, names, others or {})}")
    if problems:
        raise GritVlmError("\n".join(problems))
    layers: dict[str, list[str]] = {}
    for name in names:
        if name in found:
            layers.setdefault(found[name], []).append(name)
    return layers


def _instead(pattern: str, names: Sequence[str], others: Mapping[str, str]) -> str:
    blocked = list(match(pattern, others))
    below = dict.fromkeys(_starred(name) for name in names if name.startswith(tuple(f"{n}." for n in blocked)))
    kinds = dict.fromkeys(map(_starred, names))
    near = list(below)[:5] or difflib.get_close_matches(_starred(pattern), kinds, cutoff=0.0)
    meant = f"near misses: {', '.join(near)}" if near else "the model has no linear layers"
    if not blocked:
        return f"matches nothing; {meant}"
    more = f" and {len(blocked) - 1} more" if len(blocked) > 1 else ""
    return f"matches no layer that can be adapted, but {blocked[0]} ({others[blocked[0]]}){more}; {meant}"


def limit(layers: dict[str, list[str]], most: int | None, where: str = "layers") -> tuple[dict[str, list[str]], str]:
    """At most `most` modules, whole layers from the front; and a note of what was cut, empty if nothing was."""
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
        raise GritVlmError(
            f"{where}: expected max_layers_per_modality of at least {len(modules)}, the modules of {first}; got {most}"
        )
    return kept, f"limited to {sum(map(len, kept.values()))} of {total} modules by max_layers_per_modality = {most}"
