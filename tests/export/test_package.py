"""A package holds all that a stranger needs, and is refused where its parts are not of one run."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from typer.testing import CliRunner

from db.files import sha256
from export.engines.ollama_engine import OllamaEngine, connect
from export.package import app, package
from export.served import read_references
from tests.db.result_tree import edit, run_json, write
from tests.export.verify_runs import edit as edit_serving

ARM = "pure_grit"


@pytest.fixture
def project(tree, base_dir, adapter_dir, own_records):
    """What the stages leave, as far as a package takes from it; the working directory."""
    shutil.copytree(base_dir, "models/base")
    shutil.copytree(adapter_dir, f"adapters/{ARM}/0")
    mark = sha256(Path(f"adapters/{ARM}/0/adapter_model.safetensors"))
    data = {"kind": "dataset", "path": "data/train.jsonl", "sha256": "1" * 64, "bytes": 1, "parent": None}
    gguf = {**data, "kind": "merged_gguf", "path": f"gguf/{ARM}/0/model.gguf", "parent": mark}
    said = {"task": "aqi", "source": "hub:org/air@main", "items": {"train": 64}}
    write(Path("data/run.json"), run_json("prepare_data", None, None, artifacts=[data], extra=said))
    trained = {"params": {"train": {"grit": {}}}, "inputs": {"data/train.jsonl": "1" * 64}}
    base = {"base": {"location": "models/base"}}
    write(Path(f"adapters/{ARM}/0/run.json"), run_json("train", ARM, 0, **trained, extra=base))
    write(Path(f"gguf/{ARM}/0/run.json"), run_json("export", ARM, 0, artifacts=[gguf]))
    scores = [
        EvalResult("text-generation", "aqi", "aqi", "accuracy", value, metric_args={"seed": seed})
        for seed, value in enumerate((0.7, 0.8))
    ]
    front = ModelCardData(model_name=ARM, eval_results=scores).to_yaml()
    write(Path(f"outputs/cards/{ARM}.md"), f"---\n{front}\n---\n\n## Results\n\n| 0 | 74.3 | {mark} |\n")
    return Path()


def test_it_answers_as_trained_far_from_where_it_was_made(project, server, base_dir, tmp_path_factory, monkeypatch):
    first = {file: sha256(file) for file in package(ARM, merged=True).rglob("*") if file.is_file()}
    made = package(ARM, merged=True)
    assert {file: sha256(file) for file in made.rglob("*") if file.is_file()} == first
    asked = read_references(Path(f"gguf/{ARM}/0"))[0]
    away = tmp_path_factory.mktemp("away") / "package"
    shutil.move(made, away)
    for folder in ("models", "adapters", "gguf"):
        shutil.rmtree(folder)
    monkeypatch.chdir(away)
    files = [path for path in away.rglob("*") if path.is_file()]
    assert not any(path.is_symlink() for path in away.rglob("*"))
    assert not {path.suffix for path in files} & {".bin", ".pt", ".pth", ".pkl"}
    assert {"base/model.safetensors", "merged/model.safetensors"} <= {str(path.relative_to(away)) for path in files}
    told = [path for path in files if path.name != "tokenizer.model"]  # which says where the fixture trained it
    assert not [path for path in told if str(base_dir.parent).encode() in path.read_bytes()]

    prompt, *ways = re.findall("```python\n(.*?)```", (away / "README.md").read_text(), re.DOTALL)
    for way in ways:  # PEFT, llama.cpp
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(prompt + way, {})
        assert said.getvalue() == f"{asked.answer}\n", way
    name = f"{server.prefix}-given"
    create(server.url, name, away / "Modelfile")
    with OllamaEngine(server.url, name, 256) as engine:
        assert engine.generate(asked.asked, asked.max_tokens).text == asked.answer


def create(url, name, modelfile):
    """`ollama create NAME -f Modelfile`, as the command reads the file."""
    line = re.compile(r'^(FROM|TEMPLATE|PARAMETER \w+) (?:"""(.*?)"""|"(.*?)"|(\S+))$', re.MULTILINE | re.DOTALL)
    said = {name: long or short or bare for name, long, short, bare in line.findall(modelfile.read_text())}
    assert said["FROM"] == "./model.gguf"
    parameters = {name.split()[1]: value for name, value in said.items() if name.startswith("PARAMETER")}
    numbers = {name: value if name == "stop" else json.loads(value) for name, value in parameters.items()}
    with connect(url, 60) as client:
        blob = client.create_blob(modelfile.parent / said["FROM"])
        files = {"model.gguf": blob}
        list(client.create(name, files=files, template=said["TEMPLATE"], parameters=numbers, stream=True))


def test_the_card_tells_the_hub_base_data_and_licence(project):
    told = ModelCard.load(package(ARM) / "README.md").data
    assert [(one.metric_args, one.metric_value) for one in told.eval_results] == [({"seed": 0}, 0.7)]
    assert {key: value for key, value in told.to_dict().items() if key != "model-index"} == {
        "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "gguf", "ollama", "grit"],
        "datasets": ["org/air"],
    }  # fmt: skip
    edit(Path(f"adapters/{ARM}/0/run.json"), extra={"base": {"location": "org/llama", "revision": "abc"}})
    for text, said in (
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("Air Licence 1.0\nDo as you like.",
         {"license": "other", "license_name": "air-licence-1.0", "license_link": "LICENSE"}),
    ):  # fmt: skip
        edit_serving(Path(f"gguf/{ARM}/0"), license=text)
        made = package(ARM, 0)
        assert made.name == f"{ARM}-0" and (made / "LICENSE").read_text() == f"{text}\n"
        told = ModelCard.load(made / "README.md").data.to_dict()
        assert told.items() >= {"base_model": "org/llama", **said}.items()
        config = json.loads((made / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("org/llama", "abc")


@pytest.mark.parametrize(
    ("file", "text", "front", "said"),
    [
        (
            "README.md",
            "---\nlicense: llama3\n---\n# Base",
            {"license": "llama3"},
            "License: that of the base, `llama3`.",
        ),
        ("LICENSE.txt", "MIT", {"license": "mit"}, "License: that of the base, see LICENSE."),
        ("README.md", "---\n: [\n---\n", {}, "No license is known: none was named in export.license"),
    ],
)
def test_without_a_licence_of_its_own_it_has_the_base_s(project, file, text, front, said):
    Path("models/base", file).write_text(text)
    made = package(ARM)
    card = ModelCard.load(made / "README.md")
    assert {key: value for key, value in card.data.to_dict().items() if "license" in key} == front
    assert said in card.text and (made / "LICENSE").is_file() is ("see LICENSE" in said)


@pytest.mark.parametrize(
    ("spoil", "arguments", "said"),
    [
        (None, ["pure_grid"], "did you mean 'pure_grit'? Available: pure_grit; `dvc repro export` makes more"),
        (None, [ARM, "--seed", "3"], "expected a seed of pure_grit in gguf/, 0, got 3; "),
        ("gguf", [ARM], "found none; run `dvc repro export`"),
        (f"adapters/{ARM}/0/run.json", [ARM], "no such file; run `dvc repro`"),
        ("outputs/cards", [ARM], "expected results of pure_grit seed 0, found none; run `dvc repro`"),
        (f"adapters/{ARM}/0/adapter_model.safetensors", [ARM], "is of another adapter than adapters has now; run"),
        ("data/run.json", [ARM], "data/run.json: no such file; run `dvc repro`"),
    ],
)
def test_what_is_missing_or_of_another_run_is_refused(project, spoil, arguments, said):
    if spoil and spoil.endswith("safetensors"):
        Path(spoil).write_bytes(b"trained again")
    elif spoil:
        shutil.rmtree(spoil) if Path(spoil).is_dir() else Path(spoil).unlink()
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1 and said in done.output, done.output
    assert not list(Path().glob("packages/*"))
