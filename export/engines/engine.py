"""What every engine does: tokenize, answer greedily, say how long each phase took.

Times are integer nanoseconds and cover one phase each, since load, prefill and decode scale differently: load is per
process, prefill per prompt token, decode per answer token. None: not measured, or not said by the server.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from export import ExportError

PROMPT_SLOT = "{prompt}"
Message = dict[str, str]
"""{"role": "system", "user" or "assistant", "content": text}"""
Asked = str | Sequence[Message]
"""A user's text, a conversation that ends with one, or a `Raw` text."""
Phases = Mapping[str, tuple[int | None, int | None]]
"""Phase → (tokens, ns). `ttft` is the time to the first piece of text, one token."""


class Raw(str):
    """A text that a model continues, without any template."""

    __slots__ = ()


class EngineError(ExportError):
    """An engine could not answer, or answered something that must not be scored.

    `passing`: the failure may be over in a moment (a server that restarts or is overloaded), so the request is worth
    repeating.
    """

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


@dataclass(frozen=True)
class Generation:
    """One answer; what an engine does not report is None."""

    text: str  # without the stop word that ended it
    prompt_tokens: int | None  # of the rendered prompt, BOS included
    answer_tokens: int | None  # generated, the end token included
    load_ns: int | None  # near 0 when the model was resident
    prefill_ns: int | None  # less with a prompt cache; None, as `decode_ns`, where sequences shared passes
    decode_ns: int | None
    finish_reason: str | None  # "stop" (end token or stop word) or "length"
    rendered: str | None = None  # within the template, where known without asking
    prompt_ids: list[int] | None = None
    ids: list[int] | None = None


def conversation(prompt: str, system: str | None = None, turns: Iterable[Sequence[str]] = ()) -> list[Message]:
    """The messages of a question behind `turns`, (question, answer) each."""
    messages = [("system", system)] if system else []
    for question, answer in turns:
        messages += [("user", question), ("assistant", answer)]
    return [{"role": role, "content": text} for role, text in [*messages, ("user", prompt)]]


def asked_for(item: Any) -> Asked:
    """What is asked for the answer of an `evaluation.tasks.Item`."""
    if item.whole:
        return Raw(item.prompt)
    return conversation(item.prompt, item.system, item.turns) if item.turns or item.system else str(item.prompt)


def messages_of(asked: Asked) -> list[Message]:
    return conversation(asked) if isinstance(asked, str) else list(asked)


def fill(template: str, asked: Asked) -> str:
    """The text that a model trained on single turns is asked: the last question in the template."""
    if isinstance(asked, Raw):
        return asked
    return template.replace(PROMPT_SLOT, messages_of(asked)[-1]["content"])


def cut(text: str, stop: Sequence[str]) -> str:
    return text[: min((at for word in stop if (at := text.find(word)) >= 0), default=len(text))]


