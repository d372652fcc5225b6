"""Choosing a profile: `python -m pipelines.profile NAME` rewrites params.yaml, which is what DVC looks at.

profiles/tiny.yaml holds every key; another profile holds only what differs from it. Changes made by hand in
params.yaml are not thrown away: they stop the switch, by name, unless --force is given.
"""

import difflib
import io
from pathlib import Path
from typing import Annotated, Any

import typer
from ruamel.yaml import YAML

from pipelines.config import PARAMS_FILE, ConfigError, load_yaml, parse_params
from pipelines.stage import cli

PROFILES = Path("profiles")
BASIS = "tiny"
_HEADER = (
    "# Written by `python -m pipelines.profile {name}` from profiles/{name}.yaml. Change what you like: DVC reruns\n"
    "# what depends on it. All keys and their meaning stand in profiles/tiny.yaml.\n"
)


def available(folder: Path = PROFILES) -> list[str]:
    """Names of the profiles."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _merge(basis: Any, over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(basis.get(key), dict) and key != "columns":
            _merge(basis[key], value)
        else:
            basis[key] = value


def compose(name: str, folder: Path = PROFILES) -> str:
    """The text of params.yaml for a profile, comments of the basis included.

    Raises:
        ConfigError: no such profile, or it does not validate.
    """
    names = available(folder)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"no profile {name!r} in {folder}/.{hint} Available: {', '.join(names)}")
    yaml = YAML()
    yaml.width = 200
    content = yaml.load((folder / f"{BASIS}.yaml").read_text(encoding="utf-8"))
    if name != BASIS:
        over = load_yaml(folder / f"{name}.yaml")
        if not isinstance(over, dict):
            raise ConfigError(f"{folder}/{name}.yaml: expected sections, got {type(over).__name__}")
        _merge(content, over)
    content["profile"] = name
    text = io.StringIO()
    yaml.dump(content, text)
    body = text.getvalue()
    parse_params(load_text(body), f"{folder}/{name}.yaml")
    body = body[body.index("profile:") :]
    return _HEADER.format(name=name) + body


def load_text(text: str) -> Any:
    """Content of a YAML text."""
    return YAML(typ="safe", pure=True).load(text)


def hand_edits(params_file: Path, folder: Path = PROFILES) -> list[str]:
    """Keys of params.yaml that differ from the profile it names, as "key: profile's value → its value"."""
    if not params_file.exists():
        return []
    current = load_yaml(params_file)
    name = current.get("profile") if isinstance(current, dict) else None
    if name not in available(folder):
        return [f"profile: {name!r} is no profile in {folder}/"]
    return _differences(load_text(compose(name, folder)), current)


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
    name: Annotated[str, typer.Argument(help="tiny, smoke, llama3_8b, or one of your own in profiles/")],
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
