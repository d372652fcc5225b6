"""Data sets of the hub and folders in its format: what is opened, and what is said where it cannot be."""

import re
import shutil
import socket

import datasets
import httpx
import pytest
from datasets import ClassLabel, Dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import errors

from evaluation.sources import read_table
from evaluation.sources.hub import open_data_set, read_split
from evaluation.sources.tables import SourceError

README = """---
configs:
- config_name: cola
  data_files:
  - split: train
    path: cola/train-*
- config_name: qnli
  data_files:
  - split: train
    path: qnli/train-*
  - split: validation
    path: qnli/validation-*
  - split: test
    path: qnli/test-*
---
"""


def glue(folder, *parts, readme=False):
    """A part of GLUE as it lies in a folder; `parts` are subset/split."""
    for part in parts:
        subset, split = part.split("/")
        (folder / subset).mkdir(parents=True, exist_ok=True)
        labels = [0, 1] if split != "test" else [-1, -1]
        made = Dataset.from_dict({"question": [f"{part} 1?", f"{part} 2?"], "label": labels})
        made = made.cast_column("label", ClassLabel(names=["entailment", "not_entailment"]))
        made.to_parquet(folder / subset / f"{split}-00000-of-00001.parquet")
    if readme:
        (folder / "README.md").write_text(README)
    return folder


def problem(call):
    with pytest.raises(SourceError) as caught:
        call()
    (only,) = caught.value.problems
    return only


WHOLE = ("cola/train", "qnli/train", "qnli/validation", "qnli/test")


@pytest.mark.parametrize(
    ("parts", "readme"), [(WHOLE, True), (WHOLE, False), (WHOLE[1:], True), (WHOLE[1:3], True), (WHOLE[1:], False)]
)
def test_a_subset_is_found_by_the_readme_or_by_its_folder(tmp_path, parts, readme):
    """Where one subset alone was downloaded, the README names files that are not there."""
    folder = glue(tmp_path / "glue", *parts, readme=readme)
    for asked in ({"subset": "qnli"}, {"usual": "qnli"}):
        with open_data_set(str(folder), **asked) as data:
            assert data.subset == "qnli"
            assert list(data.splits) == ["train", "validation", *(["test"] if "qnli/test" in parts else [])]
            table = data.table("validation")
    assert [r.values for r in table.rows] == [
        {"question": "qnli/validation 1?", "label": 0}, {"question": "qnli/validation 2?", "label": 1}]  # fmt: skip
    assert [r.row for r in table.rows] == [1, 2] and table.rows[0].line is None
    assert table.labels == {"label": ["entailment", "not_entailment"]} and table.revision is None


def test_a_folder_is_read_anew_where_its_files_changed(tmp_path):
    import os

    file = tmp_path / "d" / "train.jsonl"
    file.parent.mkdir()
    for text in ("one", "two"):
        file.write_text(f'{{"a": "{text}"}}\n')
        os.utime(file, (1, 1))
        assert read_split(str(file.parent), "train", None).rows[0].values == {"a": text}


def test_subsets_and_splits_that_are_not_there_are_answered_by_those_that_are(tmp_path):
    folder = glue(tmp_path / "glue", *WHOLE, readme=True)
    said = problem(lambda: read_split(str(folder), "train", "qnl"))
    assert said == "there is no subset 'qnl'; did you mean 'qnli'? Available: cola, qnli."
    said = problem(lambda: read_split(str(folder), "train", None))
    assert said == "it has several subsets, of which one is to be named. Available: cola, qnli."
    assert "split 'dev'" in problem(lambda: read_split(str(folder), "dev", "qnli"))
    with open_data_set(str(folder), "qnli") as data:
        said = problem(lambda: data.table("valid"))
    assert said == (
        "there is no split 'valid' of subset 'qnli'; did you mean 'validation'? Available: train, validation, test."
    )
    plain = glue(tmp_path / "plain", *WHOLE)
    said = problem(lambda: read_split(str(plain), "train", "mnli"))
    assert said.endswith("Available: cola, qnli.")


