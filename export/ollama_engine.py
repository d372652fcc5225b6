"""An Ollama server as the engine that is verified.

A model that the server has under its name in the wanted mode is asked as it is, whoever made it. The other mode, and
controls with another adapter scale, are registered under a name of their own for the time of the check.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.adapter_file import scaled_copy
from export.engines import Reference, Seen, as_decoded
from export.llama_engine import file_precision
from export.ollama import OllamaUnavailable, register, remove, resolve_host, server_version
from export.ollama_client import GREEDY, LOAD_S, OllamaError, connect, render_prompt
from export.ollama_stored import Stored, stored_model
from export.serving import Served
from export.temporary_models import remove_abandoned, temporary_name

if TYPE_CHECKING:
    from ollama import Client


class OllamaEngine:
    """See `export.engines.Engine`.

    Args:
        client: Connected.
        url: Of the server.
        name: Under which the server has the model.
        served: What was exported.
        stored: What the server says about it.
        note: See `export.engines.Engine`.
    """

    def __init__(
        self, client: "Client", url: str, name: str, served: Served, stored: Stored, note: str | None = None
    ) -> None:
        self._client, self._url, self._name = client, url, name
        self._num_ctx: int = served.facts["num_ctx"]
        self.stop: tuple[str, ...] = stored.stop
        # Creating keeps the type; a server that does not say it has the file's.
        self.precision: str | None = stored.precision or file_precision(served.gguf)
        self.server_digest: str | None = stored.digest
        self.stored_sha256: str | None = stored.stored_sha256
        self.differences: str | None = "; ".join(stored.differences(served.spec)) or None
        self.note: str | None = note

    def ask(self, reference: Reference, stop: Sequence[str] | None = None) -> Seen:
        """See `export.engines.Engine`.

        Raises:
            OllamaUnavailable, OllamaError: the server cannot be asked.
        """
        options: dict[str, Any] = {
            **GREEDY,
            "num_predict": reference.max_tokens,
            "num_ctx": self._num_ctx,
            **({} if stop is None else {"stop": list(stop)}),
        }
        answer = self._client.generate(self._name, reference.prompt, options=options, stream=False)
        rendered = render_prompt(self._url, self._name, reference.prompt)
        text = as_decoded(answer.response or "", reference.answer)
        return Seen(rendered, answer.prompt_eval_count, None, text, None, None)


class OllamaServer:
    """See `export.engines.Backend`.

    Args:
        host: As in `export.ollama.resolve_host`.

    Raises:
        OllamaUnavailable: no server answers there.
    """

    name = "ollama"

    def __init__(self, host: str | None = None) -> None:
        self.url = resolve_host(host)
        version = server_version(self.url)
        if version is None:
            raise OllamaUnavailable(
                f"no Ollama answers at {self.url}; start it with `ollama serve`, or set OLLAMA_HOST"
            )
        self.version: str = version

    @contextmanager
    def open(self, served: Served, scale: float = 1.0) -> Iterator[OllamaEngine]:
        """See `export.engines.Backend`. What killed checks of this machine left on the server is deleted.

        Raises:
            AdaptersUnsupportedError: the server takes no adapters.
            OllamaUnavailable, OllamaError: it cannot be asked.
        """
        remove_abandoned(self.url)
        stored = stored_model(self.url, served.name)
        if scale == 1.0 and stored is not None and stored.mode == served.mode_on_server:
            with connect(self.url, LOAD_S) as client:
                yield OllamaEngine(client, self.url, served.name, served, stored)
            return
        has = "does not have this model" if stored is None else f"has this model in mode {stored.mode}"
        note = f"asked of a temporary copy in mode {served.mode_on_server}, for the server {has}"
        name = temporary_name()
        try:
            with self._registered(name, served, scale) as made, connect(self.url, LOAD_S) as client:
                yield OllamaEngine(client, self.url, name, served, made, note)
        except BaseException:
            with suppress(OllamaError):  # which would hide what really went wrong
                remove(self.url, name)
            raise
        remove(self.url, name)

    @contextmanager
    def _registered(self, name: str, served: Served, scale: float) -> Iterator[Stored]:
        """A copy of the model under a name of its own; to be removed by the caller."""
        with tempfile.TemporaryDirectory() as temporary:
            adapter = served.adapter
            if adapter is not None and scale != 1.0:
                adapter = Path(temporary) / "adapter.gguf"
                scaled_copy(served.adapter or adapter, adapter, scale)
            register(self.url, name, served.gguf, served.spec, adapter, records=Path(temporary))
            made = stored_model(self.url, name)
            if made is None:
                raise OllamaError(f"Ollama at {self.url} made {name!r} and does not have it now; who removed it?")
            yield made
