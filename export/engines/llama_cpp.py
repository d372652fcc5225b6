"""llama.cpp in this process, through llama-cpp-python.

One prompt at a time, or several sequences at once in one context (continuous batching by the low-level API). There a
slot is one sequence id. In every step each busy slot puts the tokens it has not yet evaluated into the batch: a whole
prompt when it starts, then its last token. A slot that is done takes the next request at once.
"""

import ctypes
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from db.files import omp_threads
from export import ExportError
from export.engines.engine import Asked, EngineError, Generation, LocalEngine, cut
from export.served import Served

N_BATCH = 512  # tokens in one call, as in llama.cpp's own default
_END = b"<end>"  # stands for the end tokens among the pieces, known by its identity


class LlamaCppEngine(LocalEngine):
    """A GGUF file, merged or the base with a GGUF adapter on top. Raises EngineError: a file cannot be loaded.

    `threads` 0: OMP_NUM_THREADS, or where it is not set half of the cores, all of them for prompts. `scale`: factor on
    the adapter's own, llama.cpp's `--lora-scaled`. `parallel` sequences at once in `generate_many`, each with `num_ctx`
    tokens. `exact_cache`: keys and values in float32; llama.cpp rounds them to float16 by default, as servers do.
    """

    name = "llama_cpp"

    def __init__(
        self,
        gguf: Path,
        template: str | Callable[[Asked], str],
        *,
        num_ctx: int,
        threads: int = 0,
        adapter: Path | None = None,
        scale: float = 1.0,
        parallel: int = 1,
        exact_cache: bool = False,
        stop: Sequence[str] = (),
    ) -> None:
        import llama_cpp

        super().__init__(template)
        self._api = llama_cpp
        self.version: str = llama_cpp.__version__
        self.mode = "merged" if adapter is None else "adapter"
        self.stop = tuple(stop)
        threads = threads or omp_threads()
        started = time.perf_counter_ns()
        for file in filter(None, (gguf, adapter)):
            if not file.is_file():
                raise EngineError(f"{file}: no such file; run `dvc repro export`")
        cache_type = llama_cpp.GGML_TYPE_F32 if exact_cache else None
        try:
            self._llm = llama_cpp.Llama(
                model_path=str(gguf),
                lora_path=str(adapter) if adapter else None,
                lora_scale=scale,
                n_ctx=num_ctx,
                n_threads=threads or None,
                n_threads_batch=threads or None,
                n_gpu_layers=-1,
                type_k=cache_type,
                type_v=cache_type,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            files = " with ".join(str(f) for f in (gguf, adapter) if f)
            raise EngineError(f"{files}: llama.cpp {self.version} cannot load it: {error}") from error
        self.load_ns = time.perf_counter_ns() - started
        self.precision = _precision_of(self._llm.metadata)
        self._vocab: Any = llama_cpp.llama_model_get_vocab(self._llm.model)
        self._adapter = (str(adapter), scale) if adapter else None
        self._parallel = parallel
        self._pieces: dict[int, bytes] = {}  # token → its text, as far as met

    @property
    def device_class(self) -> str:
        return "gpu" if self._api.llama_supports_gpu_offload() else "cpu"

    def tokenize(self, text: str) -> list[int]:
        """BOS as the GGUF says."""
        return list(self._llm.tokenize(text.encode(), add_bos=True, special=True))

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._llm.detokenize(list(ids)).decode("utf-8", errors="replace")

    def check_room(self, prompt: int, answer: int) -> None:
        if prompt + answer > self._llm.n_ctx():
            raise EngineError(
                f"expected prompt and answer within num_ctx {self._llm.n_ctx()}, got {prompt} + {answer} tokens; "
                "raise export.num_ctx, or lower evaluate.max_tokens, evaluate.speed_tokens or prepare_data.max_chars"
            )

    def prefill(self, ids: Sequence[int]) -> None:
        self.check_room(len(ids), 1)
        self._llm.reset()
        self._llm.eval(list(ids))
        self._api.llama_synchronize(self._llm.ctx)  # a GPU works on when the call is over

    def logits(self) -> NDArray[np.float32]:
        """Of the next token, shape (vocabulary,); valid until the next one is evaluated."""
        raw: Any = self._api.llama_get_logits_ith(self._llm.ctx, -1)
        return np.ctypeslib.as_array(raw, shape=(self._llm.n_vocab(),))

    def next_token(self) -> int:
        return int(np.argmax(self.logits()))

    def feed(self, token: int) -> None:
        self._llm.eval([token])

    def is_end(self, token: int) -> bool:
        return bool(self._api.llama_vocab_is_eog(self._vocab, token))

    def decode(
        self, max_tokens: int, *, ignore_end: bool = False, stop: Sequence[str] = ()
    ) -> tuple[list[int], int, str]:
        answer = super().decode(max_tokens, ignore_end=ignore_end, stop=stop)
        self._api.llama_synchronize(self._llm.ctx)
        return answer

    def generate_many(
        self, prompts: Sequence[Asked], max_tokens: int, stop: Sequence[str] | None = None
    ) -> Iterator[tuple[int, Generation]]:
        sequences = min(self._parallel, len(prompts))
        if sequences <= 1:
            yield from super().generate_many(prompts, max_tokens, stop)
            return
        stop = self.stop if stop is None else stop
        words = [word.encode() for word in stop]
        requests = (self._request(place, prompt, max_tokens) for place, prompt in enumerate(prompts))
        together = BatchContext(
            self._llm.model,
            self._llm.context_params,
            sequences=sequences,
            num_ctx=self._llm.n_ctx(),
            adapter=self._adapter,
            unified=self._may_share(sequences),
        )
        with closing(together) as context:
            for done, reason in decode_all(context, requests, sequences, lambda r, token: self._judge(r, token, words)):
                text = cut(done.text.decode("utf-8", errors="replace"), stop)
                counts = len(done.prompt), len(done.answer) + done.ended
                yield done.index, Generation(text, *counts, self.load_ns, None, None, reason, ids=done.answer)

    def _may_share(self, sequences: int) -> bool:
        """Whether one cache may hold all sequences.

        LongRoPE models (Phi-3) have two sets of rotations, and llama.cpp takes the one for long texts where the cache
        is longer than the original context. A cache for all must not be, or answers differ from those given alone.
        """
        originals = (v for k, v in self._llm.metadata.items() if k.endswith("rope.scaling.original_context_length"))
        return all(sequences * self._llm.n_ctx() <= int(length) for length in originals)

    def _request(self, place: int, asked: Asked, max_tokens: int) -> "Request":
        ids = self.tokenize(self.render(asked))
        self.check_room(len(ids), max_tokens)
        return Request(place, ids, max_tokens)

    def _judge(self, request: "Request", token: int, words: Sequence[bytes]) -> str | None:
        """Why a request ends with this token, as in `decode`; None to go on."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = _END if self.is_end(token) else self._llm.detokenize([token])
        if piece is _END:
            request.ended = True
            return "stop"
        request.answer.append(token)
        request.text += piece
        if any(word in request.text for word in words):
            return "stop"
        return "length" if len(request.answer) >= request.limit else None

    def close(self) -> None:
        self._llm.close()


@contextmanager
def open_in_process(served: Served, scale: float = 1.0) -> Iterator[LlamaCppEngine]:
    """An exported model as Ollama is to serve it: template and stop words of serving.json.

    Raises EngineError: llama.cpp cannot load a file.
    """
    serving = served.serving
    with LlamaCppEngine(
        served.gguf,
        serving.render,
        num_ctx=serving.num_ctx,
        adapter=served.adapter,
        scale=scale,
        stop=serving.stop,
    ) as engine:
        yield engine


# --- several sequences in one context -----------------------------------------------------------------------------


class TokenBatch:
    """A `llama_batch` of `size` tokens over arrays of ours, so that a step fills it by slices, not by single values."""

    def __init__(self, size: int) -> None:
        import llama_cpp

        self.size, self.count = size, 0
        self._token, self._pos, self._seq = (np.zeros(size, np.int32) for _ in range(3))
        self._wanted = np.zeros(size, np.int8)
        self._ones = np.ones(size, np.int32)
        # Entry i of seq_id points at entry i of _seq: every token belongs to one sequence.
        self._pointers = self._seq.ctypes.data + np.arange(size, dtype=np.uintp) * self._seq.itemsize
        batch = llama_cpp.llama_batch()
        for name, array in (("token", self._token), ("pos", self._pos), ("n_seq_id", self._ones),
                            ("seq_id", self._pointers), ("logits", self._wanted)):  # fmt: skip
            kind = dict(llama_cpp.llama_batch._fields_)[name]
            setattr(batch, name, ctypes.cast(array.ctypes.data, kind))
        self._batch = batch

    @property
    def room(self) -> int:
        return self.size - self.count

    def add(self, tokens: list[int], position: int, sequence: int, wanted: bool) -> None:
        """Append at most `room` tokens of one sequence, the first at `position`; `wanted`: logits after the last."""
        start, end = self.count, self.count + len(tokens)
        if len(tokens) == 1:  # nearly always, and much faster without slices
            self._token[start], self._pos[start], self._seq[start] = tokens[0], position, sequence
        else:
            self._token[start:end] = tokens
            self._pos[start:end] = np.arange(position, position + len(tokens))
            self._seq[start:end] = sequence
            self._wanted[start:end] = False
        self._wanted[end - 1] = wanted
        self.count = end

    def filled(self) -> Any:
        self._batch.n_tokens = self.count
        return self._batch


class BatchContext:
    """A context for several sequences of `num_ctx` tokens beside a loaded model, which must outlive it.

    `params` are those of the model's own context. `unified`: one cache for all, so that a step is one pass over the
    weights; else one for each, and a pass for each length of what they put into a batch. Raises EngineError: no memory
    for it, or the adapter does not load.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        *,
        sequences: int,
        num_ctx: int,
        adapter: tuple[str, float] | None = None,
        unified: bool = True,
    ) -> None:
        import llama_cpp

        self._api = llama_cpp
        settings = type(params).from_buffer_copy(params)
        settings.n_seq_max = sequences
        settings.n_ctx = sequences * num_ctx
        settings.n_batch = settings.n_ubatch = max(N_BATCH, sequences)
        settings.kv_unified = unified
        self.batch = TokenBatch(settings.n_batch)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        logger = logging.getLogger("llama-cpp-python")
        level = logger.level
        logger.setLevel(logging.CRITICAL)  # all sequences together may be longer than what the model was trained on
        self._ctx = llama_cpp.llama_init_from_model(model, settings)
        logger.setLevel(level)
        if not self._ctx:
            raise EngineError(f"llama.cpp made no context of {sequences} × {num_ctx} tokens; lower evaluate.parallel")
        self._memory = llama_cpp.llama_get_memory(self._ctx)
        if adapter is not None:
            file, scale = adapter
            loaded = llama_cpp.llama_adapter_lora_init(model, file.encode())
            one = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(loaded)
            if not loaded or llama_cpp.llama_set_adapters_lora(self._ctx, one, 1, (ctypes.c_float * 1)(scale)):
                self.close()
                raise EngineError(f"{file}: llama.cpp does not load this adapter")

    def decode(self) -> None:
        """Evaluate what is in `batch`. Raises EngineError: llama.cpp failed."""
        code = self._api.llama_decode(self._ctx, self.batch.filled())
        if code:
            raise EngineError(f"llama_decode failed with code {code} on a batch of {self.batch.count} tokens")

    def best(self, wanted: int) -> NDArray[np.int64]:
        """The most likely next tokens, shape (wanted,), in the order in which the batch asked for them."""
        place = ctypes.addressof(self._api.llama_get_logits(self._ctx).contents)
        logits = np.frombuffer((ctypes.c_float * (wanted * self.n_vocab)).from_address(place), np.float32)
        return logits.reshape(wanted, self.n_vocab).argmax(axis=1)

    def forget(self, sequence: int) -> None:
        self._api.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def close(self) -> None:
        if self._ctx:
            self._api.llama_free(self._ctx)
            self._ctx = None


