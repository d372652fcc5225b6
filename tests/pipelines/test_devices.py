"""One run on two gloo processes, through the stage's command, equals one process with the joint batch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from db.files import read_json
from pipelines import base_texts, prepare_base, prepare_data, probe
from pipelines.check import parse_params
from pipelines.params import ConfigError
from pipelines.train import devices_for
from trainers.theirs import WEIGHTS

ROOT = Path(__file__).resolve().parents[2]
# So low since Adam divides: where a gradient is near zero, rounding alone makes some percent of a step.
SHORT = {"max_steps": 10, "eval_steps": 5, "save_steps": 4, "logging_steps": 2, "probe_every": 4, "learning_rate": 1e-4}
HELD = {"method": "distill", "strength": 0.75, "rows": 3, "kl": 0.01}


def test_devices_must_exist_and_divide_the_batch(smoke_raw, monkeypatch):
    settings = parse_params(smoke_raw).train_for("baseline_lora")  # of 8 questions
    for prompts, there, expected in ((1, 4, 1), ("all", 0, 1), ("all", 4, 4), (2, 0, 2), (2, 4, 2)):
        monkeypatch.setattr("torch.cuda.device_count", lambda there=there: there)
        assert devices_for(settings.model_copy(update={"devices": prompts})) == expected
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    for prompts, message in ((4, r"train\.devices: expected at most 3"), ("all", r"multiple of the 3 devices, got 8")):
        with pytest.raises(ConfigError, match=message):
            devices_for(settings.model_copy(update={"devices": prompts}))


@pytest.mark.full
def test_two_processes_train_the_same_adapter_as_one(smoke_raw, tmp_path, monkeypatch):
    """Across the end of an epoch of 61 questions, so that a batch of 5 and texts of `preserve` are shared too."""
    monkeypatch.chdir(tmp_path)
    raw = smoke_raw | {"prepare_data": smoke_raw["prepare_data"] | {"train_items": 61, "valid_items": 21}}
    raw |= {"train": raw["train"] | SHORT, "arms": {k: dict(v) for k, v in raw["arms"].items()}}
    for arm in ("baseline_lora", "pure_grit"):
        raw["arms"][arm]["optim_args"] = {"betas": [0.9, 0.999]}  # a lower β₁ averages roundings less
    raw["arms"]["pure_grit"] |= {"preserve": HELD, "learning_rate": SHORT["learning_rate"]}
    custom = raw["arms"]["pure_grit"]["grit"]  # what is tested is shared statistics; these three make more of roundings
    raw["arms"]["pure_grit"]["grit"] = custom | dict.fromkeys(("nesterov", "cautious", "orthogonal"), False)
    params = parse_params(raw)
    for stage in (prepare_data, prepare_base, base_texts):
        stage.run(params)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for arm in ("baseline_lora", "pure_grit"):
        result, verdicts = [], []
        for devices in (1, 2):
            raw["train"]["devices"] = devices
            Path("params.yaml").write_text(yaml.safe_dump(raw))
            command = [sys.executable, "-m", "pipelines.train", arm, "0"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            assert done.stdout.count('{"devices": ') == 1  # the first process alone speaks
            verdicts.append(probe.run(parse_params(raw), arm, 0))
            result.append(tmp_path / f"{arm}-{devices}")
            shutil.move(tmp_path / "adapters" / arm / "0", result[-1])
        one, two = (load_file(folder / WEIGHTS) for folder in result)
        assert one.keys() == two.keys()
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6
        logs = [read_json(folder / "loss_history.json") for folder in result]
        losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
        assert losses[0] and losses[1] == pytest.approx(losses[0], rel=1e-6)
        facts = [read_json(folder / "run.json")["extra"] for folder in result]
        assert [record["devices"] for record in facts] == [1, 2]
        assert facts[1]["final_eval_loss"] == pytest.approx(facts[0]["final_eval_loss"], rel=1e-6)
        assert facts[1]["final_kl"] == pytest.approx(facts[0]["final_kl"], rel=1e-4, abs=1e-7)
        assert [(v.verdict, v.diagnosis, v.as_claimed) for v in verdicts[1:]] == [
            (v.verdict, v.diagnosis, v.as_claimed) for v in verdicts[:1]
        ]
