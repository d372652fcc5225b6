"""The two examples, run as a user would, with their smallest settings, from another folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, *arguments, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert not list(cwd.iterdir())  # nothing is left behind
    return done


def test_basic_usage(tmp_path):
    done = run("basic_usage.py", "--steps", "40", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "applied to 17 layers (8 vision, 8 text, 1 cross_modal), 18,944 parameters" in said
    losses = [float(value) for value in re.search(r"40 steps; loss (.*)\.\n", said)[1].split(" → ")]
    assert losses[-1] < losses[0]
    assert re.search(r"^verdict +effective$", said, re.M)
    assert "README.md, adapter_config.json, adapter_model.safetensors" in said
    assert re.search(r"asked about a new picture: .*; right is '", said)


def test_benchmark_comparison(tmp_path):
    done = run(
        "benchmark_comparison.py", "--pretraining", "320", "--seeds", "2", "--steps", "10", "--items", "36",
        "--test-items", "18", "--learning-rates", "3e-3", "1e-2", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in done.stdout.splitlines()]
    rows = {cells[0]: cells[1:] for cells in lines if len(cells) == 3}
    for name in ("validation loss", "accuracy (by chance 0.167)", "seconds a step"):
        for cell in rows[name]:
            middle, low, high = map(float, re.fullmatch(r"(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]", cell).groups())
            assert low <= middle <= high
    assert rows["trained parameters"] == ["18,944", "18,944"]
    assert set(rows["learning rate"]) <= {"0.003", "0.01"}
    assert re.search(r"minus vanilla LoRA: accuracy -?[\d.]+ \[.*\], (better|worse|undecided)\.", done.stdout)


@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [
        ("basic_usage.py", ["--steps", "0"], "--steps: expected at least 1, got 0"),
        ("benchmark_comparison.py", ["--seeds", "1"], "--seeds: expected at least 2, for intervals; got 1"),
    ],
)
def test_wrong_arguments_are_named(script, arguments, told, tmp_path):
    done = run(script, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and told in done.stderr
