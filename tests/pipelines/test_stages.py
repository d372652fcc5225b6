"""Stages called as functions, in a folder of their own."""

import csv
import json
import shutil

import pytest
import yaml

from evaluation.backends import BackendError
from evaluation.sources import SourceError
from pipelines import base_model, exported_models, prepare_data, profile
from pipelines.config import ConfigError, parse_params
from pipelines.outputs import OutputError
from tests.conftest import not_root
from trainers.settings import BaseReference


@pytest.fixture
def params(tmp_path, monkeypatch):
    """The smoke profile with changes, in an empty folder."""
    raw = yaml.safe_load(profile.compose("smoke"))
    monkeypatch.chdir(tmp_path)

    def make(**sections):
        for section, changes in sections.items():
            raw[section].update(changes)
        return parse_params(raw)

    return make


def rows(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_generated_data(params):
    prepare_data.run(params())
    assert {s: len(rows(f"data/{s}.jsonl")) for s in ("train", "valid", "test")} == {
        "train": 300, "valid": 20, "test": 40}  # fmt: skip
    assert len(rows("data/retention.jsonl")) == 11 * 3
    assert rows("data/rejected.jsonl") == []
    record = json.load(open("data/run.json"))
    assert record["status"] == "finished" and len(record["artifacts"]) == 4


def write_csv(path, header, data):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *data])


def test_a_users_csv(params):
    good = [[f"{5 + i * 0.7:.1f}", f"{i % 90}"] for i in range(60)]
    write_csv("air.csv", ["PM25", "NO2ppb"], [*good, ["abc", "3"], good[0], ["", ""]])
    prepare_data.run(
        params(
            prepare_data={
                "source": "air.csv",
                "columns": {"pm25": "PM25", "no2": "NO2ppb"},
                "train_items": 40,
                "valid_items": 10,
                "test_items": 10,
            }
        )
    )
    kept = [r for s in ("train", "valid", "test") for r in rows(f"data/{s}.jsonl")]
    rejected = rows("data/rejected.jsonl")
    assert len(kept) == 60 and len({r["id"] for r in kept}) == 60
    assert [r["row"] for r in rejected] == [61, 62, 63]
    assert "abc" in rejected[0]["reason"]
    extra = json.load(open("data/run.json"))["extra"]
    assert extra["accepted_rows"] == 60 and extra["rejected_rows"] == 3 and extra["unused_rows"] == 0


def test_a_users_csv_without_the_mapped_column(params):
    write_csv("air.csv", ["PM25", "NO2"], [["5", "6"]])
    with pytest.raises(SourceError, match="PM2.5"):
        prepare_data.run(params(prepare_data={"source": "air.csv", "columns": {"pm25": "PM2.5"}}))
    assert not (profile.Path("data")).exists()


def test_own_texts_and_given_truth(params):
    write_csv("qa.csv", ["q", "a", "v"], [[f"Air in town {i}?", f"It is {i}", str(i)] for i in range(30)])
    columns = {"prompt": "q", "completion": "a", "aqi": "v"}
    prepare_data.run(params(prepare_data={"source": "qa.csv", "columns": columns}))
    item = rows("data/test.jsonl")[0]
    assert item["prompt"] == f"Air in town {item['truth']['aqi']}?"
    assert item["completion"] == f"It is {item['truth']['aqi']}"


def test_same_readings_go_to_one_split(params):
    from evaluation.sources import AqiRecord

    records = [AqiRecord(f"r{i}", i, i, {"pm25": 5.0 + (i % 20)}) for i in range(60)]
    splits, left = prepare_data.split_records(records, {"train": 40, "valid": 10, "test": 10}, seed=0)
    where = {}
    for split, items in splits.items():
        for item in items:
            where.setdefault(item.truth["readings"]["pm25"], set()).add(split)
    assert all(len(s) == 1 for s in where.values())
    assert sum(map(len, splits.values())) + len(left) == 60
    assert all(splits.values())


def test_a_full_disk_leaves_the_old_data(params, small_disk, monkeypatch):
    monkeypatch.chdir(small_disk)
    small = {"train_items": 20, "valid_items": 2, "test_items": 5, "retention_items_per_task": 1}
    prepare_data.run(params(prepare_data=small))
    before = {f.name: f.read_bytes() for f in (small_disk / "data").iterdir()}
    with pytest.raises(OutputError, match=r"data: cannot be written, the disk is full"):
        prepare_data.run(params(prepare_data={**small, "train_items": 2000}))
    assert {f.name: f.read_bytes() for f in (small_disk / "data").iterdir()} == before
    assert [f.name for f in small_disk.iterdir()] == ["data"]


def test_a_read_only_folder_leaves_the_old_data(params, tmp_path, monkeypatch):
    small = {"train_items": 20, "valid_items": 2, "test_items": 5, "retention_items_per_task": 1}
    p = params(prepare_data=small)
    prepare_data.run(p)
    before = {f.name: f.read_bytes() for f in (tmp_path / "data").iterdir()}
    for folder in (tmp_path.parent.parent, tmp_path.parent):
        folder.chmod(0o755)
    tmp_path.chmod(0o555)
    try:
        with not_root(), pytest.raises(OutputError, match=r"data: cannot be written, this user may not write"):
            prepare_data.run(p)
    finally:
        tmp_path.chmod(0o755)
    assert {f.name: f.read_bytes() for f in (tmp_path / "data").iterdir()} == before


