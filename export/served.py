"""What the export stage left to be served: one entry a model, in either of two modes."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from export import ExportError
from export.engines.engine import Asked, LocalEngine, Message, conversation, fill
from export.modelfile import Serving

BASE = "base"
FACTS = "serving.json"
REFERENCE = "reference.jsonl"
"""Hugging Face's own tokens and greedy answers, beside each GGUF."""
PARITY = "parity.json"
"""What the export stage found when it compared the files with Hugging Face."""
SERVED_GGUF, F16_GGUF, ADAPTER_GGUF = "model.gguf", "model-f16.gguf", "adapter.gguf"
MODELFILE, ADAPTER_MODELFILE = "Modelfile", "Modelfile.adapter"
Mode = Literal["merged", "adapter"]
MODES: tuple[Mode, ...] = ("merged", "adapter")
Form = Literal["plain", "newline", "second", "rendered"]
"""How people ask: as in training, with the newline that a pipe adds, as the second question of a conversation; and the
rendered text itself."""


@dataclass(frozen=True)
class Served:
    name: str  # in Ollama; seeds after the first are tags of the same name
    arm: str
    seed: int
    folder: Path
    gguf: Path  # the merged model, or the base
    adapter: Path | None  # on that base
    serving: Serving

    @property
    def mode(self) -> Mode:
        """One file ("merged"), as the base always is, or the base's file and a small adapter ("adapter")."""
        return "adapter" if self.adapter else "merged"

    def adapter_form(self) -> "Served | None":
        """The same model as base and adapter; None for the base, and for what can only be served merged.

        Raises ExportError: the base is not exported.
        """
        adapter = self.folder / ADAPTER_GGUF
        if self.arm == BASE or not adapter.is_file():
            return None
        return replace(self, gguf=base_file(self.folder.parents[1]), adapter=adapter)


def modelfile_text(serving: Serving, folder: Path, base: Path | None = None) -> str:
    """Modelfile in `folder`: of the merged model, or of an adapter on the GGUF `base`.

    Paths in it are relative to the folder, so that `ollama create NAME -f FILE` works from any working directory.
    """
    if base is None:
        return serving.modelfile(f"./{SERVED_GGUF}")
    return serving.modelfile(os.path.relpath(base, folder), f"./{ADAPTER_GGUF}")


def served_in(folder: Path, name: str | None = None) -> Served:
    """One model, by its folder <root>/<arm>/<seed>; `name` in place of the one in serving.json.

    Raises ExportError: nothing is exported there, serving.json is damaged, or a file is missing.
    """
    serving, arm = Serving.read(folder / FACTS), folder.parent.name
    name = name or serving.model_name or f"{arm}_model"
    served = Served(name, arm, int(folder.name), folder, folder / SERVED_GGUF, None, serving)
    if not served.gguf.is_file():
        raise ExportError(f"{served.gguf}: expected a GGUF file, found none; run `dvc repro export`")
    return served


def find_served(root: Path, mode: Mode = "merged", names: list[str] | None = None) -> list[Served]:
    """Everything in <root>/<arm>/<seed>/, base first; with `names` only these models.

    Raises ExportError: nothing is exported there, a name is not among it or in two places, see `served_in`, or mode
    adapter is asked of what can only be served merged.
    """
    # A seed is a plain number; "0.123.partial" is what a killed export left.
    folders = [place.parent for place in root.glob(f"*/*/{FACTS}") if re.fullmatch("[0-9]+", place.parent.name)]
    folders.sort(key=lambda f: (f.parent.name != BASE, f.parent.name, int(f.name)))
    if not folders:
        raise ExportError(f"expected exported models in {root}/<arm>/<seed>/, found none; run `dvc repro export`")
    models: dict[str, Served] = {}
    for served in map(served_in, folders):
        if (other := models.setdefault(served.name, served)) is not served:
            raise ExportError(
                f"expected one folder for each model, {other.folder} and {served.folder} both hold {served.name!r}; "
                "remove the one that is not in `matrix` of params.yaml any more, or export again"
            )
    if unknown := [name for name in names or () if name not in models]:
        raise ExportError(f"expected names among {', '.join(models)}, got {', '.join(unknown)}")
    chosen = [models[name] for name in names or models]
    return [served if served.arm == BASE else _adapted(served) for served in chosen] if mode == "adapter" else chosen