@dataclass
class Request:
    """One sequence: its place among the prompts, ids, and what was answered so far (without the end token)."""

    index: int
    prompt: list[int]
    limit: int
    answer: list[int] = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)
    ended: bool = False  # by an end token


def decode_all(
    context: BatchContext, requests: Iterable[Request], sequences: int, judge: Callable[[Request, int], str | None]
) -> Iterator[tuple[Request, str]]:
    """Greedy answers as (request, "stop" or "length"), in the order in which they are finished.

    Requests are taken one by one as slots become free. `judge` gets every token, appends what belongs to the answer,
    and gives a reason where the request ends.
    """
    waiting = iter(requests)
    slots: dict[int, Request] = {}
    pending: dict[int, list[int]] = {}  # slot → ids not yet evaluated
    position = [0] * sequences
    free = list(range(sequences))[::-1]
    while True:
        while free and (request := next(waiting, None)) is not None:
            slot = free.pop()
            slots[slot], pending[slot], position[slot] = request, request.prompt, 0
        if not slots:
            return
        slots_asked = _fill(context.batch, pending, position)
        context.decode()
        best = context.best(len(slots_asked)).tolist() if slots_asked else []
        for slot, token in zip(slots_asked, best, strict=True):
            reason = judge(slots[slot], token)
            if reason is None:
                pending[slot] = [token]
                continue
            context.forget(slot)
            del pending[slot]
            free.append(slot)
            yield slots.pop(slot), reason


