"""Several sequences at once in one llama.cpp context: continuous batching by the low-level API.

A slot is one sequence id. In every step each busy slot puts the tokens it has not yet evaluated into the batch: a
whole prompt when it starts, then its last token. A slot that is done takes the next request at once.
"""

import ctypes
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.backends import BackendError

N_BATCH = 512  # tokens in one call, as in llama.cpp's own default


class TokenBatch:
    """A `llama_batch` over arrays of ours, so that a step fills it by slices and not by single values.

    Args:
        size: Tokens it holds.
    """

    def __init__(self, size: int) -> None:
        import llama_cpp

        self.size = size
        self.count = 0
        self._token = np.zeros(size, np.int32)
        self._pos = np.zeros(size, np.int32)
        self._seq = np.zeros(size, np.int32)
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

    def clear(self) -> None:
        """No tokens."""
        self.count = 0

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.size - self.count

    def add(self, tokens: list[int], position: int, sequence: int, wanted: bool) -> None:
        """Append tokens of one sequence.

        Args:
            tokens: At most `room`.
            position: Of the first one.
            sequence: Its id.
            wanted: Whether the logits after the last one are needed.
        """
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
        """The structure that `llama_decode` takes."""
        self._batch.n_tokens = self.count
        return self._batch


class BatchContext:
    """A context for several sequences beside a loaded model; to be used in a `with` block.

    Args:
        model: `llama_model_p`; must outlive the context.
        params: `llama_context_params` of the model's own context: threads, flash attention, …
        sequences: How many at once.
        num_ctx: Tokens of each.
        adapter: GGUF adapter applied on top.
        unified: One cache for all, so that a step is one pass over the weights; else one for each, and a pass for
            each length of what they put into a batch.

    Raises:
        BackendError: no memory for it, or the adapter does not load.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        *,
        sequences: int,
        num_ctx: int,
        adapter: str | None = None,
        unified: bool = True,
    ) -> None:
        import llama_cpp

        self._api = llama_cpp
        own = type(params).from_buffer_copy(params)
        own.n_seq_max = sequences
        own.n_ctx = sequences * num_ctx
        own.n_batch = own.n_ubatch = max(N_BATCH, sequences)
        own.kv_unified = unified
        self.batch = TokenBatch(own.n_batch)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        with _quiet():
            self._ctx = llama_cpp.llama_init_from_model(model, own)
        if not self._ctx:
            raise BackendError(f"llama.cpp made no context of {sequences} × {num_ctx} tokens; lower evaluate.parallel")
        self._memory = llama_cpp.llama_get_memory(self._ctx)
        if adapter is not None:
            loaded = llama_cpp.llama_adapter_lora_init(model, adapter.encode())
            one = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(loaded)
            if not loaded or llama_cpp.llama_set_adapters_lora(self._ctx, one, 1, (ctypes.c_float * 1)(1.0)):
                self.close()
                raise BackendError(f"{adapter}: llama.cpp does not load this adapter")

    def decode(self) -> None:
        """Evaluate what is in `batch`.

        Raises:
            BackendError: llama.cpp failed.
        """
        code = self._api.llama_decode(self._ctx, self.batch.filled())
        if code:
            raise BackendError(f"llama_decode failed with code {code} on a batch of {self.batch.count} tokens")

    def best(self, wanted: int) -> NDArray[np.int64]:
        """The most likely next tokens, shape (wanted,), in the order in which they were asked for in the batch.

        Args:
            wanted: How many were.
        """
        place = ctypes.addressof(self._api.llama_get_logits(self._ctx).contents)
        logits = np.frombuffer((ctypes.c_float * (wanted * self.n_vocab)).from_address(place), np.float32)
        return logits.reshape(wanted, self.n_vocab).argmax(axis=1)

    def forget(self, sequence: int) -> None:
        """Empty the cache of one sequence."""
        self._api.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def close(self) -> None:
        """Free the context; may be called twice."""
        if self._ctx:
            self._api.llama_free(self._ctx)
            self._ctx = None

    def __enter__(self) -> "BatchContext":
        """The context itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Frees it."""
        self.close()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without llama.cpp's warning that all sequences together are longer than what the model was trained on."""
    logger = logging.getLogger("llama-cpp-python")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass
class Request:
    """One sequence.

    Attributes:
        index: Its place among the prompts.
        prompt: Token ids, at least one.
        limit: Tokens of the answer, at most; ≥ 1.
        answer: Ids so far, without the end token.
        text: Their text, UTF-8.
    """

    index: int
    prompt: list[int]
    limit: int
    answer: list[int] = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)


# (request, token just decoded) → None to go on, else why the request ends
Judge = Callable[[Request, int], str | None]


def decode_all(
    context: BatchContext, requests: Iterable[Request], sequences: int, judge: Judge
) -> Iterator[tuple[Request, str]]:
    """Greedy answers, in the order in which they are finished.

    Args:
        context: Empty.
        requests: Taken one by one as slots become free.
        sequences: Slots.
        judge: Called with every token; it appends to the request's answer what belongs there, and gives a reason
            ("stop" or "length") where the request ends.

    Yields:
        A request that is done, and the reason.
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
        asked = _fill(context.batch, pending, position)
        context.decode()
        best = context.best(len(asked)).tolist() if asked else []
        for slot, token in zip(asked, best, strict=True):
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
    batch.clear()
    asked = []
    for slot, ids in pending.items():
        now = ids[: batch.room]
        if not now:
            break
        whole = len(now) == len(ids)
        batch.add(now, position[slot], slot, whole)
        position[slot] += len(now)
        pending[slot] = ids[len(now) :]
        if whole:
            asked.append(slot)
    return asked
