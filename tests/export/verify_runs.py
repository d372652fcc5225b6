"""What the tests of verification share: engines, models, and ways to spoil what was exported."""

import json
from contextlib import contextmanager
from dataclasses import replace

from gguf import GGUFReader

from export.llama_engine import LlamaCpp
from export.ollama_engine import OllamaServer
from export.serving import REFERENCE, find_served
from export.verify import read_references
from tests.ollama_double import OllamaDouble

ARM = "pure_grit_model"


@contextmanager
def opened(kind):
    """(backend, double or None)."""
    if kind == "llama_cpp":
        yield LlamaCpp(), None
        return
    with OllamaDouble() as double:
        yield OllamaServer(double.url), double


def model(tree, name=ARM):
    return find_served(tree, names=[name])[0]


def patch(file, field, value):
    """Overwrites one number or flag in a GGUF."""
    reader = GGUFReader(file, "r+")
    found = reader.get_field(field)
    found.parts[found.data[0]][0] = value
    reader.data.flush()


def rewrite(folder, **changes):
    """Changes every reference."""
    rows = [json.loads(line) for line in (folder / REFERENCE).read_text().splitlines()]
    rows = [{**row, **{key: change(row) for key, change in changes.items()}} for row in rows]
    (folder / REFERENCE).write_text("".join(json.dumps(row) + "\n" for row in rows))


def answers(served, scale=1.0, tokens=None):
    """What llama.cpp says, prompt → text."""
    with LlamaCpp().open(served, scale) as engine:
        asked = [r if tokens is None else replace(r, max_tokens=tokens) for r in read_references(served.folder)]
        return {r.prompt: engine.ask(r).text for r in asked}


def one(rows):
    assert len(rows) == 1
    return rows[0]


def longer(served, tokens):
    """Lets the references go on for more tokens, as Hugging Face does: llama.cpp's answers are equal."""
    long = answers(served, tokens=tokens)
    rewrite(served.folder, answer=lambda row: long[row["prompt"]], max_tokens=lambda row: tokens)
    return long
