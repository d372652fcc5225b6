"""The connection of the Ollama backend: what is asked again, what is registered again, and what is an error."""

import threading
from collections.abc import Callable
from typing import Any

from evaluation.backends import BackendError
from evaluation.backends.retry import PassingError, Retry
from export.errors import ExportError
from export.ollama_client import OllamaError, OllamaRefused, OllamaUnavailable, explained, open_client

PASSING = (408, 429)
"""Refusals that pass: a proxy's time limit, and too many requests."""


class Link:
    """Requests about one model to one server; safe to use from several threads.

    Args:
        host: URL of the server.
        model: Name under which the model is registered.
        timeout_s: Longest silence of the server, seconds.
        retry: How often and how long to ask again.
        restore: Registers the model anew; None: a model that is gone is an error.
        say: Called with a line for everything that is tried again.
    """

    def __init__(
        self,
        host: str,
        model: str,
        timeout_s: float,
        retry: Retry,
        restore: Callable[[], object] | None,
        say: Callable[[str], None],
    ) -> None:
        self._host, self._model, self._timeout_s = host, model, timeout_s
        self._retry, self._restore, self._say = retry, restore, say
        self._client = open_client(host, timeout_s)
        self._lock = threading.Lock()
        self._restored = 0  # times

    def call(self, request: Callable[[Any], Any], check: Callable[[Any], None] | None = None) -> Any:
        """What a request returns, repeated while its failure may pass.

        Args:
            request: One try with the `ollama` client.
            check: Raises `PassingError` for an answer that is not what was asked for.

        Raises:
            BackendError: the server refused, or failed for too long.
        """
        return self._retry.call(lambda: self._try(request, check), self._say)

    def _try(self, request: Callable[[Any], Any], check: Callable[[Any], None] | None) -> Any:
        restored = self._restored
        try:
            try:
                return self._once(request, check)
            except OllamaRefused as error:
                if self._restore is None or error.status != 404 or "model" not in str(error):
                    raise
                self._register_again(self._restore, restored, error)
                return self._once(request, check)
        except OllamaRefused as error:
            final = 400 <= error.status < 500 and error.status not in PASSING
            refused = BackendError if final else PassingError
            raise refused(f"{error} (model {self._model!r})") from error
        except OllamaUnavailable as error:
            raise PassingError(f"{error} (model {self._model!r})") from error
        except ExportError as error:
            raise BackendError(f"{error} (model {self._model!r})") from error

    def _once(self, request: Callable[[Any], Any], check: Callable[[Any], None] | None) -> Any:
        try:
            with explained(self._host, self._timeout_s):
                made = request(self._client)
        except (ValueError, TypeError) as error:
            raise PassingError(
                f"expected the JSON of an answer from Ollama at {self._host}, got something else: {str(error)[:200]}"
            ) from error
        if check is not None:
            check(made)
        return made

    def _register_again(self, restore: Callable[[], object], restored: int, error: OllamaError) -> None:
        """Makes the model anew, once for all threads that found it missing.

        Args:
            restore: Does it.
            restored: How often it had been done when the request began.
            error: What the server said.
        """
        with self._lock:
            if self._restored == restored:
                self._say(f"{error}; registering the model again")
                try:
                    restore()
                except (ValueError, TypeError) as broken:
                    raise PassingError(f"Ollama at {self._host} answered rubbish: {str(broken)[:200]}") from broken
                self._restored += 1

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()
