"""The stages of the vision pipeline one by one, in this process, at small sizes."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from transformers import LlamaConfig

from db import files
from db.files import git_state
from export.engines.engine import EngineError
from export.engines.hf import HfEngine
from pipelines import evaluate, prepare_base, prepare_data
from pipelines.check import parse_params
from pipelines.params import ConfigError
from pipelines.stage import split_files
from tests.vision_sizes import small
from trainers import TrainingError


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        params = parse_params(small(prepare_base={"examples": 64}))
        prepare_data.run(params)
        Path("checkpoints/base/of-other-settings").mkdir(parents=True)
        prepare_base.run(params)
    return folder


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_without_pictures_a_split_is_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_files("train", "valid") == [Path("data/train.jsonl"), Path("data/valid.jsonl")]


def test_the_embedded_base_is_evaluated_and_leaves_no_pictures_behind(here):
    output = read("models/base/run.json")["extra"]
    assert len(output["retention"]) == 7 and output["image_tokens"] == 4 and output["steps"] == 4
    assert read("models/base/base.json")["kind"] == "embedded"
    assert not Path("checkpoints/base-pictures").exists() and not Path("checkpoints/base").exists()
    raised = parse_params(small(prepare_base={"examples": 64, "min_tasks_above_80": 7}))
    with pytest.raises(ConfigError, match="expected 7 general tasks"):
        prepare_base.run(raised)
    assert read("models/base/run.json")["extra"] == output, "the base before it stands"


def test_a_user_base_is_referenced(here, tmp_path):
    custom = shutil.copytree(here / "models/base", tmp_path / "own")
    (custom / "base.json").unlink()
    (custom / "run.json").unlink()
    params = parse_params(small(prepare_base={"source": str(custom)}))
    prepare_base.run(params)
    assert {p.name for p in Path("models/base").iterdir()} == {"base.json", "run.json"}
    evaluate.run(params, "base", 0)
    assert read("scores/base/0/scores.json")["exported"] is False
    config = read(custom / "config.json")
    (custom / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    with pytest.raises(ConfigError, match="is quantized"):
        prepare_base.run(params)


def test_a_base_that_takes_no_pictures_is_refused_before_training(here, tmp_path):
    custom = tmp_path / "text"
    custom.mkdir()
    for file in Path("models/base").glob("*token*"):
        shutil.copy(file, custom)
    LlamaConfig().save_pretrained(custom)
    before = read("models/base/base.json")
    with pytest.raises(TrainingError, match=r"expected a processor of texts and pictures, got \w+: the base is no"):
        prepare_base.run(parse_params(small(prepare_base={"source": str(custom)})))
    assert read("models/base/base.json") == before, "the base before it stands"


def test_an_interrupted_evaluation_resumes(here, monkeypatch):
    params = parse_params(small())
    answer = HfEngine.generate_ids
    requested = []

    def fails_later(self, prompts, max_tokens):
        requested.append(len(prompts))
        if len(requested) > 2:
            raise EngineError("no more")
        return answer(self, prompts, max_tokens)

    monkeypatch.setattr(HfEngine, "generate_ids", fails_later)
    with pytest.raises(EngineError, match=r"no more\. 16 of 36 items"):
        evaluate.run(params, "base", 0)
    monkeypatch.setattr(HfEngine, "generate_ids", answer)
    evaluate.run(params, "base", 0)
    assert read("scores/base/0/run.json")["extra"]["resumed_items"] == 16
    rows = [json.loads(line) for line in Path("scores/base/0/samples.jsonl").open()]
    assert len(rows) == 36 + 21 + 6 and len({row["item_id"] for row in rows}) == len(rows)


@pytest.mark.parametrize("place", [".", "inside/another"])
def test_only_changed_code_within_the_project_is_dirty(tmp_path, monkeypatch, place):
    project = tmp_path / place
    project.mkdir(parents=True, exist_ok=True)
    written = [project / name for name in ("code.py", "dvc.lock", "params.yaml")]
    for file in (*written, tmp_path / "others.py"):
        file.write_text("as committed")
    monkeypatch.setattr(files, "ROOT", project)
    monkeypatch.chdir(project)
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    for command in (["init", "--quiet"], ["add", "--all"], [*identity, "commit", "--quiet", "-m", "first"]):
        subprocess.run(["git", *command], check=True, cwd=tmp_path)
    for file in written[1:]:
        file.write_text("changed")
    if place != ".":
        (tmp_path / "others.py").write_text("changed")
    assert git_state()["dirty"] is False, (
        "settings and DVC's own file are no code, nor is what lies outside of the project"
    )
    written[0].write_text("changed")
    assert git_state()["dirty"] is True


def test_a_missing_picture_is_named(here):
    (here / "data/images/test-00003.png").unlink()
    with pytest.raises(ValueError, match=r"data/images/test-00003\.png: no such file"):
        evaluate.run(parse_params(small()), "base", 0)
