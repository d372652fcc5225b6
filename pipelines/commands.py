"""`grit-lora COMMAND …`: the project's commands under one name, each equal to `python -m` of its module."""

import os
import sys
from pathlib import Path

from pipelines import STAGES
from trainers.words import suggest

COMMANDS = {
    "init": "pipelines.init",
    "profile": "pipelines.profile",
    "dry-run": "pipelines.dry_run",
    "repro": "pipelines.repro",
    "distribute": "pipelines.distribute",
    "compare": "evaluation.compare_all",
    "serve": "export.ollama",
    "package": "export.package",
    "db": "db.cli",
    **{name: f"pipelines.{name}" for name in STAGES},
}


def main() -> None:
    """Become `python -m MODULE`, which reads the other arguments; without a command, list the commands."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: grit-lora COMMAND …   (more: grit-lora COMMAND --help)\n")
        for command, module in COMMANDS.items():
            file = Path(__file__).parents[1] / f"{module.replace('.', '/')}.py"
            print(f"{command:14}{file.read_text(encoding='utf-8').splitlines()[0].strip(chr(34))}")
        return
    if name not in COMMANDS:
        sys.exit(f"grit-lora: unknown command {name!r}{suggest(name, COMMANDS)}")
    os.execv(sys.executable, [sys.executable, "-m", COMMANDS[name], *words])  # noqa: S606  no shell is wanted


if __name__ == "__main__":
    main()
