"""What was found about a model that is served, and whether it may be used."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from export.serving import Mode

LEAST_QUANTIZED = 0.25
"""Share of answers that a model quantized on purpose must give as Hugging Face does at 16 bits.

Sound quantization changes a token here and there; gibberish equals no answer at all.
"""
_PLAIN = ("f32", "f16", "bf16")


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
        rendered: Share of prompts that are rendered as in training; None where not supported, or the server does not
            tell.
        counted: Share that is read as the same tokens as by Hugging Face (Ollama: as many); None likewise.
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
        differences: Settings that the server stored otherwise than they were exported; None where there are none.
        note: What must be known of this row besides: what the server does not tell, or that a copy was asked.
        answers: To all prompts, in order.
        equal_to_llama_cpp: Share of answers equal to llama.cpp's of the same files; None where those were not asked.
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
    differences: str | None = None
    note: str | None = None
    answers: tuple[str, ...] = ()
    equal_to_llama_cpp: float | None = None

    def problem(self, least: float, least_quantized: float = LEAST_QUANTIZED) -> str | None:
        """Why the model must not be used, or None when it may.

        Args:
            least: Share of equal answers that is asked of 16-bit models, and of two engines with the same files.
            least_quantized: Share that is asked of one that was quantized on purpose; how often it answers as f16 is
                in parity.json.
        """
        if self.unsupported:
            return None
        quantized = self.quantization not in _PLAIN
        own = least_quantized if quantized else least
        shares = (
            ("prompts rendered as in training", self.rendered, 1.0),
            ("prompts read as the same tokens", self.counted, 1.0),
            # An adapter lies on the base's f16 file, however the merged models are quantized.
            ("answers equal to Hugging Face's", self.answered, own if self.adapter_sha256 is None else least),
            ("answers equal to mode merged", self.equal_to_merged, own),
            ("answers equal to llama.cpp's of the same files", self.equal_to_llama_cpp, least),
        )
        wrong = [
            f"{what}: expected {wanted:.0%}, got {share:.0%}"
            for what, share, wanted in shares
            if share is not None and share < wanted
        ]
        if self.perturbed_noticed is False:
            wrong.append("a perturbed adapter is not noticed")
        if self.differences:
            wrong.append(
                f"the server stored other settings than were exported ({self.differences}); register it again with "
                "`python -m export.ollama create`"
            )
        if not wrong:
            return None
        return f"{self.name} ({self.backend}, {self.mode}): {'; '.join(wrong)}. {self.first or ''}".rstrip()


def against(rows: Sequence[Checked], others: Sequence[Checked]) -> list[Checked]:
    """The rows with `equal_to_llama_cpp`, where llama.cpp was asked the same prompts of the same files.

    Args:
        rows: Of any engine.
        others: Of llama.cpp.
    """
    known = {(o.mode, o.gguf_sha256, o.adapter_sha256): o.answers for o in others}
    return [_compared(row, known.get((row.mode, row.gguf_sha256, row.adapter_sha256), ())) for row in rows]


def _compared(row: Checked, answers: tuple[str, ...]) -> Checked:
    if not row.answers or len(row.answers) != len(answers):
        return row
    return replace(row, equal_to_llama_cpp=sum(map(str.__eq__, row.answers, answers)) / len(answers))
