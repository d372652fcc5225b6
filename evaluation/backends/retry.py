"""Asking again after a failure that may pass: exponential back-off with jitter, bounded in total."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from evaluation.backends import BackendError

T = TypeVar("T")


class PassingError(BackendError):
    """A failure that may be over in a moment: a server that restarts, is overloaded, or answered rubbish."""


@dataclass(frozen=True)
class Retry:
    """How often to ask again.

    Attributes:
        patience_s: No further try begins later than this after the first failure, seconds; 0 = never ask again. A
            request that ran into its own time limit is therefore tried twice, and a refusal at once many times.
        first_s: The first pause, seconds; each further one is twice as long.
        longest_s: The longest pause, seconds.
        wait: Sleeps; replaced in tests.
        clock: Monotonic seconds; replaced in tests.
    """

    patience_s: float = 60.0
    first_s: float = 0.5
    longest_s: float = 15.0
    wait: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def call(self, ask: Callable[[], T], say: Callable[[str], None]) -> T:
        """What `ask` returns, asked again while it raises `PassingError`.

        Args:
            ask: One try.
            say: Called with one line before each pause.

        Raises:
            BackendError: it failed for longer than `patience_s`, or in a way that does not pass.
        """
        began, tries = None, 0
        while True:
            try:
                return ask()
            except PassingError as error:
                now, tries = self.clock(), tries + 1
                began = now if began is None else began
                # Half of the pause is left to chance, so that several requests do not come back all at once.
                pause = min(self.longest_s, self.first_s * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)
                if now + pause - began > self.patience_s:
                    said = f"{error} ({tries} tries in {now - began:.0f} s)" if tries > 1 else str(error)
                    raise BackendError(said) from error
                say(f"{error}; trying again in {pause:.1f} s")
                self.wait(pause)
