"""Choosing a profile: `python -m pipelines.profile NAME` rewrites params.yaml, which is what DVC looks at.

profiles/tiny.yaml holds every key; another profile holds only what differs from it, and says in `kind` what it is:

- size: a base model and how it is trained. `based_on` names the size that it differs from (tiny if none).
- task: what is asked. `size` names the size that it runs on unless another is named; what stands under `full_size`
  holds only on a base from a hub or a folder, not on the embedded one. `based_on` names a task that it differs from.
- variant: further changes, whatever the size and the task; what stands under `schedule` yields to a task's `full_size`
  where that holds.

Names are put together with +, in any order of kinds: gsm8k, gsm8k+smoke, gsm8k+llama3_8b+ablation. Where two variants
set the same key, the later one wins. A file whose name begins with _ is no profile of its own: others are based on it.
Changes made by hand in params.yaml are not thrown away: they stop the switch, by name, unless --force is given.
"""

import io
import textwrap
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import typer
from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter

from pipelines.config import PARAMS_FILE, ConfigError, load_yaml, parse_params
from pipelines.profile_files import BASIS, PROFILES, Parts, available, parts_of
from pipelines.stage import cli

__all__ = ["PROFILES", "available", "choose", "compose", "hand_edits", "load_text"]

_HEADER = (
    "Written by `python -m pipelines.profile {name}` from {files}. Change what you like: DVC reruns what depends on "
    "it. All keys and their meaning stand in profiles/tiny.yaml."
)


class _Representer(RoundTripRepresenter):
    """Writes floats so that every reader of YAML takes them as such: to PyYAML, and so to DVC, 2e-05 is a text."""


def _float(representer: RoundTripRepresenter, value: float) -> Any:
    whole, e, exponent = repr(value).partition("e")
    text = f"{whole}.0e{exponent}" if e and "." not in whole else repr(value)
    return representer.represent_scalar("tag:yaml.org,2002:float", text)


_Representer.add_representer(float, _float)


def _merge(basis: Any, over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(basis.get(key), dict) and key != "columns":
            _merge(basis[key], value)
        else:
            basis[key] = deepcopy(value)  # a profile's own entries may be one and the same (YAML's &name, *name)


def _put_together(content: Any, parts: Parts) -> None:
    """Merge all parts into the content of the basis."""
    for size in parts.sizes:
        _merge(content, size.settings)
    embedded = content["prepare_base"]["source"] == "embedded"
    for task in parts.tasks:
        _merge(content, task.settings)
    schedules = [] if embedded else [task.full_size for task in parts.tasks if task.full_size]
    for schedule in schedules:
        _merge(content, schedule)
    for variant in parts.variants:
        _merge(content, variant.settings)
        if not schedules:
            _merge(content, variant.schedule)


def _fill_variants(arms: Any, where: str) -> None:
    """Give every variant of an arm the settings of that arm, where it has none of its own."""
    for name, own in list(arms.items()):
        of = own.get("variant_of") if isinstance(own, dict) else None
        if of is None:
            continue
        arm = arms.get(of) if isinstance(of, str) else None
        if not isinstance(arm, dict) or arm.get("variant_of") is not None:
            raise ConfigError(f"{where}: arms.{name}.variant_of: expected an arm that is no variant itself, got {of!r}")
        whole = deepcopy(arm)
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
    parts = parts_of(name, folder)
    files = ", ".join(f"{folder}/{part}.yaml" for part in parts.names)
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.width = 200
    content = yaml.load((folder / f"{BASIS}.yaml").read_text(encoding="utf-8"))
    _put_together(content, parts)
    _fill_variants(content["arms"], files)
    content["profile"] = name
    text = io.StringIO()
    yaml.dump(content, text)
    body = text.getvalue()
    parse_params(load_text(body), files)
    body = body[body.index("profile:") :]
    header = textwrap.wrap(_HEADER.format(name=name, files=files), 118, break_long_words=False, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in header) + body


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
