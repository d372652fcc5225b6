"""Whether an engine answers as the trained model does, prompt by prompt, against what the export stage wrote down.

reference.jsonl beside each GGUF has Hugging Face's own tokens and greedy answers, so an engine can be checked from any
machine that has the folder, without torch. In mode adapter the check is checked as well: with the adapter at another
scale at least one answer must differ, or none of it could have seen a fault.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.adapter_file import changes_nothing
from export.diagnosis import Case, explain, first_token, same_tokens
from export.engines import Backend, Reference, Seen
from export.errors import ExportError
from export.ollama import AdaptersUnsupportedError
from export.serving import Mode, Served

__all__ = ["CONTROL_SCALE", "REFERENCE", "Checked", "Reference", "first_token", "read_references", "verify"]

REFERENCE = "reference.jsonl"
CONTROL_SCALE = 0.5
"""Factor on the adapter's scale in the control; what a lost α of twice the rank amounts to."""


@dataclass(frozen=True)
class Checked:
    """One row of the table: a model in one mode on one engine.

    Attributes:
        name: Of the model.
        arm: Of the training run, or "base".
        mode: merged or adapter.
        backend: llama_cpp or ollama.
        backend_version: Of the library or server.
        prompts: Asked; 0 where this mode is not supported.
        rendered: Share of prompts that are rendered as in training; None where not supported.
        counted: Share that is read as the same tokens as by Hugging Face (Ollama: as many).
        answered: Share that is answered as by Hugging Face, greedily.
        equal_to_merged: Share of answers equal to mode merged; None there.
        perturbed_noticed: Whether another adapter scale changed an answer; None where that was not tried.
        first: Where and why the first prompt differs, or what else is wrong; None where nothing is.
        unsupported: Whether the server cannot serve this mode.
        quantization: In which the model was exported to be served.
        gguf_sha256: Hash of the model's or base's file.
        adapter_sha256: Hash of the adapter's file.
        server_digest: The server's digest of the model.
        stored_sha256: Hash of the weights as the server keeps them.
    """

    name: str
    arm: str
    mode: Mode
    backend: str
    backend_version: str
    prompts: int
    rendered: float | None
    counted: float | None
    answered: float | None
    equal_to_merged: float | None
    perturbed_noticed: bool | None
    first: str | None
    unsupported: bool
    quantization: str
    gguf_sha256: str
    adapter_sha256: str | None
    server_digest: str | None
    stored_sha256: str | None

    def problem(self, least: float) -> str | None:
        """Why the model must not be used, or None when it may.

        Args:
            least: Share of equal answers that is asked of 16-bit models. One that was quantized on purpose answers
                otherwise; how often is reported here, and in parity.json held against f16.
        """
        if self.unsupported:
            return None
        quantized = self.quantization not in _PLAIN
        shares = (
            ("prompts rendered as in training", self.rendered, 1.0),
            ("prompts read as the same tokens", self.counted, 1.0),
            ("answers equal to Hugging Face's", self.answered, 0.0 if quantized and self.mode == "merged" else least),
            ("answers equal to mode merged", self.equal_to_merged, 0.0 if quantized else least),
        )
        wrong = [
            f"{what}: expected {wanted:.0%}, got {share:.0%}"
            for what, share, wanted in shares
            if share is not None and share < wanted
        ]
        if self.perturbed_noticed is False:
            wrong.append("a perturbed adapter is not noticed")
        if not wrong:
            return None
        return f"{self.name} ({self.backend}, {self.mode}): {'; '.join(wrong)}. {self.first or ''}".rstrip()


_PLAIN = ("f32", "f16", "bf16")


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


def verify(
    backend: Backend,
    served: Served,
    modes: Sequence[Mode] = ("merged", "adapter"),
    limit: int | None = None,
    control_scale: float = CONTROL_SCALE,
) -> list[Checked]:
    """Hold one model against its reference, in one mode or both.

    Args:
        backend: Opens it.
        served: The model in mode merged.
        modes: Rows wanted. A model that has no adapter of its own (the base, or what can only be served merged) has no
            row in mode adapter, except for the base where that is the only mode asked for.
        limit: Prompts asked; None: all.
        control_scale: Factor on the adapter's scale in the control.

    Raises:
        OllamaError, ExportError: the engine cannot be asked, or there is no reference.
    """
    references = read_references(served.folder, limit)
    merged = _ask(backend, served, references)
    adapted = served.adapter_form()
    rows = []
    if "merged" in modes or adapted is None:
        mode: Mode = "merged" if "merged" in modes else "adapter"
        rows.append(_row(backend, served, references, merged, mode=mode))
    if "adapter" in modes and adapted is not None:
        rows.append(_adapter_row(backend, adapted, references, merged, control_scale))
    return rows


