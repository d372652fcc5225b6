"""An Ollama server as the engine that is verified.

A model that the server has under its name in the wanted mode is asked as it is, whoever made it. The other mode, and
controls with another adapter scale, are registered under a name of their own for the time of the check.
"""

import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.adapter_file import scaled_copy
from export.engines import Reference, Seen, as_decoded
from export.llama_engine import file_precision
from export.ollama import OllamaUnavailable, Stored, register, remove, resolve_host, server_version, stored_model
from export.ollama_client import OllamaError, connect, render_prompt
from export.serving import Served

if TYPE_CHECKING:
    from ollama import Client

TIMEOUT_S = 600.0  # longest silence: a cold load of a large model from a slow disk takes minutes


class OllamaEngine:
    """See `export.engines.Engine`.

    Args:
        client: Connected.
        url: Of the server.
        name: Under which the server has the model.
        num_ctx: Context, tokens.
        stored: What the server says about it.
        precision: Type of most weights.
    """

    def __init__(
        self, client: "Client", url: str, name: str, num_ctx: int, stored: Stored, precision: str | None
    ) -> None:
        self._client, self._url, self._name, self._num_ctx = client, url, name, num_ctx
        self.stop: tuple[str, ...] = stored.stop
        self.precision: str | None = precision
        self.server_digest: str | None = stored.digest
        self.stored_sha256: str | None = stored.stored_sha256

    def ask(self, reference: Reference, stop: Sequence[str] | None = None) -> Seen:
        """See `export.engines.Engine`.

        Raises:
            OllamaUnavailable, OllamaError: the server cannot be asked.
        """
        # Penalties are named: the server's defaults change greedy answers.
        options: dict[str, Any] = {
            "temperature": 0.0,
            "top_k": 1,
            "top_p": 1.0,
            "min_p": 0.0,
            "seed": 0,
            "repeat_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "num_predict": reference.max_tokens,
            "num_ctx": self._num_ctx,
            **({} if stop is None else {"stop": list(stop)}),
        }
        answer = self._client.generate(self._name, reference.prompt, options=options, stream=False)
        rendered = render_prompt(self._url, self._name, reference.prompt)
        text = as_decoded(answer.response or "", reference.answer)
        return Seen(rendered, answer.prompt_eval_count or 0, None, text, None, None)


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
        """See `export.engines.Backend`.

        Raises:
            AdaptersUnsupportedError: the server takes no adapters.
            OllamaUnavailable, OllamaError: it cannot be asked.
        """
        stored = stored_model(self.url, served.name) if scale == 1.0 else None
        if stored is not None and stored.mode == served.mode_on_server:
            with self._ask(served.name, served, stored) as engine:
                yield engine
            return
        name = f"grit-verify-{uuid.uuid4().hex[:12]}"
        with tempfile.TemporaryDirectory() as temporary:
            adapter = served.adapter
            if adapter is not None and scale != 1.0:
                adapter = Path(temporary) / "adapter.gguf"
                scaled_copy(served.adapter or adapter, adapter, scale)
            try:
                register(self.url, name, served.gguf, served.spec, adapter, records=Path(temporary))
                made = stored_model(self.url, name)
                if made is None:
                    raise OllamaError(f"Ollama at {self.url} made {name!r} and does not have it now; who removed it?")
                with self._ask(name, served, made) as engine:
                    yield engine
            finally:
                remove(self.url, name)

    @contextmanager
    def _ask(self, name: str, served: Served, stored: Stored) -> Iterator[OllamaEngine]:
        with connect(self.url, TIMEOUT_S) as client:
            # Creating keeps the type; a server that does not say it has the file's.
            precision = stored.precision or file_precision(served.gguf)
            yield OllamaEngine(client, self.url, name, served.facts["num_ctx"], stored, precision)