class Engine(ABC):
    name: str
    version: str  # of library or server: scores move between releases on the same weights
    mode: str  # "merged", or "adapter" beside the base's weights
    stop: tuple[str, ...] = ()  # where a call names none
    precision: str | None = None  # of most weights, e.g. "F16"
    load_ns: int | None = None  # where it happened in this process
    note: str | None = None  # what must be known of the model asked, e.g. that it is a temporary copy

    @property
    @abstractmethod
    def device_class(self) -> str:
        """Where the weights are: "cpu", "gpu" or "cpu+gpu"."""

    @abstractmethod
    def render(self, asked: Asked) -> str | None:
        """What is asked within the model's template; None where a server does not report it."""

    @abstractmethod
    def generate(self, asked: Asked, max_tokens: int, stop: Sequence[str] | None = None) -> Generation:
        """The answer to a user's text, or the next one in a conversation; `stop` in place of `self.stop`.

        Raises EngineError: no answer, or one that must not be scored.
        """

    def generate_many(
        self, prompts: Sequence[Asked], max_tokens: int, stop: Sequence[str] | None = None
    ) -> Iterator[tuple[int, Generation]]:
        """(place in `prompts`, answer), each place once, in the order in which they are finished.

        Engines configured for it work on several at once. Answers are then the same up to rounding: they differ where
        two tokens are almost equally likely. Raises EngineError: as `generate`; what was yielded before stands.
        """
        for place, prompt in enumerate(prompts):
            yield place, self.generate(prompt, max_tokens, stop)

    @abstractmethod
    def phases(self, prefix: str, prompt: str, tokens: int) -> Phases:
        """Times of one request with something new in front, so that no prompt cache knows it.

        Raises EngineError: as `generate`.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the model; may be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LocalEngine(Engine):
    """An engine in this process: prefill, then the greedy loop, token by token.

    A template of one `{prompt}` is that of a model trained on single turns: of a conversation it takes the last
    question. `Serving.render` takes all that the model is to be shown.
    """

    def __init__(self, template: str | Callable[[Asked], str]) -> None:
        self._render = partial(fill, template) if isinstance(template, str) else template

    def render(self, asked: Asked) -> str:
        return self._render(asked)

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Ids of a rendered prompt, BOS included where the model has one."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids."""

    @abstractmethod
    def prefill(self, ids: Sequence[int]) -> None:
        """Evaluate a prompt from an empty cache."""

    @abstractmethod
    def next_token(self) -> int:
        """The most likely token after what was evaluated."""

    @abstractmethod
    def feed(self, token: int) -> None:
        """Evaluate one token more."""

    @abstractmethod
    def is_end(self, token: int) -> bool:
        """Whether a token ends an answer."""

    def check_room(self, prompt: int, answer: int) -> None:
        """Refuse what the context would cut: such an answer would look like one that the model ended."""

    def decode(
        self, max_tokens: int, *, ignore_end: bool = False, stop: Sequence[str] = ()
    ) -> tuple[list[int], int, str]:
        """Greedy continuation of what was evaluated: ids without the end token, tokens with it, and "stop" or "length".

        `ignore_end` continues after an end token, for timing.
        """
        ids: list[int] = []
        while len(ids) < max_tokens:
            token = self.next_token()
            if not ignore_end and self.is_end(token):
                return ids, len(ids) + 1, "stop"
            ids.append(token)
            if stop and any(word in self.detokenize(ids) for word in stop):
                return ids, len(ids), "stop"
            self.feed(token)
        return ids, len(ids), "length"

    def answer(self, ids: list[int], max_tokens: int, stop: Sequence[str] = ()) -> Generation:
        self.check_room(len(ids), max_tokens)
        t0 = time.perf_counter_ns()
        self.prefill(ids)
        t1 = time.perf_counter_ns()
        answer, count, reason = self.decode(max_tokens, stop=stop)
        t2 = time.perf_counter_ns()
        text, times = cut(self.detokenize(answer), stop), (self.load_ns, t1 - t0, t2 - t1)
        return Generation(text, len(ids), count, *times, reason, prompt_ids=ids, ids=answer)

    def generate(self, asked: Asked, max_tokens: int, stop: Sequence[str] | None = None) -> Generation:
        return self.answer(self.tokenize(self.render(asked)), max_tokens, self.stop if stop is None else stop)

    def phases(self, prefix: str, prompt: str, tokens: int) -> Phases:
        """`ttft`: tokenizing, prefill, choice of the token; an end token does not end the answer."""
        text = f"{prefix} {self.render(prompt)}"
        t0 = time.perf_counter_ns()
        ids = self.tokenize(text)
        t1 = time.perf_counter_ns()
        self.check_room(len(ids), tokens)
        self.prefill(ids)
        t2 = time.perf_counter_ns()
        self.detokenize([self.next_token()])
        t3 = time.perf_counter_ns()
        answer, _, _ = self.decode(tokens, ignore_end=True)
        t4 = time.perf_counter_ns()
        return {"ttft": (1, t3 - t0), "prefill": (len(ids), t2 - t1), "decode": (len(answer), t4 - t3)}
