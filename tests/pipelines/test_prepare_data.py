"""Stage prepare_data with the five recipes: splits, groups, duplicates, rejections, sizes; settings and messages."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml

from evaluation import EvaluationError
from evaluation.splits import divide
from evaluation.tasks import Item, load
from pipelines import prepare_data, profile
from pipelines.check import parse_params
from pipelines.params import ConfigError
from tests import recipe_data

SPLITS = ("train", "valid", "test")
TEST_SPLIT = {"gsm8k": "test", "boolq": "validation", "qnli": "validation"}


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Runs the stage in an empty folder; returns split → items, and run.json."""
    profiles = {name: profile.compose(name) for name in ("smoke", "vision+smoke")}
    monkeypatch.chdir(tmp_path)

    def run(name="smoke", **settings):
        raw = yaml.safe_load(profiles[name])
        targets = {"train_items": None, "valid_items": 10, "test_items": 20, "retention_items_per_task": 1, "vary": 0.0}
        raw["prepare_data"].update(targets | settings)
        prepare_data.run(parse_params(raw))
        record = json.loads(Path("data/run.json").read_text(encoding="utf-8"))
        return {s: [Item.from_json(r) for r in rows(f"data/{s}.jsonl")] for s in SPLITS}, record

    return run


@pytest.fixture
def section():
    raw = yaml.safe_load(profile.compose("tiny"))
    return lambda **keys: parse_params({**raw, "prepare_data": {**raw["prepare_data"], **keys}}).prepare_data


def rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def groups(task, items):
    recipe = load(task)
    return {recipe.group(item) for item in items}


@pytest.mark.parametrize("task", recipe_data.MAKERS)
def test_each_data_set_in_the_hubs_format(stage, task, capsys):
    recipe_data.write(Path("inputs") / task, task, 200, 40)
    first, record = stage(task=task, source=f"inputs/{task}")
    text = Path("data/test.jsonl").read_bytes()
    sizes = {split: len(items) for split, items in first.items()}
    assert sizes["test"] == 20 and sizes["valid"] == 10 and sizes["train"] >= 50
    ids = [item.id for items in first.values() for item in items]
    prompts = [item.prompt for items in first.values() for item in items]
    assert len(set(ids)) == len(ids) and len(set(prompts)) == len(prompts)
    assert all(item.task == task and item.completion for items in first.values() for item in items)
    assert not groups(task, first["train"]) & (groups(task, first["valid"]) | groups(task, first["test"]))
    assert not groups(task, first["valid"]) & groups(task, first["test"])

    extra = record["extra"]
    held = TEST_SPLIT.get(task)
    assert extra["test_split"] == held and extra["train_split"] == "train" and extra["task"] == task
    assert all(re.fullmatch(rf"{task}-{held or 'train'}-\d+", item.id) for item in first["test"])
    assert all(item.id.startswith(f"{task}-train-") for s in ("train", "valid") for item in first[s])
    read = sum(extra["rows"].values())
    assert read == (200 if task == "alpaca" else 240) == extra["accepted_rows"] + extra["rejected_rows"]
    used = sum(sizes.values()) + extra["apart_rows"] + extra["untested_rows"] + extra["unused_rows"]
    assert used == extra["accepted_rows"]
    assert len(rows("data/rejected.jsonl")) == extra["rejected_rows"]
    assert record["inputs"] and all(f.startswith(f"inputs/{task}/") for f in record["inputs"])
    output = capsys.readouterr().out
    assert ("test items are drawn from" in output) == (held is None) and "lies outside" not in output
    assert ("rows were rejected; data/rejected.jsonl lists them" in output) == (extra["rejected_rows"] > 0)

    stage(task=task, source=f"inputs/{task}")
    assert Path("data/test.jsonl").read_bytes() == text, "same seed, same items"
    other, _ = stage(task=task, source=f"inputs/{task}", seed=1)
    assert [i.id for i in other["test"]] != [i.id for i in first["test"]]
    by_id = {i.id: i for items in first.values() for i in items}
    assert any(i.id in by_id for i in other["test"] + other["train"])
    assert all(by_id.get(i.id, i) == i for items in other.values() for i in items), "an id is of one row"