@dataclass(frozen=True)
class _Asked:
    """Answers of one opened model, and what it said about itself."""

    seen: list[Seen]
    first: str | None
    server_digest: str | None
    stored_sha256: str | None


def _ask(
    backend: Backend, served: Served, references: Sequence[Reference], scale: float = 1.0, explains: bool = True
) -> _Asked:
    with backend.open(served, scale) as engine:
        seen = [engine.ask(reference) for reference in references]
        first = explain(Case(engine, served, references, seen)) if explains else None
        return _Asked(seen, first, engine.server_digest, engine.stored_sha256)


def _row(
    backend: Backend,
    served: Served,
    references: Sequence[Reference],
    asked: _Asked,
    *,
    mode: Mode,
    equal_to_merged: float | None = None,
    noticed: bool | None = None,
    control: str | None = None,
) -> Checked:
    pairs, n = list(zip(references, asked.seen, strict=True)), len(references)
    return Checked(
        name=served.name,
        arm=served.arm,
        mode=mode,
        backend=backend.name,
        backend_version=backend.version,
        prompts=n,
        rendered=sum(s.rendered == r.rendered for r, s in pairs) / n,
        counted=sum(same_tokens(r, s) for r, s in pairs) / n,
        answered=sum(s.text == r.answer for r, s in pairs) / n,
        equal_to_merged=equal_to_merged,
        perturbed_noticed=noticed,
        first=" ".join(filter(None, (asked.first, control))) or None,
        unsupported=False,
        quantization=served.facts.get("quantization", "f16"),
        gguf_sha256=_sha256(served.gguf),
        adapter_sha256=_sha256(served.adapter) if served.adapter else None,
        server_digest=asked.server_digest,
        stored_sha256=asked.stored_sha256,
    )


def _adapter_row(
    backend: Backend, adapted: Served, references: Sequence[Reference], merged: _Asked, control_scale: float
) -> Checked:
    try:
        asked = _ask(backend, adapted, references)
        control = _ask(backend, adapted, references, control_scale, explains=False)
    except AdaptersUnsupportedError as error:
        return _unsupported(backend, adapted, str(error))
    texts, perturbed = [s.text for s in asked.seen], [s.text for s in control.seen]
    equal = sum(a == m.text for a, m in zip(texts, merged.seen, strict=True)) / len(texts)
    noticed = texts != perturbed
    why = None if noticed else _blind(adapted, control_scale, len(texts))
    return _row(
        backend, adapted, references, asked, mode="adapter", equal_to_merged=equal, noticed=noticed, control=why
    )


def _blind(adapted: Served, scale: float, prompts: int) -> str:
    if adapted.adapter is not None and changes_nothing(adapted.adapter):
        return "The adapter changes nothing: all its B (or all its A) are zero; was it trained?"
    return (
        f"With the adapter at {scale} of its scale none of {prompts} answers differs, so this check sees no fault of "
        "the adapter; ask more prompts, or the adapter hardly changes the base"
    )


def _unsupported(backend: Backend, adapted: Served, why: str) -> Checked:
    return Checked(
        name=adapted.name,
        arm=adapted.arm,
        mode="adapter",
        backend=backend.name,
        backend_version=backend.version,
        prompts=0,
        rendered=None,
        counted=None,
        answered=None,
        equal_to_merged=None,
        perturbed_noticed=None,
        first=f"not supported: {why}",
        unsupported=True,
        quantization=adapted.facts.get("quantization", "f16"),
        gguf_sha256=_sha256(adapted.gguf),
        adapter_sha256=_sha256(adapted.adapter) if adapted.adapter else None,
        server_digest=None,
        stored_sha256=None,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
