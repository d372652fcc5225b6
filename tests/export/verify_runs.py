"""What the tests share: engines, models, adapters, and ways to spoil what was exported."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from export.diagnosis import ask
from export.engines.llama_cpp import open_in_process
from export.ollama import app
from export.register import open_on_server
from export.served import REFERENCE, find_served, read_references
from tests.ollama_double import OllamaDouble

ARM = "pure_grit_model"
LATEST = f"{ARM}:latest"


def run(*arguments):
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(a) for a in arguments])


@contextmanager
def opened(kind):
    """(what opens a model, double or None)."""
    if kind == "llama_cpp":
        yield open_in_process, None
        return
    with OllamaDouble() as double:
        yield partial(open_on_server, double.url), double


def model(tree, name=ARM):
    return find_served(tree, names=[name])[0]


def edit(folder, **changes):
    """None takes a key away."""
    file = folder / "serving.json"
    facts = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in facts.items() if v is not None}))


def substitute(folder, old, new):
    file = folder / "serving.json"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def patch(file, field, value):
    reader = GGUFReader(file, "r+")
    found = reader.get_field(field)
    found.parts[found.data[0]][0] = value
    reader.data.flush()


def rewrite(folder, **changes):
    rows = [json.loads(line) for line in (folder / REFERENCE).read_text().splitlines()]
    rows = [{**row, **{key: change(row) for key, change in changes.items()}} for row in rows]
    (folder / REFERENCE).write_text("".join(json.dumps(row) + "\n" for row in rows))


def answers(served, scale=1.0, tokens=None):
    with open_in_process(served, scale) as engine:
        asked = [r if tokens is None else replace(r, max_tokens=tokens) for r in read_references(served.folder)]
        return {r.rendered: ask(engine, r).text for r in asked}


def one(rows, form="plain"):
    [row] = [row for row in rows if row.form == form]
    return row


def longer(served, tokens):
    """Lets the references go on for more tokens, as Hugging Face does: llama.cpp's answers are equal."""
    long = answers(served, tokens=tokens)
    rewrite(served.folder, answer=lambda row: long[row["rendered"]], max_tokens=lambda row: tokens)


def without_prefix(source, out):
    """A copy of a tokenizer's (or model's) folder that puts no blank in front of a text, as Gemma's and newer ones."""
    shutil.copytree(source, out)
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["prepend_scheme"] = "never"
    tokenizer["decoder"]["decoders"] = tokenizer["decoder"]["decoders"][:-1]  # which strips that blank
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    old = json.loads((out / "tokenizer_config.json").read_text())
    # LlamaTokenizer would build the blank anew.
    new = {**old, "tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False}
    (out / "tokenizer_config.json").write_text(json.dumps(new))
    return out


def add_adapter(base, out, kind=AutoModelForCausalLM, **settings):
    """A random one, with B ≠ 0."""
    torch.manual_seed(1)
    model = kind.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, **{"lora_alpha": 8, "target_modules": "all-linear", **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(out)
    return out


def logits_apart(hf, engine, prompts):
    """Largest difference of the logits after each rendered prompt, of equal ids, in one go, and after each token of it,
    one by one; both engines are closed."""
    worst = 0.0
    with hf, engine:
        for prompt in prompts:
            ids = hf.tokenize(prompt)
            assert engine.tokenize(prompt) == ids
            with torch.inference_mode():
                rows = hf._model(input_ids=torch.tensor([ids])).logits[0].float().numpy()
            engine.prefill(ids)
            apart = [np.abs(engine.logits() - rows[-1]).max()]
            engine.prefill(ids[:1])
            for token, expected in zip([*ids[1:], None], rows, strict=True):
                apart.append(np.abs(engine.logits() - expected).max())
                if token is not None:
                    engine.feed(token)
            worst = max(worst, float(max(apart)))
    return worst
