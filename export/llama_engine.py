"""llama.cpp in this process as the engine that is verified.

The prompt is rendered by the model's own Modelfile (its Go TEMPLATE and SYSTEM), so that what is checked is what Ollama
would be given; token ids are llama.cpp's, with BOS as the GGUF says.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from export.engines import Reference, Seen, as_decoded
from export.errors import ExportError
from export.gotemplate import evaluate
from export.modelfile import ModelfileSpec
from export.serving import Served


def precision_of(metadata: dict[str, str]) -> str | None:
    """Type of most weights as the GGUF's general.file_type says, in llama.cpp's words; None where it does not."""
    from gguf import LlamaFileType

    try:
        return LlamaFileType(int(metadata["general.file_type"])).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except (KeyError, ValueError):
        return None


def file_precision(gguf: Path) -> str | None:
    """`precision_of` a file, without loading its weights."""
    with Vocabulary(gguf) as vocabulary:
        return vocabulary.precision


class LlamaEngine:
    """See `export.engines.Engine`.

    Args:
        gguf: Merged model, or the base.
        adapter: GGUF adapter on top of it.
        spec: Template and parameters.
        scale: Factor on the adapter's own scale, llama.cpp's `--lora-scaled`.

    Raises:
        ExportError: llama.cpp cannot load a file.
    """

    server_digest: str | None = None
    stored_sha256: str | None = None
    differences: str | None = None
    note: str | None = None

    def __init__(self, gguf: Path, adapter: Path | None, spec: ModelfileSpec, scale: float = 1.0) -> None:
        import llama_cpp

        self._api, self._spec = llama_cpp, spec
        self.stop: tuple[str, ...] = tuple(spec.stop)
        try:
            self._llm = llama_cpp.Llama(
                str(gguf),
                lora_path=str(adapter) if adapter else None,
                lora_scale=scale,
                n_ctx=spec.num_ctx,
                n_gpu_layers=-1,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            files = " with ".join(str(f) for f in (gguf, adapter) if f)
            raise ExportError(f"{files}: llama.cpp {llama_cpp.__version__} cannot load it: {error}") from error
        self._vocab: Any = llama_cpp.llama_model_get_vocab(self._llm.model)
        self.precision = precision_of(self._llm.metadata)

    def ask(self, reference: Reference, stop: Sequence[str] | None = None) -> Seen:
        """See `export.engines.Engine`.

        Raises:
            ExportError: the prompt does not fit the context.
        """
        rendered = evaluate(self._spec.template, system=self._spec.system or "", prompt=reference.prompt)
        ids = list(self._llm.tokenize(rendered.encode(), add_bos=True, special=True))
        if len(ids) >= self._llm.n_ctx():
            raise ExportError(f"a prompt of {len(ids)} tokens does not fit num_ctx {self._llm.n_ctx()}; raise num_ctx")
        answer, text, leads = self._greedy(ids, reference.max_tokens, self.stop if stop is None else stop)
        return Seen(rendered, len(ids), ids, as_decoded(text, reference.answer), answer, leads)

    def _greedy(self, ids: list[int], max_tokens: int, stop: Sequence[str]) -> tuple[list[int], str, list[float]]:
        """Tokens of the answer, its text, cut at the first stop word, and the leads."""
        import numpy as np

        self._llm.reset()
        self._llm.eval(ids)
        answer: list[int] = []
        leads: list[float] = []
        text = ""
        for _ in range(min(max_tokens, self._llm.n_ctx() - len(ids))):
            raw: Any = self._api.llama_get_logits_ith(self._llm.ctx, -1)
            logits = np.ctypeslib.as_array(raw, shape=(self._llm.n_vocab(),))
            token = int(np.argmax(logits))
            leads.append(float(logits[token] - np.partition(logits, -2)[-2]))
            if self._api.llama_vocab_is_eog(self._vocab, token):
                break
            answer.append(token)
            text = self._llm.detokenize(answer, prev_tokens=ids).decode("utf-8", errors="replace")
            if ends := [at for word in stop if (at := text.find(word)) >= 0]:
                return answer, text[: min(ends)], leads
            self._llm.eval([token])
        return answer, text, leads

    def close(self) -> None:
        """Free the model."""
        self._llm.close()


class LlamaCpp:
    """See `export.engines.Backend`."""

    name = "llama_cpp"

    def __init__(self) -> None:
        import llama_cpp

        self.version: str = llama_cpp.__version__

    @contextmanager
    def open(self, served: Served, scale: float = 1.0) -> Iterator[LlamaEngine]:
        """See `export.engines.Backend`.

        Raises:
            ExportError: llama.cpp cannot load a file, or the Modelfile is missing or damaged.
        """
        engine = LlamaEngine(served.gguf, served.adapter, served.written_spec(), scale)
        try:
            yield engine
        finally:
            engine.close()


class Vocabulary:
    """A GGUF's tokens, to name them; weights are not loaded. Use in a `with` block.

    Args:
        gguf: Model.

    Raises:
        ExportError: missing or damaged.
    """

    def __init__(self, gguf: Path) -> None:
        import llama_cpp

        self._api = llama_cpp
        try:
            self._llm = llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False)
        except (ValueError, RuntimeError) as error:
            raise ExportError(
                f"{gguf}: expected a GGUF model, llama.cpp {llama_cpp.__version__} cannot read it ({error}); "
                "export again"
            ) from error
        self._vocab: Any = llama_cpp.llama_model_get_vocab(self._llm.model)
        self.precision = precision_of(self._llm.metadata)

    def __enter__(self) -> "Vocabulary":
        """The vocabulary itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Frees it."""
        self._llm.close()

    def prompt_ids(self, text: str) -> list[int]:
        """Tokens of a rendered prompt, special ones and BOS as the GGUF says."""
        return list(self._llm.tokenize(text.encode(), add_bos=True, special=True))

    def ids(self, text: str, special: bool = False) -> list[int]:
        """Tokens of a text; `special`: texts like </s> are tokens of their own."""
        return list(self._llm.tokenize(text.encode(), add_bos=False, special=special))

    def answer_ids(self, text: str) -> list[int]:
        """Tokens of a text behind a prompt: without the blank that SentencePiece puts in front of a text."""
        line = self.ids("\n")
        whole = self.ids("\n" + text, special=True)
        return whole[len(line) :] if whole[: len(line)] == line else self.ids(text, special=True)

    def text(self, ids: Sequence[int]) -> str:
        """Text of tokens, as far as its last character is whole."""
        return self._llm.detokenize(list(ids)).decode("utf-8", errors="ignore")

    def is_end(self, token: int) -> bool:
        """Whether the GGUF marks a token as one that ends an answer."""
        return bool(self._api.llama_vocab_is_eog(self._vocab, token))

    def word(self, ids: Sequence[int], at: int) -> str:
        """Text of one token; "" behind the end."""
        if at >= len(ids):
            return ""
        return self._llm.detokenize([ids[at]], special=True).decode("utf-8", errors="replace")
