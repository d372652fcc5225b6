"""`grit-lora init FOLDER`: a new project that needs no clone: dvc.yaml, params.yaml, profiles/ and a short README."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from db.files import ROOT, write_text
from pipelines import profile
from pipelines.code import DISTRIBUTION, INSTALLED
from pipelines.params import INPUTS, PARAMS_FILE, THEIRS, ConfigError
from pipelines.stage import clear_errors, cli

SHARED = "share/grit-lora/"
FILES = ("dvc.yaml", ".gitignore", "inputs/README.md", "theirs/README.md")
UNSLOTH = re.compile(
    r"(?<=[\[ ])(hybrid_grit|unsloth_lora\w*), ?|, ?(hybrid_grit|unsloth_lora\w*)(?=\])|\n +- hybrid_grit"
)
README = """# {name}

LoRA adapters trained several ways, exported to GGUF and compared: a project of grit-lora.

    grit-lora profile          # the profiles; `grit-lora profile smoke` chooses one and writes params.yaml
    grit-lora repro            # run what has changed; the result is in outputs/report.html
    grit-lora compare --full   # all tables
    grit-lora serve create     # the models onto the Ollama server at OLLAMA_HOST

Your data belongs into inputs/, adapters from elsewhere into theirs/. `grit-lora` lists all commands.
"""


def shipped_files() -> dict[str, Path]:
    """Path in a project → the file that comes with the installation, or with a checkout."""
    if (ROOT / "dvc.yaml").is_file():
        places = [*(ROOT / name for name in FILES), *ROOT.glob("profiles/**/*.yaml"), *ROOT.glob(".dvc/plots/*.json")]
        return {place.relative_to(ROOT).as_posix(): place for place in places}
    files = [file for file in metadata.files(DISTRIBUTION) or [] if SHARED in file.as_posix()]
    return {file.as_posix().partition(SHARED)[2]: Path(str(file.locate())) for file in files}


def version_control(folder: Path) -> None:
    """Initialize Git, unless the folder is in a repository already or there is no Git, and DVC."""
    inside = ["git", "rev-parse", "--is-inside-work-tree"]
    scm = []
    if shutil.which("git") is None:
        scm = ["--no-scm"]
    elif subprocess.run(inside, cwd=folder, capture_output=True, check=False).returncode == 0:
        scm = ["--subdir"]
    else:
        subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet", *scm], cwd=folder, check=True)


def create(folder: Path) -> list[str]:
    """Write a new project; returns notes for the user. ConfigError if the folder is a project already."""
    if (folder / PARAMS_FILE).exists() or (folder / "dvc.yaml").exists():
        raise ConfigError(f"{folder}: expected a new or an empty folder, got one with {PARAMS_FILE} or dvc.yaml")
    notes = []
    folder.mkdir(parents=True, exist_ok=True)
    version_control(folder)
    for name, file in shipped_files().items():
        text = file.read_text(encoding="utf-8")
        if name == "dvc.yaml":
            text = re.sub(r"deps: \[pipelines, .*\]", f"deps: [{THEIRS}, {INSTALLED}]", text)
        elif name.startswith("profiles/") and find_spec("unsloth") is None:
            text = UNSLOTH.sub("", text)
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, text)
    if find_spec("unsloth") is None:
        notes.append(
            "Unsloth is not installed: the profiles have no hybrid_grit. To add it, run `pip install --no-deps unsloth "
            "unsloth_zoo` and put hybrid_grit into matrix.arms"
        )
    if not (folder / "README.md").exists():
        write_text(folder / "README.md", README.format(name=folder.resolve().name))
    (folder / INPUTS).mkdir(exist_ok=True)
    profile.choose("tiny", params_file=folder / PARAMS_FILE, folder=folder / profile.PROFILES)
    return notes


def main(folder: Annotated[Path, typer.Argument(help="a new folder, or an existing one without a project")]) -> None:
    """Write a new project: dvc.yaml, params.yaml, profiles/ and a README."""
    with clear_errors("init", code=2):
        for note in create(folder):
            typer.echo(note)
    typer.echo(f"{folder} is ready: cd {os.path.relpath(folder)} && grit-lora repro")


if __name__ == "__main__":
    cli(main)
