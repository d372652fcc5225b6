"""The embedded backend: llama.cpp in this process, through llama-cpp-python."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.backends import BackendError
from evaluation.backends.stepwise import StepwiseBackend


class LlamaCppBackend(StepwiseBackend):
    """Greedy answers from a GGUF file.

    Args:
        gguf: Model file.
        template: Text round every question, with one `{prompt}`.
        num_ctx: Context, tokens.
        threads: CPU threads; 0 = one for each core.
        adapter: GGUF adapter applied on top.

    Raises:
        BackendError: the file cannot be loaded.
    """

    name = "llama_cpp"

    def __init__(
        self, gguf: Path, template: str, *, num_ctx: int, threads: int = 0, adapter: Path | None = None
    ) -> None:
        import llama_cpp

        self._api = llama_cpp
        self.version: str = llama_cpp.__version__
        super().__init__(template)
        started = time.perf_counter_ns()
        for file in filter(None, (gguf, adapter)):
            if not file.is_file():
                raise BackendError(f"{file}: no such file; run `dvc repro export`")
        try:
            self._llm = llama_cpp.Llama(
                model_path=str(gguf),
                lora_path=str(adapter) if adapter else None,
                n_ctx=num_ctx,
                n_threads=threads or None,
                n_threads_batch=threads or None,
                n_gpu_layers=-1,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            raise BackendError(f"{gguf}: llama.cpp {self.version} cannot load it: {error}") from error
        self.load_ns = time.perf_counter_ns() - started
        self._vocab = llama_cpp.llama_model_get_vocab(self._llm.model)

    @property
    def device_class(self) -> str:
        """cpu, or gpu where this build of llama.cpp offloads."""
        return "gpu" if self._api.llama_supports_gpu_offload() else "cpu"

    def tokenize(self, text: str) -> list[int]:
        """Ids of a rendered prompt; BOS as the GGUF says."""
        return list(self._llm.tokenize(text.encode(), add_bos=True, special=True))

    def prefill(self, ids: Sequence[int]) -> None:
        """Evaluate a prompt from an empty cache.

        Raises:
            BackendError: more tokens than the context holds.
        """
        if len(ids) >= self._llm.n_ctx():
            raise BackendError(f"a prompt of {len(ids)} tokens does not fit num_ctx {self._llm.n_ctx()}")
        self._llm.reset()
        self._llm.eval(list(ids))

    def _argmax(self) -> int:
        import numpy as np

        logits: Any = self._api.llama_get_logits_ith(self._llm.ctx, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(self._llm.n_vocab(),))))

    def decode(self, max_tokens: int, *, ignore_end: bool = False, stop: Sequence[str] = ()) -> tuple[list[int], str]:
        """See `StepwiseBackend`."""
        ids: list[int] = []
        room = self._llm.n_ctx() - self._llm.n_tokens
        for _ in range(min(max_tokens, room)):
            token = self._argmax()
            if not ignore_end and self._api.llama_vocab_is_eog(self._vocab, token):
                return ids, "stop"
            ids.append(token)
            if stop and any(word in self.detokenize(ids) for word in stop):
                return ids, "stop"
            self._llm.eval([token])
        return ids, "length"

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return self._llm.detokenize(list(ids)).decode("utf-8", errors="replace")

    def close(self) -> None:
        """Free the model."""
        self._llm.close()
