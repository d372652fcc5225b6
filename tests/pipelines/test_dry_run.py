"""The dry run: real steps on this machine, extrapolated to the whole matrix."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from db.files import write_jsonl
from pipelines import dry_run, prepare_base, prepare_data
from pipelines.check import parse_params
from tests.project_clone import ROOT


@pytest.fixture
def params(smoke_raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smoke_raw = {**smoke_raw, "matrix": {"arms": ["baseline_lora", "pure_grit"], "seeds": [0, 1]}}
    params = parse_params(smoke_raw)
    prepare_data.run(params)
    prepare_base.run(params)
    write_jsonl(tmp_path / "texts/texts.jsonl", [{"text": f"What is {n} + 1?", "ended": True} for n in range(12)])
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(smoke_raw))
    return params


def test_two_steps_of_every_arm_show_that_the_matrix_fits(params):
    shutil.rmtree("checkpoints", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.dry_run"], env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "baseline_lora" in done.stdout and "pure_grit" in done.stdout and done.stdout.endswith("\nfits\n")
    assert not any(Path(created).exists() for created in ("adapters", "checkpoints"))


def test_what_does_not_fit_is_reported(params, capsys):
    row = {
        "arm": "pure_grit", "device": "CPU", "longest": 60, "peak": 2**30, "memory": 2**31, "seconds": 36.0,
        "steps": 100, "trainable": 10**6, "base": 10**9,
    }  # fmt: skip
    assert dry_run.disk_bytes(params, row) == 2 * 2 * (4 * 10**6 + 2 * 10**6 + 2 * 10**9) + 9 * 4 * 10**6
    assert dry_run.show(params, [row])
    assert "training: 2.00 h" in capsys.readouterr().out
    for change in ({"peak": 2**32}, {"base": 10**15}):
        assert not dry_run.show(params, [{**row, **change}])
    assert not dry_run.show(params, [row, {"arm": "hybrid_grit", "failed": "out of memory"}])
    assert capsys.readouterr().out.endswith("does not fit\n")
