"""Adapters that other trainers made: what is said of one that fits, and of one that does not."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import foreign_adapter
from tests.trainers.test_training import ARM, WEIGHTS, loss_of
from trainers import TrainingError
from trainers.theirs import CONFIG, adopt, moved, problems


@pytest.fixture(scope="module")
def made(base_dir, aqi_examples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs") / "plain"
    foreign_adapter.make(base_dir, folder, [prompt + answer for prompt, answer in aqi_examples[:16]])
    return folder


@pytest.fixture
def theirs(made, tmp_path):
    return shutil.copytree(made, tmp_path / "theirs")


def change(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def test_one_that_fits_is_copied_and_measured(made, make_job):
    texts = [(prompt + answer, True) for prompt, answer in make_job().train[:8]]
    job = replace(make_job(preserve={"method": "kfac"}, peft={"use_rslora": True}), texts=texts)  # of no concern to it
    said = adopt(ARM, job, made)
    for name in (CONFIG, WEIGHTS):
        assert (job.output / name).read_bytes() == (made / name).read_bytes()
    assert said["final_eval_loss"] == pytest.approx(loss_of(job), rel=1e-4) and said["final_kl"] > 0
    assert (said["trained"], said["base_compared_by"]) == ("elsewhere", "unknown")
    assert not said.keys() & {"steps", "train_seconds", "final_loss"}
    assert json.loads((job.output / "loss_history.json").read_text()) == []
    assert problems(made) == [] and moved(made) == 1.0


def test_one_that_does_not_fit_is_refused(theirs, make_job, base_dir, tmp_path):
    job, weights = make_job(), load_file(theirs / WEIGHTS)
    name = next(iter(weights))
    other = name.replace("q_proj", "k_proj")
    for changed, message in (
        ({**weights, other: weights[name].clone()}, f"1 tensors of 8: the base has no place for {other}"),
        ({k: w for k, w in weights.items() if k != name}, f"1 tensors of 8: misses {name}"),
        ({**weights, name: torch.zeros(5, 5)}, r"does not fit the base: (.|\n)*size mismatch"),
    ):  # fmt: skip
        save_file(changed, theirs / WEIGHTS)
        with pytest.raises(TrainingError, match=message):
            adopt(ARM, job, theirs)
    save_file(weights, theirs / WEIGHTS)
    other = shutil.copytree(base_dir, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    change(theirs, base_model_name_or_path=str(other))
    assert adopt(ARM, job, theirs)["base_compared_by"] == "weights"
    save_file({n: w + 1 for n, w in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"expected an adapter of .*, got one of .*/other"):
        adopt(ARM, job, theirs)


def test_what_is_said_before_its_tensors_are_looked_at(theirs):
    change(theirs, init_lora_weights="pissa", alora_invocation_tokens=[1])
    reasons = zip(("alora_invocation_tokens", "pissa"), problems(theirs), strict=True)
    assert all(word in line for word, line in reasons)
    change(theirs, peft_type="PROMPT_TUNING", init_lora_weights=True, alora_invocation_tokens=None)
    (theirs / WEIGHTS).unlink()
    assert [word in line for word, line in zip((WEIGHTS, "PROMPT_TUNING"), problems(theirs), strict=True)] == [True] * 2
    (theirs / CONFIG).write_text("[")
    assert "cannot be read" in problems(theirs)[0]
