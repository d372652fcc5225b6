"""A trained arm as a folder to give away: adapter, GGUF files, Modelfile, model card."""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from db.errors import FileError, OutputError
from db.files import read_json, read_record, sha256, staged
from db.records import RunRecord
from export import ExportError, gguf
from export.served import ADAPTER_GGUF, BASE, MODELFILE, SERVED_GGUF, Served, find_served, read_references
from trainers.settings import BaseReference
from trainers.words import suggest

# What the stages make, and what is made here.
ADAPTERS, GGUF, DATA, CARDS, PACKAGES = map(Path, ("adapters", "gguf", "data", "outputs/cards", "packages"))
EMBEDDED = Path("models/base")
CONFIG, WEIGHTS, TRAIN = "adapter_config.json", "adapter_model.safetensors", "data/train.jsonl"
TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")
"""Its files, as transformers names them."""


def package(arm: str, seed: int | None = None, *, merged: bool = False) -> Path:
    """Make the arm's folder below packages/, which holds no link, no absolute path and no pickle; return it.

    Raises ExportError or FileError: the arm is not trained, exported or scored, or one of these is of another adapter.
    """
    served = _find(arm, seed)
    adapter = ADAPTERS / arm / str(served.seed)
    trained = read_record(adapter / "run.json", RunRecord)
    base = BaseReference(**trained.extra["base"])
    results = _results(served, sha256(adapter / WEIGHTS))
    license = _named(served.serving.license) if served.serving.license else _of_base(base)
    out = PACKAGES / (arm if seed is None else f"{arm}-{seed}")
    with staged(out) as folder:
        shutil.copyfile(adapter / WEIGHTS, folder / WEIGHTS)
        here = {"base_model_name_or_path": _base_name(base), "revision": base.revision}
        config = json.dumps({**gguf.adapter_config(adapter), **here}, indent=2)
        (folder / CONFIG).write_text(config + "\n", encoding="utf-8")
        exported = [served.folder / name for name in (SERVED_GGUF, ADAPTER_GGUF, MODELFILE)]
        for file in (*exported, *(file for pattern in TOKENIZER for file in adapter.glob(pattern))):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        if Path(base.location) == EMBEDDED:
            (folder / BASE).mkdir()
            for file in sorted(EMBEDDED.iterdir()):
                if file.name not in ("base.json", "run.json"):
                    shutil.copyfile(file, folder / BASE / file.name)
        if merged:
            gguf.save_merged(base.merge_from, adapter, folder / "merged", dict(base.merge_kwargs))
        if license.text:
            (folder / "LICENSE").write_text(f"{license.text.rstrip()}\n", encoding="utf-8")
        card = _card(served, trained, base, results, license, merged=merged)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out


def _find(arm: str, seed: int | None) -> Served:
    """The arm's exported model, of the seed that has its name in Ollama alone where none is asked for."""
    models = [served for served in find_served(GGUF) if served.arm != BASE]
    by_seed = {served.seed: served for served in models if served.arm == arm}
    if not by_seed:
        arms = dict.fromkeys(served.arm for served in models)
        raise ExportError(f"expected an exported arm, got {arm!r}{suggest(arm, arms)}; `dvc repro export` makes more")
    chosen = next((n for n, served in by_seed.items() if ":" not in served.name), None) if seed is None else seed
    if chosen not in by_seed:
        raise ExportError(f"expected a seed of {arm} in {GGUF}/, {', '.join(map(str, by_seed))}, got {chosen}; "
                          "name one with --seed, or run `dvc repro export`")  # fmt: skip
    return by_seed[chosen]


def _results(served: Served, adapter: str) -> Any:
    """The ModelCard that stage compare wrote; it and the GGUF files must be of the adapter with this sha256."""
    from huggingface_hub import ModelCard

    artifacts = read_record(served.folder / "run.json", RunRecord).artifacts
    if {file.parent_sha256 for file in artifacts if file.path.endswith(".gguf")} != {adapter}:
        raise ExportError(f"{served.folder}: is of another adapter than {ADAPTERS} has now; run `dvc repro export`")
    file = CARDS / f"{served.arm}.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if adapter not in text:
        got = f"those of another one than {ADAPTERS} has now" if text else "none"
        raise ExportError(f"{file}: expected results of {served.arm} seed {served.seed}, found {got}; run `dvc repro`")
    return ModelCard(text)


