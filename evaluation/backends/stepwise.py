"""What the embedded backends share: a backend that evaluates a prompt and then decodes token by token."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from evaluation.backends import Generation
from evaluation.tasks import render


class StepwiseBackend(ABC):
    """Greedy answers, timed by phase, from four primitives.

    Attributes:
        load_ns: Loading the model, ns.
        gaps: Logit of the best token minus that of the second best, for every token that the last answer was made
            of and, where it ended by itself, for its end. Empty where the backend does not keep them.
    """

    def __init__(self, template: str) -> None:
        self._template = template
        self.load_ns = 0
        self.gaps: list[float] = []

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
    def decode(self, max_tokens: int, *, ignore_end: bool = False, stop: Sequence[str] = ()) -> tuple[list[int], str]:
        """Greedy continuation of what was evaluated.

        Args:
            max_tokens: Limit, tokens.
            ignore_end: Go on after an end token (for timing).
            stop: Words that end the answer.

        Returns:
            Ids without the end token, and "stop" or "length".
        """

    def greedy(self, ids: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy continuation of a prompt, ids in and ids out, without the end token."""
        self.prefill(ids)
        return self.decode(max_tokens)[0]

    def generate(self, item_prompt: str, max_tokens: int, stop: Sequence[str] = ()) -> Generation:
        """See `evaluation.backends.Backend`."""
        ids = self.tokenize(render(self._template, item_prompt))
        t0 = time.perf_counter_ns()
        self.prefill(ids)
        t1 = time.perf_counter_ns()
        answer, reason = self.decode(max_tokens, stop=stop)
        t2 = time.perf_counter_ns()
        text = self._text(answer, stop)
        return Generation(text, len(ids), len(answer), self.load_ns, t1 - t0, t2 - t1, reason)

    def _text(self, answer: Sequence[int], stop: Sequence[str]) -> str:
        """Text of an answer up to the first stop word."""
        text = self.detokenize(answer)
        for word in stop:
            text = text.split(word, 1)[0]
        return text

    def generate_many(
        self, item_prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = ()
    ) -> Iterator[tuple[int, Generation]]:
        """See `evaluation.backends.Backend`; here one after the other."""
        for place, prompt in enumerate(item_prompts):
            yield place, self.generate(prompt, max_tokens, stop)
