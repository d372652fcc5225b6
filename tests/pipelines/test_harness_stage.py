"""Stage harness: user task files on a real, small adapter, and what is refused before anything is trained."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from evaluation import EvaluationError
from evaluation.measure import lm_harness
from pipelines import check, harness
from pipelines.check import parse_params
from pipelines.params import ConfigError
from pipelines.stage import clear_errors

SUMS = [{"question": f"What is {a} plus {b}?", "choices": [str(a + b - 1), str(a + b), str(a + b + 11)], "at": 1}
        for a in range(2, 6) for b in range(3, 6)]  # fmt: skip
ASKED = "### Instruction:\n{{question}}\n\n### Response:"
DATA = {"dataset_path": "json", "test_split": "test", "doc_to_text": ASKED, "target_delimiter": "\n",
        "dataset_kwargs": {"data_files": {"test": "theirs/harness/sums.jsonl"}}}  # fmt: skip
TASKS = {
    "own_choice": {**DATA, "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "at",
                   "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    "own_answer": {**DATA, "output_type": "generate_until", "doc_to_text": ASKED + "\n", "doc_to_target": "{{said}}",
                   "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 8},
                   "metric_list": [{"metric": "exact_match"}]},
}  # fmt: skip


def write_tasks(folder, said):
    folder.mkdir(parents=True)
    rows = [{**row, "said": text} for row, text in zip(SUMS, said, strict=True)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, content in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **content}))


def by_hand(base, adapter=None):
    """The likeliest choices and the generated answers."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    chosen, said = [], []
    for row in SUMS:
        prompt = ASKED.replace("{{question}}", row["question"])
        worth, start = [], len(tokenizer(prompt).input_ids)
        for choice in row["choices"]:
            # As lm-eval does, although a pair of tokens may be one where the two texts meet.
            ids = tokenizer(prompt).input_ids + tokenizer(f"{prompt}\n{choice}").input_ids[start:]
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            worth.append(float(sum(logs[at - 1, ids[at]] for at in range(start, len(ids)))))
        chosen.append(row["choices"][worth.index(max(worth))])
        asked = tokenizer(f"{prompt}\n", return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.generate(input_ids=asked, max_new_tokens=8, do_sample=False)[0, asked.shape[1] :]
        said.append(tokenizer.decode(out, skip_special_tokens=True).split("\n")[0])
    return chosen, said


@pytest.fixture(scope="module")
def raw(smoke_raw):
    return {**smoke_raw, "evaluate": {**smoke_raw["evaluate"], "harness": list(TASKS)}}


def changed(raw, **keys):
    return parse_params({**raw, "evaluate": {**raw["evaluate"], **keys}})


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tasks(tmp_path / "theirs/harness", ["yes"] * len(SUMS))
    return tmp_path


def test_without_lm_eval_the_command_that_installs_it_is_named(smoke, monkeypatch):
    raw = yaml.safe_load(smoke)
    monkeypatch.setattr(lm_harness, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"evaluate.harness: .* is not installed; `make setup EXTRAS=harness`"):
        changed(raw, harness=["arc_easy"])
    assert changed(raw, harness=[]).evaluate.harness == [], "who asks no benchmark needs none"


@pytest.mark.full  # lm-eval alone takes seconds to load, its index of tasks more
def test_an_unknown_benchmark_is_refused_with_the_places_searched(raw, work):
    pytest.importorskip("lm_eval")
    (work / "theirs/harness/broken.yaml").write_text("task: [")
    with pytest.raises(ConfigError) as caught:
        changed(raw, harness=["own_choice", "arc_eazy", "own_anser"])
    lines = str(caught.value).splitlines()
    assert re.search(r"evaluate.harness: theirs/harness/broken.yaml .*line 1", lines[1])
    assert re.search(r"'arc_eazy'; did you mean 'arc_easy'\?.*1\d,\d+ tasks.* 3 .*theirs/harness", lines[2])
    assert "did you mean 'own_answer'?" in lines[3] and len(lines) == 4


@pytest.mark.full
def test_a_stage_depends_on_the_users_task_files(raw, work):
    pytest.importorskip("lm_eval")
    (work / "dvc.yaml").write_text("python -m pipelines.prepare_base; python -m pipelines.harness base")
    params = changed(raw)
    check.write_code_hashes(params)
    before = {file.name: file.read_text() for file in Path("outputs/code").iterdir() if file.name.startswith("harness")}
    assert before.keys() == {"harness.own_choice", "harness.own_answer"}
    (work / "theirs/harness/sums.jsonl").write_text(json.dumps(SUMS[0]))
    check.write_code_hashes(params)
    assert all((work / "outputs/code" / name).read_text() != text for name, text in before.items())
    assert lm_harness.own_files("arc_easy", harness.TASK_FILES) == [], "lm-eval's own do not depend on them"
    (harness.TASK_FILES / "more").mkdir()
    (harness.TASK_FILES / "more/t.yaml").write_text("include: ../own_choice.yaml\ntask: x\n")
    (harness.TASK_FILES / "more/again.yaml").write_text("task: x\n")
    assert lm_harness.problems(["x"], harness.TASK_FILES) == [
        f"'x' is the name of several tasks below {harness.TASK_FILES}/; rename all but one"
    ]
    (harness.TASK_FILES / "more/again.yaml").write_text("task: 5\n")
    (line,) = lm_harness.problems(["x"], harness.TASK_FILES)
    assert line.startswith(f"lm-eval cannot read the task files below {harness.TASK_FILES}/: ")


@pytest.fixture(scope="module")
def project(make_project, raw):
    """Both tasks for the base and the adapter; in the second, three of four answers of the base count as right."""
    pytest.importorskip("lm_eval")

    def stage(params, arm, seed):
        if not harness.TASK_FILES.exists():
            said = by_hand(source())[1]
            write_tasks(harness.TASK_FILES, [text if at % 4 else "never" for at, text in enumerate(said)])
        for task in TASKS:
            harness.run(changed(raw), arm, seed, task)

    return make_project({**raw, "evaluate": {**raw["evaluate"], "harness": []}}, stage)


def source():
    return json.loads(Path("models/base/base.json").read_text())["location"]


def lines(task, arm="baseline_lora"):
    return [
        json.loads(line) for line in Path(f"measured/lm-eval/{task}/{arm}/0/samples.jsonl").read_text().splitlines()
    ]


def content(task, arm="baseline_lora"):
    return json.loads(Path(f"measured/lm-eval/{task}/{arm}/0/harness.json").read_text())


@pytest.mark.full
@pytest.mark.parametrize("arm", ["base", "baseline_lora"])
def test_items_equal_those_of_transformers_and_peft(here, arm):
    chosen, said = by_hand(source(), None if arm == "base" else f"adapters/{arm}/0")
    choices, answers = lines("own_choice", arm), lines("own_answer", arm)
    assert [row["answer"] for row in choices] == chosen
    assert [row["answer"].strip() for row in answers] == [text.strip() for text in said]
    right = [row["choices"][1] for row in SUMS]
    assert [row["truth"] for row in choices] == right
    assert [row["credit"] for row in choices] == [float(a == b) for a, b in zip(chosen, right, strict=True)]
    wanted = [float(row["truth"] == text) for row, text in zip(answers, said, strict=True)]
    assert [row["credit"] for row in answers] == wanted and (arm != "base" or sum(wanted) == len(SUMS) * 3 / 4)
    assert choices[0]["prompt"] == ASKED.replace("{{question}}", SUMS[0]["question"])
    for task, found, metric in (("own_choice", choices, "acc"), ("own_answer", answers, "exact_match")):
        told = content(task, arm)
        assert told["tasks"] == {task: {"version": "Yaml", "shots": 0, "items": len(SUMS), "metric": metric}}
        figure = next(row for row in told["metrics"] if row["name"] == metric)
        assert figure["value"] == pytest.approx(sum(row["credit"] for row in found) / len(SUMS)), "lm-eval's own mean"
        assert (figure["split"], figure["n"]) == (f"harness/{task}", len(SUMS))
        assert told["metric_defs"][metric]["unit"] == "share"
    assert [row["item_id"] for row in choices] == [row["item_id"] for row in lines("own_choice", "base")]


@pytest.mark.full
def test_groups_filters_and_metrics_that_are_not_fractions(here, raw):
    own = {
        "group": {"group": "own_all", "task": ["own_choice", "own_filtered"],
                  "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]},
        "filtered": {**TASKS["own_answer"], "task": "own_filtered", "doc_to_target": "{{choices[1]}}", "filter_list": [
            {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
            for name, pattern in (("digits", "([0-9]+)"), ("words", "([a-z]+)"))]},
        "texts": {**DATA, "task": "own_texts", "output_type": "loglikelihood_rolling", "doc_to_text": "",
                  "doc_to_target": "{{question}}", "metric_list": [{"metric": "word_perplexity"}]},
    }  # fmt: skip
    for name, content_of in own.items():
        (harness.TASK_FILES / f"{name}.yaml").write_text(yaml.safe_dump(content_of))
    for task in ("own_all", "own_texts"):
        harness.run(changed(raw), "base", 0, task)
    told, items = content("own_all", "base"), lines("own_all", "base")
    assert {name: task["metric"] for name, task in told["tasks"].items()} == {
        "own_choice": "acc", "own_filtered": "exact_match/digits"}  # fmt: skip
    assert {row["split"] for row in items} == {"harness/own_all"} and len(items) == 2 * len(SUMS)
    assert [row["credit"] for row in items if row["task"] == "own_choice"] == [
        row["credit"] for row in lines("own_choice", "base")
    ]
    figures = {(row["split"], row["name"]): row["value"] for row in told["metrics"]}
    assert figures["harness/own_all", "acc"] == figures["harness/own_choice", "acc"]
    assert ("harness/own_filtered", "exact_match/words") in figures
    texts = content("own_texts", "base")
    assert lines("own_texts", "base") == [] and texts["tasks"]["own_texts"]["metric"] is None
    assert texts["metrics"][0]["value"] > 1
    assert (texts["metric_defs"]["word_perplexity"]["unit"], texts["metric_defs"]["word_perplexity"]["direction"]) == (
        "", "lower")  # fmt: skip


@pytest.mark.full
def test_a_limit_and_benchmarks_that_cannot_run(here, raw, capsys):
    (harness.TASK_FILES / "unsafe.yaml").write_text(
        yaml.safe_dump({**TASKS["own_choice"], "task": "own_code", "unsafe_code": True})
    )
    with pytest.raises(EvaluationError, match="own_code would run code that a model writes"):
        harness.run(changed(raw), "base", 0, "own_code")
    harness.run(changed(raw, harness_limit=5), "base", 0, "own_choice")
    assert len(lines("own_choice", "base")) == 5
    file = harness.TASK_FILES / "own_answer.yaml"
    file.write_text(file.read_text().replace("max_gen_toks: 8", "max_gen_toks: 256"))
    before = lines("own_answer")
    with pytest.raises(SystemExit), clear_errors("harness"):
        harness.run(changed(raw), "baseline_lora", 0, "own_answer")
    assert "Invalid configuration: requested max tokens" in capsys.readouterr().err
    (harness.TASK_FILES / "sums.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"own_answer: the task or its data set json cannot be loaded"):
        harness.run(changed(raw), "baseline_lora", 0, "own_answer")
    assert lines("own_answer") == before, "earlier results stay"


@pytest.mark.full
def test_a_missing_hub_data_set_is_named(work, monkeypatch):
    pytest.importorskip("lm_eval")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EvaluationError, match="own_far: the hub did not give the data set org/far .*HF_HUB_OFFLINE"):
        (harness.TASK_FILES / "far.yaml").write_text(
            yaml.safe_dump({"task": "own_far", **TASKS["own_choice"], "dataset_path": "org/far", "dataset_kwargs": {}})
        )
        lm_harness.ask(None, None, "own_far", harness.TASK_FILES, limit=None, batch_size=1)