def _adapted(served: Served) -> Served:
    if form := served.adapter_form():
        return form
    raise ExportError(f"{served.folder}: this adapter can be served merged only (run.json says why, only_merged)")


def base_file(root: Path) -> Path:
    """The base's f16 file, which adapters are made for. Raises ExportError: not exported."""
    folder = root / BASE / "0"
    file = next((folder / n for n in (F16_GGUF, SERVED_GGUF) if (folder / n).is_file()), None)
    if file is None:
        raise ExportError(f"{folder}: expected the base's GGUF, which adapters need; run `dvc repro export_base`")
    return file


# --- what Hugging Face says ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """One line of reference.jsonl: what Hugging Face says to one prompt in one form."""

    prompt: str
    rendered: str  # the prompt within the training template, the conversation within the chat template
    ids: list[int]  # of `rendered`, BOS included where training had one
    answer: str  # greedy text, without the end token
    max_tokens: int
    form: Form
    turns: Sequence[Sequence[str]]  # (question, answer) before the prompt

    @property
    def asked(self) -> Asked:
        return conversation(self.prompt, turns=self.turns) if self.turns else self.prompt


def make_references(
    engine: LocalEngine,
    serving: Serving,
    prompts: Sequence[str],
    tokens: int,
    chat: Callable[[list[Message]], str],
    known: Mapping[str, Mapping[str, Any]],
) -> list[Reference]:
    """What Hugging Face's `engine` says to the prompts in each form, with `chat` as its text of a conversation.

    `known`: rendered text → its ids and answer; these are not asked again. A conversation that leaves no room for an
    answer is left out.
    """
    answers = dict(known)

    def refer(form: Form, prompt: str, rendered: str, turns: Sequence[Sequence[str]] = ()) -> Reference:
        if rendered not in answers:
            generation = engine.answer(engine.tokenize(rendered), tokens)
            answers[rendered] = {"ids": generation.prompt_ids, "answer": generation.text}
        return Reference(prompt, rendered, **answers[rendered], max_tokens=tokens, form=form, turns=turns)

    plain = [
        refer("plain", prompt, fill(serving.template, prompt)) for prompt in tqdm(prompts, desc="references", delay=10)
    ]
    newline = [refer("newline", f"{prompt}\n", fill(serving.template, f"{prompt}\n")) for prompt in prompts]
    second = []
    for before, now in zip([*plain[-1:], *plain], prompts, strict=False):
        turns = [(before.prompt, before.answer.strip())]  # some chat templates trim, Ollama does not
        rendered = chat(conversation(now, turns=turns))
        if len(engine.tokenize(rendered)) + tokens <= serving.num_ctx:
            second.append(refer("second", now, rendered, turns))
    return [*plain, *newline, *second]


def write_references(folder: Path, references: Iterable[Reference]) -> None:
    lines = (json.dumps(asdict(reference), ensure_ascii=False) + "\n" for reference in references)
    (folder / REFERENCE).write_text("".join(lines), encoding="utf-8")


def read_references(folder: Path, limit: int | None = None) -> list[Reference]:
    """The answers beside a GGUF, to `limit` prompts in each form. Raises ExportError: none there, or damaged."""
    file = folder / REFERENCE
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
        references = [Reference(**{k: row[k] for k in Reference.__dataclass_fields__}) for row in rows]
    except FileNotFoundError:
        raise ExportError(f"{file}: no such file; run `dvc repro export`, which writes it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{file}: expected Hugging Face's answers as JSON lines ({error}); export again") from error
    if not references:
        raise ExportError(f"{file}: expected at least one answer, found none; export again")
    forms = [[one for one in references if one.form == form] for form in dict.fromkeys(one.form for one in references)]
    return [one for form in forms for one in form[:limit]]
