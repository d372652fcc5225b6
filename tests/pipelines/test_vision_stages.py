"""The stages of the vision pipeline one by one, in this process, at small sizes."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from transformers import LlamaConfig

from evaluation.backends import BackendError
from evaluation.backends.vision import VisionBackend
from grit_vlm.data import VisionDataError
from pipelines import evaluate, prepare_base, prepare_data, runinfo, vision_base
from pipelines.config import ConfigError, parse_params
from pipelines.runinfo import git_state
from pipelines.stage import SPLITS, split_files
from tests.vision_sizes import small


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with data and the embedded base."""
    folder = tmp_path_factory.mktemp("vision")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        params = parse_params(small(prepare_base={"examples": 64}))
        prepare_data.run(params)
        prepare_base.run(params)
    return folder


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_data_is_the_same_again_and_the_manifest_tells_of_every_picture(here, tmp_path, monkeypatch):
    other = tmp_path / "again"
    other.mkdir()
    monkeypatch.chdir(other)
    prepare_data.run(parse_params(small()))
    names = [pattern.format(split) for pattern in ("{}.jsonl", "images.{}.sha256") for split in SPLITS]
    assert [(other / "data" / n).read_bytes() for n in names] == [(here / "data" / n).read_bytes() for n in names]
    made = read("data/run.json")
    assert [Path(a["path"]).name for a in made["artifacts"]] == names
    assert split_files("test") == [Path("data/test.jsonl"), Path("data/images.test.sha256")]
    listed = [line.split()[1] for split in SPLITS for line in Path(f"data/images.{split}.sha256").open()]
    assert sorted(listed) == sorted(f"images/{path.name}" for path in Path("data/images").iterdir())
    assert all(f"images/{split}-" in line for split in SPLITS for line in Path(f"data/images.{split}.sha256").open())
    other_seed = parse_params(small(prepare_data={"seed": 1}))
    prepare_data.run(other_seed)
    of_both = [[(top / f"data/images.{split}.sha256").read_bytes() for split in SPLITS] for top in (other, here)]
    assert [one == two for one, two in zip(*of_both, strict=True)] == [False, False, False, True]


def test_without_pictures_the_files_of_a_split_are_what_they_were(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_files("train", "valid") == [Path("data/train.jsonl"), Path("data/valid.jsonl")]


def test_the_embedded_base_is_asked_and_leaves_no_pictures_behind(here):
    said = read("models/base/run.json")["extra"]
    assert len(said["retention"]) == 7 and said["image_tokens"] == 4 and said["steps"] == 4
    assert read("models/base/base.json")["kind"] == "embedded"
    assert not Path("checkpoints/base-pictures").exists() and not list(Path("checkpoints/base").glob("*"))
    raised = parse_params(small(prepare_base={"examples": 64, "min_tasks_above_80": 7}))
    with pytest.raises(ConfigError, match="expected 7; raise prepare_base.examples"):
        prepare_base.run(raised)
    assert read("models/base/run.json")["extra"] == said, "the base before it stands"


def test_a_base_of_ones_own_is_referenced(here, tmp_path):
    own = shutil.copytree(here / "models/base", tmp_path / "own")
    (own / "base.json").unlink()
    (own / "run.json").unlink()
    params = parse_params(small(prepare_base={"source": str(own)}))
    prepare_base.run(params)
    assert {p.name for p in Path("models/base").iterdir()} == {"base.json", "run.json"}
    evaluate.run(params, "base", 0, 0)
    assert read("scores/base/0/scores.json")["exported"] is False
    config = read(own / "config.json")
    (own / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    with pytest.raises(ConfigError, match="is quantized, which the vision pipeline does not train on"):
        prepare_base.run(params)


def test_a_base_that_no_picture_can_be_shown_to_is_refused_before_training(here, tmp_path):
    own = tmp_path / "text"
    own.mkdir()
    for file in Path("models/base").glob("*token*"):
        shutil.copy(file, own)
    LlamaConfig().save_pretrained(own)
    before = read("models/base/base.json")
    with pytest.raises(VisionDataError, match=r"expected a processor of texts and pictures, got \w+: the base is no"):
        prepare_base.run(parse_params(small(prepare_base={"source": str(own)})))
    assert read("models/base/base.json") == before, "the base before it stands"


@pytest.mark.parametrize("changed", ["grit_vlm/data.py", "grit_vlm/pictures.py", "trainers/embedded_vlm.py"])
def test_a_base_in_training_starts_anew_where_code_has_changed(here, monkeypatch, changed):
    params, folders, real = parse_params(small()), [], vision_base.hash_inputs
    monkeypatch.setattr(vision_base, "train_embedded_vlm", lambda *arguments: folders.append(arguments[-1]) or {})
    section = params.prepare_base.model_copy(update={"examples": 2})

    def hashes(*paths):
        return {file: "other" if file.endswith(changed) else value for file, value in real(*paths).items()}

    for hash_inputs in (real, real, hashes):
        monkeypatch.setattr(vision_base, "hash_inputs", hash_inputs)
        vision_base.train_base(section, params.prompt.template, here / "unused")
    assert folders[0] == folders[1] != folders[2]


def test_an_interrupted_evaluation_goes_on_with_the_answers_it_has(here, monkeypatch):
    params = parse_params(small())
    answer = VisionBackend.generate_ids
    asked = []

    def fails_later(self, prompts, max_tokens):
        asked.append(len(prompts))
        if len(asked) > 2:
            raise BackendError("no more")
        return answer(self, prompts, max_tokens)

    monkeypatch.setattr(VisionBackend, "generate_ids", fails_later)
    with pytest.raises(BackendError, match=r"no more\. 16 of 36 items of test are done and kept"):
        evaluate.run(params, "base", 0, 0)
    monkeypatch.setattr(VisionBackend, "generate_ids", answer)
    evaluate.run(params, "base", 0, 0)
    assert read("scores/base/0/run.json")["extra"]["resumed_items"] == 16
    rows = [json.loads(line) for line in Path("scores/base/0/samples.jsonl").open()]
    assert len(rows) == 36 + 21 and len({row["item_id"] for row in rows}) == len(rows)


@pytest.mark.parametrize("place", [".", "inside/another"])
def test_code_outside_of_the_working_folder_counts_as_changed(tmp_path, monkeypatch, place):
    project = tmp_path / place
    (project / "vlm").mkdir(parents=True)
    files = [project / name for name in ("code.py", "dvc.lock", "vlm/dvc.lock")]
    for file in (*files, tmp_path / "others.py"):
        file.write_text("as committed")
    monkeypatch.setattr(runinfo, "ROOT", project)
    monkeypatch.chdir(project / "vlm")
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    for command in (["init", "--quiet"], ["add", "--all"], [*identity, "commit", "--quiet", "-m", "first"]):
        subprocess.run(["git", *command], check=True, cwd=tmp_path)
    for file in files[1:]:
        file.write_text("changed")
    if place != ".":
        (tmp_path / "others.py").write_text("changed")
    assert git_state()["dirty"] is False, "what DVC writes is no code, nor what lies outside of the project"
    files[0].write_text("changed")
    assert git_state()["dirty"] is True


def test_a_picture_that_is_gone_is_named(here):
    (here / "data/images/test-00003.png").unlink()
    with pytest.raises(ValueError, match=r"data/images/test-00003\.png: no such file"):
        evaluate.run(parse_params(small()), "base", 0, 0)
