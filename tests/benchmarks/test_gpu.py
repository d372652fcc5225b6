"""The script for whoever has a GPU: on a CPU at a tiny shape, every contender takes real steps and leaves nothing."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu


def test_every_contender_takes_its_turns_and_the_file_says_so(tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--shape=tiny", "--device=cpu", "--rounds=1", "--steps=1", f"--out={out}"])
    gpu.main()
    found = json.loads(out.read_text())
    assert [row["contender"] for row in found["rows"]] == list(gpu.CONTENDERS) and found["shape"] == "tiny"
    assert all(len(row["seconds_a_step"]) == 1 and row["peak_bytes"] is None for row in found["rows"])


@pytest.mark.full
def test_unsloth_has_a_process_of_its_own(tmp_path):
    out = tmp_path / "gpu.json"
    asked = ["--shape=tiny", "--device=cpu", "--rounds=1", "--steps=1", "--unsloth=bf16", f"--out={out}"]
    subprocess.run([sys.executable, gpu.__file__, *asked], cwd=tmp_path, check=True, timeout=300)
    rows = [(row["base"], row["contender"]) for row in json.loads(out.read_text())["rows"]]
    assert rows == [("bf16, Unsloth", name) for name in gpu.CONTENDERS[:2]]


def test_a_contender_moves_the_adapter_and_leaves_no_hook():
    model = gpu.base_of("tiny", "cpu", four_bit=False)
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    before = hooks()
    for name in gpu.CONTENDERS:
        with gpu.contender(name, model, "tiny", "cpu") as step:
            b = [p for n, p in model.named_parameters() if "lora_B" in n]
            assert not any(p.any() for p in b), "it starts anew"
            step()
            assert all(p.any() and torch.isfinite(p).all() for p in b), name
        assert hooks() == before, name
