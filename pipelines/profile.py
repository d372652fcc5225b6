"""Choosing a profile: `python -m pipelines.profile NAME` rewrites params.yaml, which is what DVC looks at.

profiles/tiny.yaml holds every key. Every other file holds only what differs, and names are put together with +, in any
order (gsm8k, gsm8k+smoke, gsm8k+llama3_8b+ablation). The files are merged left to right:

1. tiny;
2. sizes/NAME: a base model and how it is trained; for a task without one, llama3_2_3b;
3. tasks/recipe, tasks/NAME: what is asked, and where the base is not the embedded one, tasks/full/recipe and
   tasks/full/NAME;
4. NAME, of the folder itself: further changes, in the order in which they are named.

A file sizes/A+B is for both together, which are otherwise refused. Changes made by hand in params.yaml are not thrown
away: they stop the switch, by name, unless --force is given.
"""

import io
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
from omegaconf import OmegaConf
from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter

from db.files import write_text
from pipelines.check import parse_params
from pipelines.params import PARAMS_FILE, VARIANT_OF, ConfigError, load_yaml
from pipelines.stage import clear_errors, cli
from trainers.words import suggest

PROFILES = Path("profiles")
BOTTOM, RECIPE, SIZE_OF_TASKS = "tiny", "recipe", "llama3_2_3b"
_HEADER = (
    "Written by `python -m pipelines.profile {name}` from {files}. Change what you like: DVC reruns what depends on "
    "it. All keys and their meaning stand in profiles/tiny.yaml."
)


def available(folder: Path = PROFILES) -> dict[str, Path]:
    files = (file for place in (".", "sizes", "tasks") for file in sorted((folder / place).glob("*.yaml")))
    return {file.stem: file for file in files if "+" not in file.stem and file != folder / f"tasks/{RECIPE}.yaml"}


def merged(name: str, folder: Path = PROFILES) -> tuple[dict[str, Any], list[Path]]:
    """The settings of a name like gsm8k+llama3_8b, and their files; ConfigError names what cannot be merged."""
    known, names = available(folder), [part.strip() for part in name.split("+")]
    problems = [f"no profile {n!r} in {folder}/{suggest(n, known)}" for n in names if n not in known]
    problems += [
        f"expected each once, got {n} more than once" for n in sorted({n for n in names if names.count(n) > 1})
    ]
    found = {n: known[n] for n in names if n in known}
    sizes = [n for n, file in found.items() if n == BOTTOM or file.parent.name == "sizes"]
    tasks = [n for n, file in found.items() if file.parent.name == "tasks"]
    pair = folder / f"sizes/{'+'.join(sizes)}.yaml"
    problems += [f"expected one task, got {', '.join(tasks)}"] if len(tasks) > 1 else []
    problems += [f"expected one size, got {', '.join(sizes)}"] if len(sizes) > 1 and not pair.is_file() else []
    if problems:
        raise ConfigError("\n".join(problems))
    files = [known[n] for n in dict.fromkeys([BOTTOM, *(sizes or [SIZE_OF_TASKS] * len(tasks))])]
    files += [pair] if len(sizes) > 1 else []
    settings = _merge(files)
    for task in tasks:
        of_task = [folder / f"tasks/{RECIPE}.yaml", known[task]]
        if settings["prepare_base"]["source"] != "embedded":
            of_task += [folder / f"tasks/full/{RECIPE}.yaml", folder / f"tasks/full/{task}.yaml"]
        files += [file for file in of_task if file.is_file()]
    files += [file for n, file in found.items() if n not in (*sizes, *tasks)]
    return {**_merge(files), "profile": name}, files


def _merge(files: list[Path]) -> dict[str, Any]:
    """Deep-merged; every variant of an arm has the settings of that arm where it has none of its own."""
    parts = [load_yaml(file) for file in files]
    for file, part in zip(files, parts, strict=True):
        wrong = [] if isinstance(part, dict) else [f"expected sections, got {type(part).__name__}"]
        for key, section in part.items() if not wrong else ():
            if isinstance(parts[0].get(key), dict) and not isinstance(section, dict):
                wrong.append(f"{key}: expected keys of that section, got {section!r}")
        if wrong:
            raise ConfigError("\n".join(f"{file}: {problem}" for problem in wrong))
    whole: Any = OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.create, parts)))
    arms = whole["arms"]
    for name, own in arms.items():
        of = own.get(VARIANT_OF) if isinstance(own, dict) else None
        if of is None:
            continue
        arm = arms.get(of) if isinstance(of, str) else None
        if not isinstance(arm, dict) or arm.get(VARIANT_OF) is not None:
            where = ", ".join(map(str, files))
            raise ConfigError(
                f"{where}: arms.{name}.{VARIANT_OF}: expected an arm that is no variant itself, got {of!r}"
            )
        arms[name] = OmegaConf.to_container(OmegaConf.merge(arm, own))
    return dict(whole)


