"""The files of profiles/: what each sets, what it is based on, and which of them a name like gsm8k+smoke stands for."""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.config import ConfigError, load_yaml
from pipelines.schema import Params

PROFILES = Path("profiles")
BASIS = "tiny"
KINDS = ("size", "task", "variant")
# Keys of a profile that are none of params.yaml, by kind.
_OWN = {"size": ("based_on",), "task": ("based_on", "size", "full_size"), "variant": ("schedule",)}
_NAMES, _PARTS = ("based_on", "size"), ("full_size", "schedule")
_SECTIONS = set(Params.model_fields) - {"profile"}


@dataclass(frozen=True)
class Profile:
    """One file of profiles/.

    Attributes:
        name: Of the file.
        kind: size, task or variant.
        settings: What it sets.
        based_on: Of a size or a task: the one of its kind that it differs from; None: the basis, or none.
        size: Of a task: the size it runs on where none is named; None: that of the task it is based on, or the basis.
        full_size: Of a task: what it sets where the base is not the embedded one.
        schedule: Of a variant: what it sets where no full_size of a task does.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    based_on: str | None = None
    size: str | None = None
    full_size: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """What a name puts together, each in the order in which it is merged.

    Attributes:
        sizes: From the one nearest to the basis on, the basis left out.
        tasks: The one that is named last, those that it is based on before it.
        variants: As named.
    """

    sizes: list[Profile]
    tasks: list[Profile]
    variants: list[Profile]

    @property
    def names(self) -> list[str]:
        """Of all files, the basis first."""
        return [BASIS, *(profile.name for profile in (*self.sizes, *self.tasks, *self.variants))]


def available(folder: Path = PROFILES) -> list[str]:
    """Names of the profiles; files whose name begins with _ are there for others to be based on."""
    return sorted(path.stem for path in folder.glob("*.yaml") if not path.stem.startswith("_"))


def read_profile(name: str, folder: Path = PROFILES, *, common: bool = False) -> Profile:
    """One profile.

    Args:
        name: Of the file.
        folder: Where it lies.
        common: Whether it may be one that is there only for others to be based on.

    Raises:
        ConfigError: no such profile, or its own keys are wrong.
    """
    names = available(folder)
    file = folder / f"{name}.yaml"
    if name not in names and not (common and name.startswith("_") and file.is_file()):
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"no profile {name!r} in {folder}/.{hint} Available: {', '.join(names)}")
    if name == BASIS:
        return Profile(name, "size", {})
    content = load_yaml(file)
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected sections, got {type(content).__name__}")
    kind = content.pop("kind", "size")
    if kind not in KINDS:
        raise ConfigError(f"{file}: kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    keys: dict[str, Any] = {key: content.pop(key) for key in _OWN[kind] if key in content}
    problems = [
        f"{key}: expected the name of a profile, got {keys[key]!r}"
        for key in _NAMES
        if not isinstance(keys.get(key, ""), str)
    ]
    found = list(content.items())
    for part in _PARTS:
        if isinstance(inside := keys.get(part, {}), dict):
            found += [(f"{part}.{key}", value) for key, value in inside.items()]
        else:
            problems.append(f"{part}: expected sections, got {inside!r}")
    problems += [
        f"{key}: expected keys of that section, got {value!r}"
        for key, value in found
        if str(key).split(".")[-1] in _SECTIONS and not isinstance(value, dict)
    ]
    if problems:
        raise ConfigError("\n".join(f"{file}: {problem}" for problem in problems))
    return Profile(name, kind, content, **keys)


def _line(name: str, kind: str, folder: Path, seen: tuple[str, ...] = ()) -> list[Profile]:
    """A size or task after those it is based on, the basis left out."""
    if name in seen:
        raise ConfigError(f"{folder}/{name}.yaml: based_on: {' -> '.join((*seen, name))} goes round in a circle")
    found = read_profile(name, folder, common=bool(seen))
    if found.kind != kind:
        raise ConfigError(f"{folder}/: expected {name!r} to be a {kind}, got a {found.kind}")
    before = [] if found.based_on is None else _line(found.based_on, kind, folder, (*seen, name))
    return before if name == BASIS else [*before, found]


def parts_of(name: str, folder: Path = PROFILES) -> Parts:
    """The files that a name like gsm8k+llama3_8b+ablation puts together.

    Raises:
        ConfigError: unknown names, all of them, or more than one size or task.
    """
    found: list[Profile] = []
    problems = []
    for part in name.split("+"):
        try:
            found.append(read_profile(part.strip(), folder))
        except ConfigError as error:
            problems.append(str(error))
    by_kind = {kind: [p for p in found if p.kind == kind] for kind in KINDS}
    for kind in ("size", "task"):
        if len(by_kind[kind]) > 1:
            problems.append(f"expected one {kind}, got {', '.join(p.name for p in by_kind[kind])}")
    doubled = sorted({p.name for p in found if found.count(p) > 1})
    if doubled:
        problems.append(f"expected each once, got {', '.join(doubled)} more than once")
    if problems:
        raise ConfigError("\n".join(problems))
    tasks = _line(by_kind["task"][0].name, "task", folder) if by_kind["task"] else []
    size = by_kind["size"][0].name if by_kind["size"] else next((t.size for t in reversed(tasks) if t.size), BASIS)
    return Parts(_line(size, "size", folder), tasks, by_kind["variant"])
