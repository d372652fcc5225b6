"""The embedded backend: llama.cpp in this process, through llama-cpp-python."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evaluation.backends import BackendError, Generation
from evaluation.backends.llama_batch import BatchContext, Request, decode_all
from evaluation.backends.stepwise import StepwiseBackend
from evaluation.tasks import render

_END = b"<end>"  # stands for the end tokens among the pieces, known by its identity


class LlamaCppBackend(StepwiseBackend):
    """Greedy answers from a GGUF file.

    Args:
        gguf: Model file.
        template: Text round every question, with one `{prompt}`.
        num_ctx: Context, tokens.
        threads: CPU threads; 0 = llama.cpp's own choice (half of the cores, all of them for prompts).
        adapter: GGUF adapter applied on top.
        parallel: Sequences at once in `generate_many`, each with `num_ctx` tokens; ≥ 1.
        exact_cache: Keep keys and values in float32; llama.cpp rounds them to float16 by default, as servers do.

    Raises:
        BackendError: the file cannot be loaded.
    """

    name = "llama_cpp"

    def __init__(
        self,
        gguf: Path,
        template: str,
        *,
        num_ctx: int,
        threads: int = 0,
        adapter: Path | None = None,
        parallel: int = 1,
        exact_cache: bool = False,
    ) -> None:
        import llama_cpp

        self._api = llama_cpp
        self.version: str = llama_cpp.__version__
        super().__init__(template)
        started = time.perf_counter_ns()
        for file in filter(None, (gguf, adapter)):
            if not file.is_file():
                raise BackendError(f"{file}: no such file; run `dvc repro export`")
        cache_type = llama_cpp.GGML_TYPE_F32 if exact_cache else None
        try:
            self._llm = llama_cpp.Llama(
                model_path=str(gguf),
                lora_path=str(adapter) if adapter else None,
                n_ctx=num_ctx,
                n_threads=threads or None,
                n_threads_batch=threads or None,
                n_gpu_layers=-1,
                type_k=cache_type,
                type_v=cache_type,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            raise BackendError(f"{gguf}: llama.cpp {self.version} cannot load it: {error}") from error
        self.load_ns = time.perf_counter_ns() - started
        self._vocab = llama_cpp.llama_model_get_vocab(self._llm.model)
        self._adapter = str(adapter) if adapter else None
        self._parallel = parallel
        self.mode = "merged" if adapter is None else "adapter"
        self._pieces: dict[int, bytes] = {}  # token → its text, as far as met

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
        self._check_fits(ids, 1)
        self._llm.reset()
        self._llm.eval(list(ids))
        self._api.llama_synchronize(self._llm.ctx)  # a GPU works on when the call is over

    def _check_fits(self, ids: Sequence[int], answer: int) -> None:
        """An answer cut by the context would look like one that the model ended."""
        if len(ids) + answer > self._llm.n_ctx():
            raise BackendError(
                f"expected prompt and answer within num_ctx {self._llm.n_ctx()}, got {len(ids)} + {answer} tokens; "
                "raise export.num_ctx, or lower evaluate.max_tokens, evaluate.speed_tokens or prepare_data.max_chars"
            )

    def next_token(self) -> int:
        """See `StepwiseBackend`."""
        import numpy as np

        logits: Any = self._api.llama_get_logits_ith(self._llm.ctx, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(self._llm.n_vocab(),))))

    def decode(self, max_tokens: int, *, ignore_end: bool = False, stop: Sequence[str] = ()) -> tuple[list[int], str]:
        """See `StepwiseBackend`.

        Raises:
            BackendError: prompt and answer may be more tokens than the context holds.
        """
        self._check_fits(range(self._llm.n_tokens), max_tokens)
        ids: list[int] = []
        for _ in range(max_tokens):
            token = self.next_token()
            if not ignore_end and self._api.llama_vocab_is_eog(self._vocab, token):
                return ids, "stop"
            ids.append(token)
            if stop and any(word in self.detokenize(ids) for word in stop):
                return ids, "stop"
            self._llm.eval([token])
        self._api.llama_synchronize(self._llm.ctx)
        return ids, "length"

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return self._llm.detokenize(list(ids)).decode("utf-8", errors="replace")

    def generate_many(
        self, item_prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = ()
    ) -> Iterator[tuple[int, Generation]]:
        """See `evaluation.backends.Backend`."""
        sequences = min(self._parallel, len(item_prompts))
        if sequences <= 1:
            yield from super().generate_many(item_prompts, max_tokens, stop)
            return
        words = [word.encode() for word in stop]
        requests = (self._request(place, prompt, max_tokens) for place, prompt in enumerate(item_prompts))
        with BatchContext(
            self._llm.model,
            self._llm.context_params,
            sequences=sequences,
            num_ctx=self._llm.n_ctx(),
            adapter=self._adapter,
            unified=self._may_share(sequences),
        ) as context:
            for done, reason in decode_all(context, requests, sequences, lambda r, token: self._judge(r, token, words)):
                text = done.text.decode("utf-8", errors="replace")
                for word in stop:
                    text = text.split(word, 1)[0]
                counts = len(done.prompt), len(done.answer)
                yield done.index, Generation(text, *counts, self.load_ns, None, None, reason)

    def _may_share(self, sequences: int) -> bool:
        """Whether one cache may hold all sequences.

        LongRoPE models (Phi-3) have two sets of rotations, and llama.cpp takes the one for long texts where the cache
        is longer than the original context. A cache for all must not be, or answers differ from those given alone.
        """
        original = [
            int(value)
            for key, value in self._llm.metadata.items()
            if key.endswith("rope.scaling.original_context_length")
        ]
        return all(sequences * self._llm.n_ctx() <= length for length in original)

    def _request(self, place: int, prompt: str, max_tokens: int) -> Request:
        ids = self.tokenize(render(self._template, prompt))
        self._check_fits(ids, max_tokens)
        return Request(place, ids, max_tokens)

    def _judge(self, request: Request, token: int, words: Sequence[bytes]) -> str | None:
        """Whether a request ends with this token, as in `decode`."""
        piece = self._pieces.get(token)
        if piece is None:
            ends = self._api.llama_vocab_is_eog(self._vocab, token)
            piece = self._pieces[token] = _END if ends else self._llm.detokenize([token])
        if piece is _END:
            return "stop"
        request.answer.append(token)
        request.text += piece
        for word in words:
            if word in request.text:
                return "stop"
        return "length" if len(request.answer) >= request.limit else None

    def close(self) -> None:
        """Free the model."""
        self._llm.close()
