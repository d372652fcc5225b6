"""`grit-lora`, the `python -m` form of each command, and its message if there is no environment."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pipelines import commands
from tests.project_clone import ROOT

SCRIPTS = sorted(ROOT.glob("benchmarks/[a-z]*.py"))


def test_every_stage_is_a_command_and_every_command_a_module():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"] == {
        "grit-lora": "pipelines.commands:main"
    }
    stages = set(re.findall(r"cmd: python -m pipelines\.(\w+)", (ROOT / "dvc.yaml").read_text()))
    assert stages <= commands.COMMANDS.keys() and len(stages) > 10
    for module in commands.COMMANDS.values():
        text = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        assert re.search(r"^    (cli|command|app)\(|^    main_for\(", text.split('if __name__ == "__main__":')[1], re.M)


def test_the_list_of_commands_loads_nothing_heavy():
    code = "import sys; from pipelines.commands import main; main(); print({'torch', 'typer'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "\ntrain         Stage train: " in done.stdout and done.stdout.endswith("\nset()\n")


@pytest.mark.parametrize(
    ("words", "code", "output"),
    [
        (["dbs"], 1, "did you mean 'db'? Available: init, "),
        (["compare", "--db", "none.db"], 2, "error: expected a database at none.db"),
    ],
)
def test_a_command_is_its_module(words, code, output):
    command = [sys.executable, "-m", "pipelines.commands", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code and output in done.stderr, done.stderr


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_a_benchmark_reads_its_options_before_it_starts(file):
    text = file.read_text()
    assert text.endswith("    command(main)\n") or "parse_args()" in text


@pytest.mark.parametrize("module", ["pipelines.profile", "evaluation.compare_all", "export.ollama", "db.cli"])
def test_without_the_environment_one_line_says_what_to_do(module):
    bare = Path(sys.base_prefix, "bin/python3")
    if not subprocess.run([bare, "-c", "import pydantic, sqlalchemy, typer"], capture_output=True).returncode:
        pytest.skip("the bare Python has the packages too")
    done = subprocess.run([bare, "-m", module], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == "no environment: run `make setup`, then `. .venv/bin/activate`\n"