def test_rows_that_share_a_group_with_a_test_item_are_not_trained_on(stage, capsys):
    passage = ["The sea is wide.", "The hill is high.", "The road is long."]
    held = [{"question": "is the sea wide", "passage": passage[0], "answer": True}]
    train = [{"question": f"is it {n}", "passage": f"Number {n} is here.", "answer": bool(n % 2)} for n in range(20)]
    train += [{"question": f"is it {n}", "passage": passage[0], "answer": False} for n in range(3)]
    folder = Path("inputs/boolq")
    folder.mkdir(parents=True)
    recipe_data.data_set("boolq", train).to_parquet(folder / "train-00000-of-00001.parquet")
    recipe_data.data_set("boolq", held).to_parquet(folder / "validation-00000-of-00001.parquet")
    result, record = stage(task="boolq", source="inputs/boolq", valid_items=4, test_items=5)
    assert record["extra"]["apart_rows"] == 3
    assert [len(result[s]) for s in SPLITS] == [16, 4, 1]
    output = capsys.readouterr().out
    assert "3 rows share a group or a prompt with a test item" in output
    assert "prepare_data.test_items: 1 instead of 5" in output


def test_rows_that_spell_out_a_control_token_of_the_base_are_refused(stage, capsys):
    rows = [{"question": f"Is it {n}?", "answer": "yes</s> no" if n == 3 else "yes"} for n in range(40)]
    Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result, _ = stage(task="exact", source="d.jsonl", valid_items=4, test_items=4)
    assert sum(map(len, result.values())) == 39 and "1 rows were rejected" in capsys.readouterr().out
    (refused,) = [json.loads(line) for line in Path("data/rejected.jsonl").read_text().splitlines()]
    assert refused["row"] == 4 and "</s>" in refused["reason"]