def _is_folder(base: BaseReference) -> bool:
    return Path(base.location).expanduser().is_dir()


def _base_name(base: BaseReference) -> str:
    """The hub's id, or the folder that a stranger has or puts in the package."""
    return BASE if _is_folder(base) else base.location


# --- the license ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class License:
    """What LICENSE holds, if anything; what the hub reads of it; a sentence for people."""

    text: str | None
    front: dict[str, str]
    sentence: str


def _named(text: str) -> License:
    """A text of one word is a license's name, which the hub may know; of every other the hub gets a name and a file."""
    name = re.sub(r"[^a-z0-9.]+", "-", text.strip().lower().partition("\n")[0])[:60].strip("-") or "custom"
    if len(text.split()) == 1:
        return License(text, {"license": name}, "License: see LICENSE.")
    return License(text, {"license": "other", "license_name": name, "license_link": "LICENSE"}, "License: see LICENSE.")


def _of_base(base: BaseReference) -> License:
    """The base's own, by its file and by its model card, as far as they are there or can be downloaded."""
    from huggingface_hub import ModelCard
    from transformers.utils import cached_file

    files = {
        name: cached_file(
            base.location,
            name,
            revision=base.revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        for name in ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md")
    }
    card = files.pop("README.md")
    text = next((Path(file).read_text(encoding="utf-8") for file in files.values() if file), None)
    try:
        facts = ModelCard.load(card).data.to_dict() if card else {}
    except (OSError, ValueError, yaml.YAMLError):  # none that the hub could read
        facts = {}
    front = {key: str(facts[key]) for key in ("license", "license_name", "license_link") if facts.get(key)}
    if "://" not in front.get("license_link", "://") and text is None:  # a file of the base's repository
        front["license_link"] = f"https://huggingface.co/{base.location}/blob/main/{front['license_link']}"
    if text:
        front = front if "license" in front else _named(text).front
        return License(text, front, "License: that of the base, see LICENSE.")
    if "license" in front:
        label = front.get("license_name", front["license"])
        return License(None, front, f"License: that of the base, {_code(label)}.")
    return License(
        None,
        {},
        "No license is known: none was named in export.license, and the base brings none. Ask who made the base before "
        "you give this away.",
    )


# --- the card ---------------------------------------------------------------------------------------------------------


def _card(
    served: Served, trained: RunRecord, base: BaseReference, results: Any, license: License, *, merged: bool
) -> str:
    from huggingface_hub import ModelCardData

    source, data = _data(trained)
    scores = [one for one in results.data.eval_results or () if (one.metric_args or {}).get("seed") == served.seed]
    front = ModelCardData(
        model_name=served.name if scores else None,
        eval_results=scores or None,
        base_model=None if _is_folder(base) else base.location,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "gguf", "ollama", *(["grit"] if "grit" in trained.params["train"] else [])],
        license=license.front.get("license"),
        license_name=license.front.get("license_name"),
        license_link=license.front.get("license_link"),
        datasets=[source.removeprefix("hub:").partition("@")[0]] if source.startswith("hub:") else None,
    )
    paper = "[GRIT](https://arxiv.org/abs/2601.00231), " if "grit" in trained.params["train"] else ""
    commit = f", commit {trained.git.commit}" if trained.git.commit else ""
    parts = [
        f"# {served.name}",
        f"An adapter, arm {_code(served.arm)}, seed {served.seed}. Base: {_base(base)}. Made with {paper}transformers "
        f"{trained.packages.get('transformers')} and PEFT {trained.packages.get('peft')}{commit}.",
        data,
        license.sentence,
        results.text.strip(),
        "## Files",
        "\n".join(f"- {line}" for line in _files(served, base, merged=merged)),
        "## How to run",
        *_usage(served, base),
    ]
    return f"---\n{front.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _code(text: str) -> str:
    """A name as it is, whatever Markdown would make of it."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _base(base: BaseReference) -> str:
    if Path(base.location) == EMBEDDED:
        file = EMBEDDED / "base.json"
        unpacked = read_json(file).get("gguf") if file.is_file() else None
        what = f"{_code(unpacked['file'])}, dequantized" if unpacked else "a small Llama trained from scratch"
        return f"{what}, in {_code(f'{BASE}/')}"
    if _is_folder(base):
        return f"{_code(Path(base.location).name)}, a folder that is not on the hub; put it here as {_code(f'{BASE}/')}"
    return _code(base.location) + (f", revision {base.revision}" if base.revision else "")


def _data(trained: RunRecord) -> tuple[str, str]:
    """(source, a sentence about it)."""
    if trained.extra.get("trained") == "elsewhere":
        return "", "Another trainer made it; what it was trained on is not known here."
    data_run = read_record(DATA / "run.json", RunRecord)
    if trained.inputs.get(TRAIN) not in [file.sha256 for file in data_run.artifacts if file.path == TRAIN]:
        raise ExportError(f"{DATA}/: is not what the adapter was trained on; run `dvc repro`")
    source = str(data_run.extra.get("source", ""))
    source_name = source if source.startswith("hub:") else Path(source).name
    words = "drawn at random from a rule" if source == "generated" else f"from {_code(source_name)}"
    task, count = _code(str(data_run.extra["task"])), data_run.extra["items"]["train"]
    return source, f"Data: {count:,} training items of task {task}, {words} (sha256 {trained.inputs[TRAIN]})."


def _files(served: Served, base: BaseReference, *, merged: bool) -> list[str]:
    precision = served.serving.quantization
    lines = [
        f"{_code(WEIGHTS)}, {_code(CONFIG)} and the tokenizer: for PEFT",
        f"{_code(SERVED_GGUF)}: base and adapter in one, {precision}, for llama.cpp and Ollama; {_code(MODELFILE)}: "
        "how Ollama asks it",
    ]
    if (served.folder / ADAPTER_GGUF).is_file():
        lines.append(f"{_code(ADAPTER_GGUF)}: the adapter alone, for `--lora` of llama.cpp beside a GGUF of the base")
    if Path(base.location) == EMBEDDED:
        lines.append(f"{_code(f'{BASE}/')}: the base")
    return lines + (["`merged/`: base and adapter in one, for transformers"] if merged else [])


def _usage(served: Served, base: BaseReference) -> list[str]:
    """Each way with a question, and the answer that it gives."""
    serving, asked = served.serving, read_references(served.folder, 1)[0]
    trust = ", trust_remote_code=True" if base.trust_remote_code else ""
    return [
        "Run this in the folder. Every question goes into the template that training had:",
        f'```python\nprompt = {serving.template!r}.replace(\n    "{{prompt}}", {asked.prompt!r}\n)\n```',
        "PEFT (`pip install peft`):",
        f"""```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("."{trust})
model = AutoPeftModelForCausalLM.from_pretrained("."{trust})
ids = tokenizer(prompt, return_tensors="pt")
said = model.generate(
    **ids, max_new_tokens={asked.max_tokens}, do_sample=False, stop_strings={serving.stop!r}, tokenizer=tokenizer
)
print(tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
# {asked.answer!r}
```""",
        "llama.cpp (`pip install llama-cpp-python`):",
        f"""```python
from llama_cpp import Llama

model = Llama("{SERVED_GGUF}", n_ctx={serving.num_ctx}, verbose=False)
said = model(prompt, max_tokens={asked.max_tokens}, temperature=0, stop={serving.stop!r})
print(said["choices"][0]["text"])
```""",
        "Ollama, which needs no template from you:",
        f"```\nollama create {served.name} -f {MODELFILE}\nollama run {served.name}\n```",
    ]


# --- the command ------------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    arm: Annotated[str, typer.Argument(help="baseline_lora, pure_grit, …")],
    seed: Annotated[int | None, typer.Option(help="of the training run", show_default="the one that is served")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="also the merged model, for transformers")] = False,
) -> None:
    try:
        folder = package(arm, seed, merged=merged)
    except (ExportError, FileError, OutputError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB; to give it away: hf upload NAME {folder}")


if __name__ == "__main__":
    app()