def _fill(batch: TokenBatch, pending: dict[int, list[int]], position: list[int]) -> list[int]:
    """Put what fits into the batch; the slots that get logits, in the batch's order. A long prompt goes in parts."""
    batch.count = 0
    slots_asked = []
    for slot, ids in pending.items():
        now = ids[: batch.room]
        if not now:
            break
        whole = len(now) == len(ids)
        batch.add(now, position[slot], slot, whole)
        position[slot] += len(now)
        pending[slot] = ids[len(now) :]
        if whole:
            slots_asked.append(slot)
    return slots_asked


# --- the vocabulary alone -----------------------------------------------------------------------------------------


def _precision_of(metadata: dict[str, str]) -> str | None:
    """Type of most weights as the GGUF's general.file_type says, in llama.cpp's words; None where it does not."""
    from gguf import LlamaFileType

    try:
        return LlamaFileType(int(metadata["general.file_type"])).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except (KeyError, ValueError):
        return None


class Vocabulary(closing[Any]):
    """A GGUF's tokens, to name them; weights are not loaded. Use in a `with` block.

    Raises ExportError: missing or damaged.
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
        super().__init__(self._llm)
        self._vocab: Any = llama_cpp.llama_model_get_vocab(self._llm.model)
        self.precision = _precision_of(self._llm.metadata)

    def __enter__(self) -> Self:
        return self

    def ids(self, text: str, bos: bool = False) -> list[int]:
        """Such as </s> are tokens of their own; `bos`: with the one that the file says to put in front."""
        return list(self._llm.tokenize(text.encode(), add_bos=bos, special=True))

    def answer_ids(self, text: str) -> list[int]:
        """Tokens of a text behind a prompt: without the blank that SentencePiece puts in front of a text."""
        line, whole = self.ids("\n"), self.ids("\n" + text)
        return whole[len(line) :] if whole[: len(line)] == line else self.ids(text)

    def text(self, ids: Sequence[int]) -> str:
        """As far as the last character is whole."""
        return self._llm.detokenize(list(ids)).decode("utf-8", errors="ignore")

    def is_end(self, token: int) -> bool:
        return bool(self._api.llama_vocab_is_eog(self._vocab, token))

    def word(self, ids: Sequence[int], at: int) -> str:
        return self._llm.detokenize(ids[at : at + 1], special=True).decode("utf-8", errors="replace")
