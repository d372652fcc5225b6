"""Choosing a profile: `python -m pipelines.profile NAME` rewrites params.yaml, which is what DVC looks at.

profiles/tiny.yaml holds every key; another profile holds only what differs from it, and says in `kind` what it is:

- size: a base model and how it is trained. `based_on` names the size that it differs from (tiny if none).
- task: what is asked. `size` names the size that it runs on unless another is named; what stands under `full_size`
  holds only on a base from a hub or a folder, not on the embedded one.
- variant: further changes, whatever the size and the task.

Names are put together with +, in any order: gsm8k, gsm8k+smoke, gsm8k+llama3_8b+ablation. Changes made by hand in
params.yaml are not thrown away: they stop the switch, by name, unless --force is given.
"""

import difflib
import io
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter

from pipelines.config import PARAMS_FILE, ConfigError, load_yaml, parse_params
from pipelines.schema import Params
from pipelines.stage import cli

PROFILES = Path("profiles")
BASIS = "tiny"
KINDS = ("size", "task", "variant")
_SECTIONS = set(Params.model_fields) - {"profile"}
_HEADER = (
    "# Written by `python -m pipelines.profile {name}` from {files}. Change what you like: DVC reruns\n"
    "# what depends on it. All keys and their meaning stand in profiles/tiny.yaml.\n"
)


class _Representer(RoundTripRepresenter):
    """Writes floats so that every reader of YAML takes them as such: to PyYAML, and so to DVC, 2e-05 is a text."""


def _float(representer: RoundTripRepresenter, value: float) -> Any:
    whole, e, exponent = repr(value).partition("e")
    text = f"{whole}.0e{exponent}" if e and "." not in whole else repr(value)
    return representer.represent_scalar("tag:yaml.org,2002:float", text)


_Representer.add_representer(float, _float)


@dataclass(frozen=True)
class Profile:
    """One file of profiles/.

    Attributes:
        name: Of the file.
        kind: size, task or variant.
        settings: What it sets.
        based_on: Of a size: the size it differs from.
        size: Of a task: the size it runs on where none is named.
        full_size: Of a task: what it sets where the base is not the embedded one.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    based_on: str = BASIS
    size: str = BASIS
    full_size: dict[str, Any] = field(default_factory=dict)


def available(folder: Path = PROFILES) -> list[str]:
    """Names of the profiles."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _merge(basis: Any, over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(basis.get(key), dict) and key != "columns":
            _merge(basis[key], value)
        else:
            basis[key] = value