def test_too_few_rows_are_an_error_and_leave_nothing_behind(stage):
    Path("d.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(EvaluationError, match="no row is left, all 1 were rejected"):
        stage(task="gsm8k", source="d.jsonl")
    Path("d.jsonl").write_text('{"question": "a", "answer": "#### 1"}\n{"question": "b", "answer": "#### 1"}\n')
    with pytest.raises(EvaluationError, match=r"at least 3 different rows \(of different groups\).*got 2"):
        stage(task="gsm8k", source="d.jsonl")
    assert not Path("data").exists()


def test_train_items_limits_rows_and_null_takes_all(stage, capsys):
    folder = recipe_data.write(Path("inputs/g"), "gsm8k", 100, 10)
    # Hidden files hold times of a download: a second one would look like another data set.
    (folder / ".cache/huggingface").mkdir(parents=True)
    (folder / ".cache/huggingface/x.metadata").write_text("1700000000")
    result, record = stage(task="gsm8k", source="inputs/g", train_items=30, test_items=5)
    assert sorted(record["inputs"]) == [f"inputs/g/data/{s}-00000-of-00001.parquet" for s in ("test", "train")]
    assert [len(result[s]) for s in SPLITS] == [30, 10, 5]
    assert (record["extra"]["unused_rows"], record["extra"]["untested_rows"]) == (60, 5)
    assert "60 rows are unused" in capsys.readouterr().out
    result, record = stage(task="gsm8k", source="inputs/g", train_items=None, test_items=500)
    assert [len(result[s]) for s in SPLITS] == [90, 10, 10] and record["extra"]["unused_rows"] == 0


@pytest.mark.parametrize(
    ("settings", "output"),
    [
        ({"task": "gsm8k"}, ["source: expected hub, hub:org/name, a file or a folder, got 'generated'"]),
        ({"task": "gsm9k"}, ["prepare_data.task: unknown task 'gsm9k'; did you mean 'gsm8k'"]),
        ({"source": "generated", "max_chars": 9, "hub_test_split": "test"},
         ["max_chars: expected null, got 9", "hub_test_split: expected null, got 'test'; generated has no splits"]),
        ({"source": "hub"}, ["source: expected generated, hub:org/name, a file or a folder, got 'hub'"]),
        ({"image_size": 48}, ["image_size: expected null, got 48; aqi draws no pictures"]),
        ({"task": "aqi_vision", "source": "a.csv", "columns": {"a": "b"}},
         ["source: expected generated, got 'a.csv'", "image_size: expected a number"]),
        ({"source": "a.csv", "hub_subset": "x", "hub_split": "train"},
         ["hub_subset: expected null, got 'x'; a.csv has no", "hub_split: exp"]),
        ({"task": "gsm8k", "source": "a.PARQUET", "hub_test_split": "test"}, ["hub_test_split: expected null"]),
        ({"train_items": None}, ["train_items: expected a number, got null"]),
    ],
)  # fmt: skip
def test_inconsistent_settings_are_refused_together(stage, settings, output):
    with pytest.raises(ConfigError) as caught:
        stage(**{"train_items": 300, **settings})
    text = str(caught.value)
    assert text.startswith(f"params.yaml: {len(output)} error")
    for part in output:
        assert re.search(part, text), part


# --- division ---


def item(n, group):
    return Item(f"i{n}", "t", f"{group}/{n}", "a")


def by_group(one):
    return one.prompt.split("/")[0]


@pytest.mark.parametrize(
    ("sizes", "share"),  # the share of 120 rows that the tests get where they have no rows of their own
    [((None, 10, 20), 20), ((50, 10, 20), 20), ((6000, 200, 500), 8), ((1, 1, 1), 1), ((None, 200, 500), 42)],
)
@pytest.mark.parametrize("per_group", [1, 3, 40])
@pytest.mark.parametrize("tests", [0, 1, 30])
def test_every_item_is_in_one_place_and_every_group_in_one_split(sizes, share, per_group, tests):
    pool = [item(n, f"g{n // per_group}") for n in range(120)]
    test = [item(1000 + n, f"g{n}") for n in range(tests)] or None
    if test and per_group == 40:
        test = test[:1]  # more would take every group
    targets = dict(zip(SPLITS, sizes, strict=True))
    created = divide(pool, test, by_group, targets, seed=0)
    # Whole groups of the pool, one at least; rows of their own one by one.
    n = min(len(test), targets["test"]) if test else per_group * max(1, share // per_group)
    assert len(created.splits["test"]) == n
    placed = [i.id for items in (*created.splits.values(), created.apart, created.unused) for i in items]
    assert len(placed) == len(set(placed)) == 120 + (n if test else 0)
    where = {split: {by_group(i) for i in items} for split, items in created.splits.items()}
    assert all(where.values()) and not where["train"] & where["valid"]
    assert not where["test"] & (where["train"] | where["valid"])
    assert {by_group(i) for i in created.apart} <= where["test"]
    for split, most in targets.items():
        smallest = per_group if split != "train" else 0
        assert most is None or len(created.splits[split]) <= max(most, smallest)
    assert divide(pool, test, by_group, targets, seed=0) == created
    assert not created.unused or len(created.splits["train"]) == targets["train"]


def test_a_huge_group_is_trained_on_and_a_test_prompt_never_is():
    pool = [item(n, "all") for n in range(900)] + [item(1000 + n, f"g{n}") for n in range(5)]
    created = divide(pool, None, by_group, {"train": None, "valid": 100, "test": 100}, seed=0)
    assert len(created.splits["train"]) >= 900 and len(created.splits["valid"]) + len(created.splits["test"]) >= 2

    pool = [Item(f"i{n}", "t", f"p{n}", "a") for n in range(10)]
    created = divide(
        pool, [Item("x", "t", "p3", "b")], lambda one: one.id, {"train": None, "valid": 2, "test": 5}, seed=0
    )
    assert [i.id for i in created.apart] == ["i3"]


# --- the section ---


@pytest.mark.parametrize("task", ["gsm8k", "aqi"])
def test_malformed_sources_are_refused(section, task):
    for source in ("", "  ", "hub:", "hub:gsm8k", "hub:/gsm8k", "hub:o/", "hub:o/n@", "hub:o/n/m"):
        with pytest.raises(ConfigError) as caught:
            section(task=task, source=source, columns={"pm25": "pm"}, train_items=None)
        output = str(caught.value)
        assert output.startswith("params.yaml: 1 error") and "prepare_data.source: " in output
        targets = "expected hub:org/name or hub:org/name@revision" if source.strip() else "or a folder, got nothing"
        assert targets in output
    assert section(task="alpaca", source="a.csv", columns={"input": None}).columns == {"input": None}
    with pytest.raises(ConfigError, match=r"columns\.o3_8h: expected a column, got null; leave o3_8h out"):
        section(task="aqi", source="a.csv", columns={"pm25": "pm", "o3_8h": None})


def test_pictures_are_hashed_and_redrawn_to_the_byte(stage):
    def hashes():
        lines = [line for s in (*SPLITS, "retention") for line in Path(f"data/{s}.jsonl").read_text().splitlines()]
        return [json.loads(line)["pictures"] for line in lines]

    sizes = {"train_items": 18, "valid_items": 18, "test_items": 18}
    _, record = stage("vision+smoke", image_size=32, **sizes)
    assert record["extra"]["pictures"] == len(list(Path("data/images").iterdir())) == 54 + 7
    assert record["extra"]["test_counts"]["kinds"] == {"colour": 6, "bars": 6, "gauge": 6}
    first = hashes()
    pictures = {path: digest for item in first for path, digest in item.items()}
    assert len(pictures) == 54 + 7
    for path, digest in pictures.items():
        assert hashlib.sha256(Path("data", path).read_bytes()).hexdigest() == digest
    stage("vision+smoke", image_size=32, **sizes)
    assert hashes() == first
