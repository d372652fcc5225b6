"""Choosing a profile: `python -m pipelines.profile NAME` rewrites params.yaml, which DVC watches.

profiles/tiny.yaml holds every key. Every other file holds only what differs, and names are combined with + in any order
(gsm8k, gsm8k+smoke, gsm8k+llama3_8b+ablation). Files are merged in this order, later ones win:

1. tiny;
2. sizes/NAME: a base model and how it is trained; llama3_2_3b for a task without a size;
3. tasks/recipe, tasks/NAME: what is asked; unless the size is one for a laptop, also tasks/full/recipe and
   tasks/full/NAME;
4. NAME in the folder itself: further changes, in the order of their names;
5. profiles that are not in SHIPPED, wherever they are: what you write wins over everything that ships, and what you
   write in `train` also over what shipped profiles set for single arms.

A file that sets `max_steps` ends `epochs`, and the other way round. Two sizes A and B combine only if there is a file
sizes/A+B or one of them is yours. A switch never discards manual changes in params.yaml: it lists them and stops,
unless --force is given.
"""

import io
import re
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
from omegaconf import OmegaConf
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.representer import RoundTripRepresenter

from db.files import write_text
from pipelines.check import parse_params
from pipelines.params import PARAMS_FILE, VARIANT_OF, ConfigError, load_yaml
from pipelines.stage import clear_errors, cli
from trainers.words import suggest

PROFILES = Path("profiles")
BOTTOM, RECIPE, SIZE_OF_TASKS = "tiny", "recipe", "llama3_2_3b"
SHIPPED = frozenset(
    """tiny ablation paper preserve qlora smollm2 llama3_1_8b llama3_2_3b llama3_8b smoke vision
    alpaca boolq chat classify dolly exact gsm8k instruct qnli""".split()
)
SMALL = frozenset(("smollm2",))
"""Sizes with another base than the embedded one, on which a task is as short as on that."""
_LENGTHS = ("max_steps", "epochs")
_HEADER = (
    "Written by `python -m pipelines.profile {name}` from {files}. Change what you like: DVC reruns what depends on "
    "it. profiles/tiny.yaml explains every key."
)


def available(folder: Path = PROFILES) -> dict[str, Path]:
    files = (file for place in (".", "sizes", "tasks") for file in sorted((folder / place).glob("*.yaml")))
    return {file.stem: file for file in files if "+" not in file.stem and file != folder / f"tasks/{RECIPE}.yaml"}


def merged(name: str, folder: Path = PROFILES) -> tuple[dict[str, Any], list[Path]]:
    """The settings of a name like gsm8k+llama3_8b, and their files; ConfigError if they cannot be combined."""
    profiles, names = available(folder), [part.strip() for part in name.split("+")]
    problems = [f"no profile {n!r} in {folder}/{suggest(n, profiles)}" for n in names if n not in profiles]
    problems += [
        f"expected no duplicates, got {n} more than once" for n in sorted({n for n in names if names.count(n) > 1})
    ]
    chosen = {n: profiles[n] for n in names if n in profiles}
    own = [file for n, file in chosen.items() if n not in SHIPPED]
    sizes = [n for n, file in chosen.items() if n == BOTTOM or file.parent.name == "sizes"]
    tasks = [n for n, file in chosen.items() if file.parent.name == "tasks"]
    shipped_sizes = [n for n in sizes if n in SHIPPED]
    pair = folder / f"sizes/{'+'.join(shipped_sizes)}.yaml"
    problems += [f"expected one task, got {', '.join(tasks)}"] if len(tasks) > 1 else []
    if len(shipped_sizes) > 1 and not pair.is_file():
        problems.append(f"expected one size, got {', '.join(shipped_sizes)}")
    if problems:
        raise ConfigError("\n".join(problems))
    files = [
        profiles[n] for n in dict.fromkeys([BOTTOM, *(shipped_sizes or [SIZE_OF_TASKS] * bool(tasks and not sizes))])
    ]
    files += [pair] if len(shipped_sizes) > 1 else []
    embedded = _merge([*files, *own])["prepare_base"]["source"] == "embedded"
    for task in tasks:
        of_task = [folder / f"tasks/{RECIPE}.yaml", profiles[task]]
        if not embedded and SMALL.isdisjoint(sizes):
            of_task += [folder / f"tasks/full/{RECIPE}.yaml", folder / f"tasks/full/{task}.yaml"]
        files += [file for file in of_task if file.is_file() and file not in own]
    files += [file for n, file in chosen.items() if n not in (*sizes, *tasks) and file not in own]
    return {**_merge([*files, *own]), "profile": name}, [*files, *own]