def test_too_few_rows(params):
    write_csv("air.csv", ["PM25"], [["5"], ["6"]])
    with pytest.raises(ConfigError, match="at least 3 different rows, got 2"):
        prepare_data.run(params(prepare_data={"source": "air.csv", "columns": {"pm25": "PM25"}}))


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "a/b/c", "no spaces allowed/x y"])
def test_base_path_that_does_not_exist(params, source):
    with pytest.raises(ConfigError, match=r"prepare_base\.source: .* does not exist"):
        base_model.reference_for(params(prepare_base={"source": source}).prepare_base)


def test_base_that_is_neither_here_nor_on_the_hub(params, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="is no folder here, and the model hub did not give it"):
        base_model.reference_for(params(prepare_base={"source": "models/nope"}).prepare_base)


def test_a_folder_without_a_model(params, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"without config\.json"):
        base_model.reference_for(params(prepare_base={"source": "./empty"}).prepare_base)


def test_a_quantized_base_needs_16_bit_weights(params, tmp_path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q/config.json").write_text('{"quantization_config": {"load_in_4bit": true}}')
    with pytest.raises(ConfigError, match=r"merge_source: missing"):
        base_model.reference_for(params(prepare_base={"source": "./q"}).prepare_base)


@pytest.mark.slow
def test_a_local_base_is_referenced_and_watched(params, tmp_path, base_dir):
    from pipelines import prepare_base

    mine = tmp_path / "mine"
    shutil.copytree(base_dir, mine)
    p = params(prepare_base={"source": "./mine"})
    prepare_data.run(p)
    prepare_base.run(p)
    assert sorted(f.name for f in (tmp_path / "models/base").iterdir()) == ["base.json", "run.json"]
    reference, _ = base_model.load_reference()
    assert reference.location == "mine"
    (mine / "config.json").write_text((mine / "config.json").read_text() + " ")
    with pytest.raises(ConfigError, match="is not what it was when prepare_base ran"):
        base_model.load_reference()


def test_base_not_prepared(params):
    params()
    with pytest.raises(ConfigError, match="dvc repro prepare_base"):
        base_model.load_reference()


def test_backend_choice(monkeypatch, capsys):
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    assert exported_models.choose_backend("hf") == "hf"
    assert exported_models.choose_backend("auto") == "llama_cpp"
    assert "no Ollama server at http://127.0.0.1:9" in capsys.readouterr().out
    with pytest.raises(BackendError, match=r"no server answers at http://127\.0\.0\.1:9.*OLLAMA_HOST"):
        exported_models.choose_backend("ollama")


def test_an_arm_follows_the_base_under_auto(monkeypatch):
    from tests.ollama_double import OllamaDouble

    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    with pytest.raises(BackendError, match="the base was scored through Ollama, and no server answers"):
        exported_models.choose_backend("auto", "ollama")
    with OllamaDouble(reply=lambda rendered: "126") as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        assert exported_models.choose_backend("auto", "llama_cpp") == "llama_cpp"
        assert exported_models.choose_backend("ollama", "llama_cpp") == "ollama"


def test_names_of_served_models():
    from pipelines.stage import model_name

    assert model_name("base", 0, 3407) == "base_model"
    assert model_name("baseline_lora", 3407, 3407) == "baseline_lora_model"
    assert model_name("baseline_lora", 7, 3407) == "baseline_lora_model:seed7"


def test_a_server_that_answers_is_used(monkeypatch, capsys):
    from tests.ollama_double import OllamaDouble

    with OllamaDouble(reply=lambda rendered: "126") as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        assert exported_models.choose_backend("auto") == "ollama"
    assert "Ollama 0.32" in capsys.readouterr().out


def test_questions_that_do_not_fit_the_context_are_refused_before_the_work(tmp_path, monkeypatch, base_dir):
    from export.errors import ExportError
    from pipelines.export import check_room
    from trainers.models import load_tokenizer

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for split, prompts in {"test": ["1 + 1", "apple " * 60], "retention": ["2 + 2"]}.items():
        lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
        (tmp_path / f"data/{split}.jsonl").write_text("\n".join(lines) + "\n")
    reference = BaseReference(location=str(base_dir))
    facts = {"template": "Q: {prompt}\n", "num_ctx": 512}
    check_room(reference, facts, 24)
    longest = len(load_tokenizer(reference)("Q: " + "apple " * 60 + "\n")["input_ids"])
    check_room(reference, facts | {"num_ctx": longest + 24 + 8}, 24)
    with pytest.raises(ExportError, match=rf"24 tokens .*, got 1 of 3 .*has {longest}\).*prepare_data\.max_chars"):
        check_room(reference, facts | {"num_ctx": longest + 24 + 7}, 24)
