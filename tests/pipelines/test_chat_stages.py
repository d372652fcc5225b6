"""Every format of rows, from the file to the scores, with a real base, llama.cpp and one short training."""

import copy
import csv
import json

import pytest

from db.files import read_jsonl
from evaluation.tasks import Item
from export.engines.engine import asked_for
from export.engines.llama_cpp import LlamaCppEngine
from export.modelfile import Serving
from pipelines import base_texts, evaluate, export, measure, prepare_base, prepare_data, train
from pipelines.check import parse_params
from trainers.encode import encode_turns
from trainers.models import load_tokenizer
from trainers.settings import BaseReference

pytestmark = pytest.mark.full
WORDS = ("apple", "lake", "river", "lamp", "stone", "bird")


def turns(n):
    first, second = WORDS[n % 6], WORDS[n // 6 % 6]
    prompts = [(f"No. {n}: remember {first} {second}.", "Yes."), ("In reverse order?", f"{second} {first}")]
    return prompts[: 1 + n % 3]


def messages(n, role="role", content="content", names=("user", "assistant")):
    output = [text for turn in turns(n) for text in turn]
    said = [{role: names[at % 2], content: text} for at, text in enumerate(output)]
    if len(said) > 2 and n % 4 == 1:
        said[1]["weight"] = 0
    return said


def lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_csv(file, rows):
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def as_parquet(file, rows):
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(file)


def as_json(file, rows):
    file.write_text(json.dumps(rows))


SYSTEM = {"role": "system", "content": "Be brief."}
FORMS = {
    "messages.jsonl": (lines, lambda n: {"messages": [SYSTEM, *messages(n)] if n % 2 else messages(n)}),
    "sharegpt.parquet": (as_parquet, lambda n: {"conversations": messages(n, "from", "value", ("human", "gpt"))}),
    "alpaca.csv": (as_csv, lambda n: {"instruction": turns(n)[0][0], "input": "", "output": f"{n} it is"}),
    "pairs.json": (as_json, lambda n: {"prompt": f" {turns(n)[0][0]} ", "completion": f"    {n} it is\n"}),
    "text.jsonl": (
        lines,
        lambda n: {"text": f"{' ' * (n % 3)}The {WORDS[n % 6]} no. {n} is near the {WORDS[n // 6 % 6]}. It is old."},
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_of_every_format_is_trained_exported_and_scored(name, smoke_raw, tmp_path, monkeypatch, base_dir):
    monkeypatch.chdir(tmp_path)
    write, row = FORMS[name]
    (tmp_path / "inputs").mkdir()
    write(tmp_path / "inputs" / name, [row(n) for n in range(60)])
    raw = copy.deepcopy(smoke_raw)
    raw["prepare_data"] |= {"task": "chat", "source": f"inputs/{name}", "test_items": 16, "paraphrased_items": 4}
    raw["train"] |= {"max_steps": 6, "packing": name == "messages.jsonl"}
    raw["arms"]["hybrid_grit"]["packing"] = False
    raw["evaluate"]["backend"] = "llama_cpp"
    params = parse_params(raw)
    for stage in (prepare_data, prepare_base, base_texts):
        stage.run(params)
    train.run(params, "baseline_lora", 0)
    for stage in (export, measure, evaluate):
        for arm in ("base", "baseline_lora"):
            stage.run(params, arm, 0)
    out = tmp_path / "gguf/baseline_lora/0"
    assert {row["counted"] for row in json.loads((out / "parity.json").read_text())["rows"]} == {1.0}
    items = [Item.from_json(row) for row in read_jsonl(tmp_path / "data/test.jsonl")]
    several = any(item.turns for item in items)
    assert several is (name in ("messages.jsonl", "sharegpt.parquet"))
    serving = Serving.read(out / "serving.json")
    assert serving.converses is several
    # The served model is shown the tokens that an item of these turns was trained with.
    tokenizer = load_tokenizer(BaseReference(str(base_dir)))
    samples = {row["item_id"]: row for row in read_jsonl(tmp_path / "scores/baseline_lora/0/samples.jsonl")}
    with LlamaCppEngine(out / "model.gguf", serving.render, num_ctx=serving.num_ctx) as engine:
        for item, parts in zip(items, train.examples("test", params.prompt.template), strict=True):
            ids, ends = encode_turns(tokenizer, parts)
            prompts = engine.tokenize(engine.render(asked_for(item)))
            assert samples[item.id]["prompt_tokens"] == len(prompts)
            assert prompts == ids[: len(prompts)] and (item.whole or len(prompts) == ends[-2])
            if item.turns:
                assert samples[item.id]["prompt"].endswith(f"\n\nAssistant: Yes.\n\nUser: {item.prompt}")
    measured = json.loads((tmp_path / "measured/baseline_lora/0/measured.json").read_text())
    values = {row["name"]: row["value"] for row in measured["metrics"] if row["split"] == "test_answers"}
    assert values["answer_perplexity"] > 1