class _Representer(RoundTripRepresenter):
    """Writes floats so that every reader of YAML takes them as such: to PyYAML, and so to DVC, 2e-05 is a text."""


def _float(representer: RoundTripRepresenter, value: float) -> Any:
    whole, e, exponent = repr(value).partition("e")
    text = f"{whole}.0e{exponent}" if e and "." not in whole else repr(value)
    return representer.represent_scalar("tag:yaml.org,2002:float", text)


_Representer.add_representer(float, _float)


def compose(name: str, folder: Path = PROFILES) -> str:
    """The text of params.yaml for a profile, with the comments of tiny.yaml; ConfigError where there is none.

    A value that another file sets has that file's comment, where it has one; what tiny.yaml says of its own value by
    pointing to LOG.md goes.
    """
    settings, files = merged(name, folder)
    sources = ", ".join(map(str, files))
    parse_params(settings, sources)
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.width = 200
    content, *others = (yaml.load(file.read_text(encoding="utf-8")) for file in files)
    _fill(content, settings, others)
    text = io.StringIO()
    yaml.dump(content, text)
    header = textwrap.wrap(
        _HEADER.format(name=name, files=sources), 118, break_long_words=False, break_on_hyphens=False
    )
    return "".join(f"# {line}\n" for line in header) + text.getvalue()[text.getvalue().index("profile:") :]


def _fill(content: Any, settings: dict[str, Any], others: list[Any]) -> None:
    for key, value in settings.items():
        setters = [other for other in others if key in other]
        if isinstance(value, dict) and value and isinstance(content.get(key), dict):
            _fill(content[key], value, [other[key] for other in setters if isinstance(other[key], dict)])
        elif key not in content or content[key] != value:
            content[key] = value
            _say(content, key, _said(setters[-1], key) if setters else "")


def _said(content: Any, key: str) -> str:
    """The comment behind a key, without what stands in the lines below it."""
    token = (content.ca.items.get(key) or [None] * 3)[2]
    return token.value.partition("\n")[0].lstrip("# ") if token else ""


def _say(content: Any, key: str, text: str) -> None:
    old = _said(content, key)
    if not text and "LOG.md" not in old:
        return
    if not old:
        content.yaml_add_eol_comment(text, key)
        return
    token = content.ca.items[key][2]
    _, line, below = token.value.partition("\n")
    token.value = (f"# {text}" if text else "") + line + below


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Keys in which two contents differ, as "key: old value → new value"."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{prefix}: {old!r} → {new!r}"]
    lines = []
    for key in dict.fromkeys([*old, *new]):
        where = f"{prefix}.{key}" if prefix else str(key)
        if key not in new:
            lines.append(f"{where}: removed")
        elif key not in old:
            lines.append(f"{where}: added, {new[key]!r}")
        else:
            lines += differences(old[key], new[key], where)
    return lines


def choose(name: str, *, force: bool = False, params_file: Path = PARAMS_FILE, folder: Path = PROFILES) -> bool:
    """Write params.yaml for a profile; whether the file changed. ConfigError: changes made by hand would be lost."""
    text = compose(name, folder)
    if params_file.exists() and not force:
        current = load_yaml(params_file)
        before = current.get("profile") if isinstance(current, dict) else None
        if before == name:
            return False  # chosen already; what was changed since is what the user wants
        try:
            edits = differences(merged(str(before), folder)[0], current)
        except ConfigError as error:
            edits = [f"profile: {before!r}: {error}"]
        if edits:
            raise ConfigError(
                f"{params_file} holds changes that a switch to {name!r} would lose:\n"
                + "\n".join(f"  {line}" for line in edits)
                + f"\nKeep them in a profile of your own in {folder}/, or add --force"
            )
    changed = not params_file.exists() or params_file.read_text(encoding="utf-8") != text
    if changed:
        write_text(params_file, text)
    return changed


def main(
    name: Annotated[str, typer.Argument(help="a file of profiles/, or several: gsm8k+llama3_8b; none: list them")] = "",
    force: Annotated[bool, typer.Option(help="overwrite changes made by hand in params.yaml")] = False,
) -> None:
    """Choose a profile: rewrites params.yaml."""
    if not name:
        for known, file in available().items():
            first = file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
            typer.echo(f"{known:14}{first}")
        return
    with clear_errors("profile", code=2):
        changed = choose(name, force=force)
    typer.echo(f"params.yaml: profile {name}" + ("" if changed else " (chosen already)"))


if __name__ == "__main__":
    cli(main)