def _merge(files: list[Path]) -> dict[str, Any]:
    """Deep-merge the files; a variant inherits the settings of its arm."""
    parts = [load_yaml(file) for file in files]
    for file, part in zip(files, parts, strict=True):
        wrong = [] if isinstance(part, dict) else [f"expected sections, got {type(part).__name__}"]
        for key, section in part.items() if not wrong else ():
            if isinstance(parts[0].get(key), dict) and not isinstance(section, dict):
                wrong.append(f"{key}: expected keys of that section, got {section!r}")
        if wrong:
            raise ConfigError("\n".join(f"{file}: {problem}" for problem in wrong))
        train = part.get("train", {})
        if lengths := [name for name in _LENGTHS if train.get(name) is not None]:
            part["train"] = {**dict.fromkeys(_LENGTHS), **{name: train[name] for name in lengths}, **train}
    whole: Any = {}
    for file, part in zip(files, parts, strict=True):
        if file.stem not in SHIPPED and "+" not in file.stem and file.stem != RECIPE:
            for entry in whole["arms"].values():  # what is written for all arms is meant for all of them
                for name in [name for name, value in part.get("train", {}).items() if not isinstance(value, dict)]:
                    entry.pop(name, None)
        whole = OmegaConf.to_container(OmegaConf.merge(whole, part))
    arms = whole["arms"]
    for name, entry in arms.items():
        original = entry.get(VARIANT_OF) if isinstance(entry, dict) else None
        if original is None:
            continue
        arm = arms.get(original) if isinstance(original, str) else None
        if not isinstance(arm, dict) or arm.get(VARIANT_OF) is not None:
            where = ", ".join(map(str, files))
            raise ConfigError(
                f"{where}: arms.{name}.{VARIANT_OF}: expected an arm that is not a variant, got {original!r}"
            )
        arms[name] = OmegaConf.to_container(OmegaConf.merge(arm, entry))
    return dict(whole)


class _Representer(RoundTripRepresenter):
    """Writes 2e-05 as 2.0e-05, which every reader takes for a number (PyYAML would read the former as a text)."""


_Representer.add_representer(
    float,
    lambda representer, value: representer.represent_scalar(
        "tag:yaml.org,2002:float", re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))
    ),
)


def compose(name: str, folder: Path = PROFILES) -> str:
    """The text of params.yaml for a profile, with the comments of tiny.yaml or of the file that changed the value.

    Raises:
        ConfigError: there is no such profile, or its settings are invalid.
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
        here: Any = content.get(key)
        block = isinstance(here, CommentedMap) and not here.fa.flow_style()
        if isinstance(value, dict) and value and block:
            _fill(here, value, [other[key] for other in setters if isinstance(other[key], dict)])
        elif key not in content or here != value:
            inline: Any = CommentedMap(value) if isinstance(here, dict) else value
            if isinstance(here, dict):
                inline.fa.set_flow_style()
            content[key] = inline
            theirs, ours = _comment(setters[-1] if setters else None, key), _comment(content, key)
            text = theirs.value.partition("\n")[0].lstrip("# ") if theirs else ""
            if text and ours:
                ours.value = f"# {text}{''.join(ours.value.partition(chr(10))[1:])}"  # the lines below stay
            elif text:
                content.yaml_add_eol_comment(text, key)


def _comment(content: Any, key: str) -> Any:
    """Ruamel's token of the comment behind a key, with the lines below it, or None."""
    return (content.ca.items.get(key) or [None] * 3)[2] if content else None


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The keys that differ, as "key: old value → new value"."""
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
    """Write params.yaml for a profile; returns whether it changed. ConfigError if changes by hand would be lost."""
    text = compose(name, folder)
    if params_file.exists() and not force:
        current = load_yaml(params_file)
        before = current.get("profile") if isinstance(current, dict) else None
        if before == name:
            return False  # later changes are what the user wants
        try:
            edits = differences(merged(str(before), folder)[0], current)
        except ConfigError as error:
            edits = [f"profile: {before!r}: {error}"]
        if edits:
            raise ConfigError(
                f"{params_file} has changes that a switch to {name!r} would lose:\n"
                + "\n".join(f"  {line}" for line in edits)
                + f"\nKeep them in your own profile in {folder}/, or add --force"
            )
    changed = not params_file.exists() or params_file.read_text(encoding="utf-8") != text
    if changed:
        write_text(params_file, text)
    return changed


def main(
    name: Annotated[str, typer.Argument(help="a profile, or several as in gsm8k+llama3_8b; empty: list them")] = "",
    force: Annotated[bool, typer.Option(help="overwrite changes made by hand in params.yaml")] = False,
) -> None:
    """Choose a profile: rewrites params.yaml."""
    if not name:
        for profile, file in available().items():
            first = file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
            typer.echo(f"{profile:14}{first}")
        return
    with clear_errors("profile", code=2):
        changed = choose(name, force=force)
    typer.echo(f"params.yaml: profile {name}" + ("" if changed else " (chosen already)"))


if __name__ == "__main__":
    cli(main)
