"""Whether a server answers as the trained model does, prompt by prompt, against what the export stage wrote down.

reference.jsonl beside each GGUF has Hugging Face's own tokens and greedy answers, so a server can be checked from any
machine that has the folder, without torch.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.errors import ExportError
from export.ollama_client import connect, render_prompt
from export.serving import Served

REFERENCE = "reference.jsonl"


@dataclass(frozen=True)
class Reference:
    """What Hugging Face says to one prompt.

    Attributes:
        prompt: The user's text.
        rendered: With the training template.
        ids: Tokens of `rendered`, BOS included where training had one.
        answer: Greedy text, without the end token.
        max_tokens: Limit of the answer.
    """

    prompt: str
    rendered: str
    ids: list[int]
    answer: str
    max_tokens: int


@dataclass(frozen=True)
class Checked:
    """One model's row in the table.

    Attributes:
        name: Of the model.
        mode: merged or adapter.
        prompts: Asked.
        rendered: Share of prompts that the server renders as training did.
        counted: Share of which it reads as many tokens as Hugging Face.
        answered: Share that it answers as Hugging Face does, greedily.
        first: Where and why the first one differs; None where none does.
    """

    name: str
    mode: str
    prompts: int
    rendered: float
    counted: float
    answered: float
    first: str | None

    @property
    def whole(self) -> bool:
        """Whether nothing differs."""
        return min(self.rendered, self.counted, self.answered) == 1.0


def read_references(folder: Path, limit: int | None = None) -> list[Reference]:
    """The answers beside a GGUF.

    Raises:
        ExportError: none there, or damaged.
    """
    file = folder / REFERENCE
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [Reference(**{k: row[k] for k in Reference.__dataclass_fields__}) for row in rows]
    except FileNotFoundError:
        raise ExportError(f"{file}: no such file; run `dvc repro export`, which writes it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{file}: expected Hugging Face's answers as JSON lines ({error}); export again") from error
    if not found:
        raise ExportError(f"{file}: expected at least one answer, found none; export again")
    return found[:limit]


def verify(host: str | None, served: Served, limit: int | None = None) -> Checked:
    """Hold one model of a server against its reference.

    Args:
        host: As in `export.ollama.resolve_host`.
        served: Which model, registered there.
        limit: Prompts asked; None: all.

    Raises:
        OllamaError, ExportError: the server cannot be asked, or there is no reference.
    """
    references = read_references(served.folder, limit)
    rendered = counted = answered = 0
    first: str | None = None
    for number, (reference, seen) in enumerate(_answers(host, served, references)):
        same = (seen["rendered"] == reference.rendered, seen["tokens"] == len(reference.ids),
                seen["text"] == reference.answer)  # fmt: skip
        rendered, counted, answered = rendered + same[0], counted + same[1], answered + same[2]
        if first is None and not all(same):
            first = f"prompt {number}: {_difference(served, reference, seen)}"
    n = len(references)
    return Checked(served.name, served.mode, n, rendered / n, counted / n, answered / n, first)


def _answers(
    host: str | None, served: Served, references: list[Reference]
) -> Iterator[tuple[Reference, dict[str, Any]]]:
    with connect(host) as client:
        for reference in references:
            options = {
                "temperature": 0.0,
                "top_k": 1,
                "repeat_penalty": 1.0,
                "num_predict": reference.max_tokens,
                "num_ctx": served.facts["num_ctx"],
            }
            answer = client.generate(served.name, reference.prompt, options=options, stream=False)
            text = {"text": answer.response or "", "tokens": answer.prompt_eval_count or 0}
            yield reference, {**text, "rendered": render_prompt(host, served.name, reference.prompt)}


def _difference(served: Served, reference: Reference, seen: dict[str, Any]) -> str:
    if seen["rendered"] != reference.rendered:
        return f"the server renders {seen['rendered']!r}, training had {reference.rendered!r}. Likely cause: TEMPLATE"
    if seen["tokens"] != len(reference.ids):
        more = seen["tokens"] - len(reference.ids)
        cause = "BOS comes twice" if more == 1 else "BOS is missing" if more == -1 else "tokenizer or prompt cache"
        return f"the server reads {seen['tokens']} tokens, training had {len(reference.ids)}. Likely cause: {cause}"
    at, expected, got = first_token(served.gguf, reference.answer, seen["text"])
    cause = "adapter scale, merge or quantization"
    if reference.answer.startswith(seen["text"]):
        cause = f"a stop word inside of answers, num_predict, or {cause}"
    elif seen["text"].startswith(reference.answer):
        cause = f"a stop word that is missing, or {cause}"
    return f"token {at} of the answer is {got!r}, expected {expected!r}. Likely cause: {cause}"


def first_token(gguf: Path, expected: str, got: str) -> tuple[int, str, str]:
    """Position of the first token in which two texts differ, and its text on both sides ("" = the end).

    Args:
        gguf: Whose vocabulary splits the texts.
        expected: One text.
        got: Another one.
    """
    from llama_cpp import Llama

    vocabulary = Llama(str(gguf), vocab_only=True, verbose=False)
    try:
        ids = [vocabulary.tokenize(text.encode(), add_bos=False, special=False) for text in (expected, got)]
        at = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
        words = [vocabulary.detokenize([x[at]]).decode("utf-8", "replace") if at < len(x) else "" for x in ids]
    finally:
        vocabulary.close()
    return at, words[0], words[1]
