"""The two examples, run as a user would, with their smallest settings."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(script, *arguments, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder as a user may have one; given, so that the examples do not take what a pipeline has left."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        from _shared import random_base
    finally:
        sys.path.remove(str(EXAMPLES))
    return random_base(tmp_path_factory.mktemp("model"))


def test_basic_usage(base, tmp_path):
    done = run("basic_usage.py", "--steps", "12", "--model", base, cwd=tmp_path)  # from another folder
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "applied to 17 layers (8 vision, 8 text, 1 cross_modal), 18,944 parameters" in said
    losses = [float(value) for value in re.search(r"12 steps; loss (.*)\.\n", said)[1].split(" → ")]
    assert losses[-1] < losses[0]
    assert re.search(r"^verdict +effective$", said, re.M)
    assert "README.md, adapter_config.json, adapter_model.safetensors" in said
    assert re.search(r"asked about a new picture: .*; right is '", said)
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_benchmark_comparison(base, tmp_path):
    done = run(
        "benchmark_comparison.py", "--model", base, "--seeds", "2", "--steps", "10", "--items", "36",
        "--test-items", "18", "--learning-rates", "3e-3", "1e-2", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {}
    for line in done.stdout.splitlines():
        cells = [cell.strip() for cell in line.strip("│ ").split("│")]
        if len(cells) == 3:
            rows[cells[0]] = cells[1:]
    interval = re.compile(r"(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]")
    for name in ("evaluation loss", "accuracy (by chance 0.167)", "seconds a step"):
        for cell in rows[name]:
            middle, low, high = map(float, interval.fullmatch(cell).groups())
            assert low <= middle <= high
    assert rows["trained parameters"] == ["18,944", "18,944"]
    assert set(rows["learning rate"]) <= {"0.003", "0.01"}
    assert 1 <= float(rows["steps to the baseline's loss"][0].split()[0]) <= 10
    assert all(5 < float(cell) < 100 for cell in rows["peak of tensors, MiB"])
    assert re.search(r"loss -?[\d.]+ \[.*\]; accuracy .*, (better|worse|undecided)\.", done.stdout)
    assert "make repro-vlm" in done.stdout
    assert not list(tmp_path.iterdir())


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