def read_profile(name: str, folder: Path = PROFILES) -> Profile:
    """One profile.

    Raises:
        ConfigError: no such profile, or its own keys are wrong.
    """
    names = available(folder)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"no profile {name!r} in {folder}/.{hint} Available: {', '.join(names)}")
    file = folder / f"{name}.yaml"
    if name == BASIS:
        return Profile(name, "size", {})
    content = load_yaml(file)
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected sections, got {type(content).__name__}")
    kind = content.pop("kind", "size")
    own = {"size": ("based_on",), "task": ("size", "full_size"), "variant": ()}
    if kind not in KINDS:
        raise ConfigError(f"{file}: kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    keys: dict[str, Any] = {key: content.pop(key) for key in own[kind] if key in content}
    problems = [
        f"{key}: expected the name of a profile, got {keys[key]!r}"
        for key in ("based_on", "size")
        if not isinstance(keys.get(key, ""), str)
    ]
    full_size = keys.get("full_size", {})
    if not isinstance(full_size, dict):
        problems.append(f"full_size: expected sections, got {full_size!r}")
        full_size = {}
    problems += [
        f"{key}: expected keys of that section, got {value!r}"
        for key, value in [*content.items(), *((f"full_size.{key}", value) for key, value in full_size.items())]
        if key.split(".")[-1] in _SECTIONS and not isinstance(value, dict)
    ]
    if problems:
        raise ConfigError("\n".join(f"{file}: {problem}" for problem in problems))
    return Profile(name, kind, content, **keys)


def _sizes(size: str, folder: Path, seen: tuple[str, ...] = ()) -> list[Profile]:
    """A size and those it is based on, the basis left out, the size itself last."""
    if size in seen:
        raise ConfigError(f"{folder}/{size}.yaml: based_on: {' -> '.join((*seen, size))} goes round in a circle")
    if size == BASIS:
        return []
    found = read_profile(size, folder)
    if found.kind != "size":
        raise ConfigError(f"{folder}/: expected {size!r} to be a size, got a {found.kind}")
    return [*_sizes(found.based_on, folder, (*seen, size)), found]


def _parts(name: str, folder: Path) -> tuple[list[Profile], Profile | None, list[Profile]]:
    """Sizes from the basis on, the task if there is one, and the variants that `name` puts together.

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
    task = by_kind["task"][0] if by_kind["task"] else None
    size = by_kind["size"][0].name if by_kind["size"] else task.size if task else BASIS
    return _sizes(size, folder), task, by_kind["variant"]


def _fill_variants(arms: Any, where: str) -> None:
    """Give every variant of an arm the settings of that arm, where it has none of its own."""
    for name, own in list(arms.items()):
        of = own.get("variant_of") if isinstance(own, dict) else None
        if of is None:
            continue
        if not isinstance(of, str) or not isinstance(arms.get(of), dict) or "variant_of" in arms[of]:
            raise ConfigError(f"{where}: arms.{name}.variant_of: expected an arm that is no variant itself, got {of!r}")
        whole = deepcopy(arms[of])
        _merge(whole, own)
        arms[name] = whole


def compose(name: str, folder: Path = PROFILES) -> str:
    """The text of params.yaml for a profile, comments of the basis included.

    Args:
        name: Of one profile, or of several with + between them.
        folder: Where they lie.

    Raises:
        ConfigError: no such profile, or it does not validate.
    """
    sizes, task, variants = _parts(name, folder)
    files = ", ".join(f"{folder}/{part.strip()}.yaml" for part in name.split("+"))
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.width = 200
    content = yaml.load((folder / f"{BASIS}.yaml").read_text(encoding="utf-8"))
    for size in sizes:
        _merge(content, size.settings)
    if task is not None:
        embedded = content["prepare_base"]["source"] == "embedded"
        _merge(content, task.settings)
        if not embedded:
            _merge(content, task.full_size)
    for variant in variants:
        _merge(content, variant.settings)
    _fill_variants(content["arms"], files)
    content["profile"] = name
    text = io.StringIO()
    yaml.dump(content, text)
    body = text.getvalue()
    parse_params(load_text(body), files)
    body = body[body.index("profile:") :]
    return _HEADER.format(name=name, files=files) + body


def load_text(text: str) -> Any:
    """Content of a YAML text."""
    return YAML(typ="safe", pure=True).load(text)


def hand_edits(params_file: Path, folder: Path = PROFILES) -> list[str]:
    """Keys of params.yaml that differ from the profile it names, as "key: profile's value → its value"."""
    if not params_file.exists():
        return []
    current = load_yaml(params_file)
    name = current.get("profile") if isinstance(current, dict) else None
    try:
        text = compose(str(name), folder)
    except ConfigError as error:
        return [f"profile: {name!r}: {error}"]
    return _differences(load_text(text), current)


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{prefix}: {old!r} → {new!r}"]
    lines = []
    for key in [*old, *(k for k in new if k not in old)]:
        where = f"{prefix}.{key}" if prefix else str(key)
        if key not in new:
            lines.append(f"{where}: removed")
        elif key not in old:
            lines.append(f"{where}: added, {new[key]!r}")
        else:
            lines += _differences(old[key], new[key], where)
    return lines


def choose(name: str, *, force: bool = False, params_file: Path = PARAMS_FILE, folder: Path = PROFILES) -> bool:
    """Write params.yaml for a profile.

    Returns:
        Whether the file changed.

    Raises:
        ConfigError: unknown profile, or hand edits would be lost.
    """
    text = compose(name, folder)
    edits = hand_edits(params_file, folder)
    current = load_yaml(params_file) if params_file.exists() else None
    if isinstance(current, dict) and current.get("profile") == name and not force:
        return False  # chosen already; edits on top of it are what the user wants
    if edits and not force:
        raise ConfigError(
            f"{params_file} holds changes that a switch to {name!r} would lose:\n"
            + "\n".join(f"  {line}" for line in edits)
            + f"\nKeep them in a profile of your own in {folder}/, or add --force"
        )
    changed = not params_file.exists() or params_file.read_text(encoding="utf-8") != text
    if changed:
        temporary = params_file.with_suffix(".yaml.partial")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(params_file)
    return changed


def main(
    name: Annotated[str, typer.Argument(help="a file of profiles/, or several: gsm8k+llama3_8b")],
    force: Annotated[bool, typer.Option(help="overwrite changes made by hand in params.yaml")] = False,
) -> None:
    """Choose a profile: rewrites params.yaml."""
    try:
        changed = choose(name, force=force)
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"params.yaml: profile {name}" + ("" if changed else " (chosen already)"))


if __name__ == "__main__":
    cli(main)