@pytest.mark.parametrize(
    ("files", "said"),
    [({}, "there is no data file"),
     ({"train.jsonl": '{"a": 1}\n{"a":\n'}, "JSON parse error.*The file named alone as source"),
     ({"train.parquet": "PAR1"}, "could not be opened: .*Parquet"),
     ({"d.py": "raise SystemExit(3)", "train.jsonl": '{"a": 1}\n'}, "come from a script, which is not run"),
     ({"README.md": "---\na: [\n---\n", "train.jsonl": '{"a": 1}\n'}, "README.md.*no YAML|could not be opened")],
)  # fmt: skip
def test_folders_that_cannot_be_read(tmp_path, files, said):
    folder = tmp_path / "d"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    assert re.search(said, problem(lambda: read_split(str(folder), "train", None)))


def test_a_folder_of_data_is_no_subset(tmp_path):
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"a": [1]}).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    assert problem(lambda: read_split(str(tmp_path), "train", "qnli")) == "there is no subset 'qnli'."


def test_offline_is_one_sentence_and_nothing_is_asked_of_the_network(monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host) or [])
    for source in ("hub:openai/gsm8k", "hub:openai/gsm8k@main"):
        said = problem(lambda source=source: read_table(source, subset="main"))
        assert said.startswith("the Hugging Face hub cannot be reached (ConnectionError: Couldn't reach")
        assert "HF_HUB_OFFLINE is set" in said and "and set source to that folder" in said
        revision = " --revision main" if "@" in source else ""
        assert f"`hf download openai/gsm8k --repo-type dataset{revision} --local-dir inputs/gsm8k`" in said
    assert asked == []


@pytest.mark.parametrize(
    ("local", "error", "said"),
    [(0, ConnectionError("Couldn't reach 'o/n' on the Hub (LocalEntryNotFoundError)"), "hub cannot be reached"),
     (0, httpx.ConnectTimeout("timed out"), "hub cannot be reached .ConnectTimeout: timed out"),
     (0, errors.OfflineModeIsEnabled("offline"), "hub cannot be reached"),
     (0, DatasetNotFoundError("Dataset 'o/n' is a gated dataset on the Hub."), "gated: .*`hf auth login`, or set HF_T"),
     (0, DatasetNotFoundError("Dataset 'o/n' doesn't exist on the Hub or cannot be"), "has no data set o/n,"),
     (0, DatasetNotFoundError("Revision 'r' doesn't exist for dataset 'o/n'"), "has no revision 'r'; expected a branc"),
     (0, RuntimeError("Dataset scripts are no longer supported, but found n.py"), "a script, which is not run"),
     (0, ValueError("Unknown split \"dev\". Should be one of ['train']"), "split 'dev'.*one of .'train'"),
     (0, OSError(28, "No space left on device"), "could not be kept on the disk"),
     (1, PermissionError(13, "Permission denied", "x"), "the folder could not be read .PermissionError"),
     (1, ConnectionError("Couldn't reach https://files.invalid/a.csv"), "the folder could not be read .ConnectionErr"),
     (1, DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), "the folder could not be read .DatasetNotFo"),
     (1, OSError(28, "No space left on device"), "could not be kept on the disk")],
)  # fmt: skip
def test_what_is_refused_is_explained_and_a_fault_of_ours_keeps_its_traceback(
    tmp_path, monkeypatch, local, error, said
):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(SourceError, match=said) as caught:
        read_split(str(tmp_path) if local else "hub:o/n@r", "dev", None)
    assert caught.value.__cause__ is error and len(caught.value.problems) == 1
    assert not local or not re.search("hub (data set|cannot|has)|hf download", caught.value.problems[0])
    error = AttributeError("a bug")
    with pytest.raises(AttributeError, match="a bug"):
        read_split("hub:o/n", "train", None)


def test_the_commit_of_a_hub_data_set_is_known_from_its_cache(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "o___n" / "default" / "0.0.0" / commit
    folder.mkdir(parents=True)
    Dataset.from_dict({"a": [1]}).save_to_disk(tmp_path / "saved")
    shutil.copy(next((tmp_path / "saved").glob("*.arrow")), folder / "n-train.arrow")
    made = Dataset.from_file(str(folder / "n-train.arrow"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    assert read_split("hub:o/n", "train", None).revision == commit
