"""The two examples with their smallest settings, from another folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import logging as their_logging

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_basic_usage(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    for quiet in ("set_verbosity_error", "disable_progress_bar"):  # for good, in this process
        monkeypatch.setattr(their_logging, quiet, lambda: None)
    import basic_usage
    import benchmark_comparison

    for example, option, told in (
        (basic_usage, ["--steps", "0"], "--steps: expected at least 1, got 0"),
        (benchmark_comparison, ["--seeds", "1"], "--seeds: expected at least 2, for intervals; got 1"),
    ):
        monkeypatch.setattr(sys, "argv", ["example", *option])
        with pytest.raises(SystemExit, match="2"):
            example.main()
        assert told in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["basic_usage.py", "--steps", "20"])
    basic_usage.main()
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    assert "applied to 17 layers (8 vision, 8 text, 1 cross_modal), 18,944 parameters" in said
    losses = [float(value) for value in re.search(r"20 steps; loss (.*)\.\n", said)[1].split(" → ")]
    assert losses[-1] < losses[0]
    assert re.search(r"^verdict +effective$", said, re.M)
    assert "README.md, adapter_config.json, adapter_model.safetensors" in said
    assert re.search(r"asked about a new picture: .*; correct: '", said)


@pytest.mark.full
def test_benchmark_comparison_as_a_user_runs_it(tmp_path):
    options = "--pretraining 320 --seeds 2 --steps 10 --items 36 --test-items 18 --learning-rates 3e-3 1e-2"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "benchmark_comparison.py"), *options.split()],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    lines = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in done.stdout.splitlines()]
    rows = {cells[0]: cells[1:] for cells in lines if len(cells) == 3}
    for name in ("validation loss", "accuracy (by chance 0.167)", "seconds a step"):
        for cell in rows[name]:
            middle, low, high = map(float, re.fullmatch(r"(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]", cell).groups())
            assert low <= middle <= high
    assert rows["trained parameters"] == ["18,944", "18,944"]
    assert set(rows["learning rate"]) <= {"0.003", "0.01"}
    assert re.search(r"minus vanilla LoRA: accuracy -?[\d.]+ \[.*\], (better|worse|undecided)\.", done.stdout)
