"""The models that stage export left, on the backends that can serve them."""

from functools import partial
from pathlib import Path
from typing import Any

from evaluation.backends import BackendError
from evaluation.backends.hf import HfBackend
from evaluation.backends.llama_cpp import LlamaCppBackend
from evaluation.tasks import render
from export.ollama import resolve_host, server_version
from export.registration import keep_registered, register_served
from export.serving import served_in
from pipelines.base_model import load_reference
from pipelines.config import ConfigError
from pipelines.runinfo import read_json
from pipelines.schema import Params
from pipelines.stage import BASE, BASE_ARM, adapter_dir, gguf_dir, model_name, scores_dir


def choose_backend(wanted: str, base_backend: str | None = None) -> str:
    """The backend to use: under `auto` Ollama where a server answers, else llama.cpp in this process.

    Args:
        wanted: Setting evaluate.backend.
        base_backend: What the base was scored on. Under `auto` an arm follows it, or the two could not be compared.

    Raises:
        BackendError: Ollama was asked for by name and does not answer.
    """
    if wanted == "auto" and base_backend not in (None, "ollama"):
        print(f"backend: {base_backend}, as for the base")
        return str(base_backend)
    if wanted not in ("auto", "ollama"):
        return wanted
    host = resolve_host()
    version = server_version(host)
    if version is not None:
        print(f"backend: Ollama {version} at {host}")
        return "ollama"
    if wanted == "ollama":
        raise BackendError(
            f"evaluate.backend is ollama, and no server answers at {host}; start one (`ollama serve`), set "
            "OLLAMA_HOST, or set evaluate.backend to auto or llama_cpp"
        )
    if base_backend == "ollama":
        raise BackendError(
            f"the base was scored through Ollama, and no server answers at {host} now; start it, or score the base "
            "anew with `dvc repro --force evaluate_base`"
        )
    print(f"backend: no Ollama server at {host}, using llama.cpp in this process")
    return "llama_cpp"


def backend_for(params: Params, arm: str) -> str:
    """The backend that an arm is scored on; see `choose_backend`."""
    return choose_backend(params.evaluate.backend, None if arm == BASE_ARM else _base_backend())


def _base_backend() -> str | None:
    file = scores_dir(BASE_ARM, 0) / "scores.json"
    return str(read_json(file)["backend"]["name"]) if file.is_file() else None


class ExportedModels:
    """See `pipelines.answering.Models`: what stage export left."""

    exported = True

    def __init__(self, params: Params, backend: str, first_seed: int) -> None:
        self.backend = backend
        self._params, self._first_seed = params, first_seed
        self._missing: list[set[str]] = []  # of each backend, which adds to it as it answers

    @property
    def missing(self) -> list[str]:
        """Figures that a server left out, in scoring or timing, of any model."""
        return sorted(set().union(*self._missing))

    def facts(self, arm: str, seed: int) -> dict[str, Any]:
        """serving.json."""
        file = gguf_dir(arm, seed) / "serving.json"
        if not file.is_file():
            raise ConfigError(f"{file.parent}: nothing exported there; run `dvc repro export`")
        return dict(read_json(file))

    def made_of(self, arm: str, seed: int) -> list[Path]:
        """The export's folder."""
        return [gguf_dir(arm, seed)]

    def also_read(self, arm: str, seed: int) -> list[Path]:
        """See `weights`."""
        return weights(self.backend, arm, seed)

    def open(self, arm: str, seed: int) -> Any:
        """Backend that answers for an arm."""
        folder = gguf_dir(arm, seed)
        facts = self.facts(arm, seed)
        threads = self._params.evaluate.threads
        parallel = self._params.evaluate.parallel
        if self.backend == "llama_cpp":
            return LlamaCppBackend(
                folder / "model.gguf", facts["template"], num_ctx=facts["num_ctx"], threads=threads, parallel=parallel
            )
        reference, _ = load_reference()
        if self.backend == "hf":
            adapter = None if arm == BASE_ARM else adapter_dir(arm, seed)
            return HfBackend(
                reference.merge_from,
                facts["template"],
                adapter=adapter,
                load_kwargs=reference.merge_kwargs,
                parallel=parallel,
            )
        return self._ollama(arm, seed, folder, facts)

    def _ollama(self, arm: str, seed: int, folder: Path, facts: dict[str, Any]) -> Any:
        from evaluation.backends.ollama import OllamaBackend
        from trainers.models import load_tokenizer

        name = model_name(arm, seed, self._first_seed)
        host, served = resolve_host(), served_in(folder, name)

        form = keep_registered(host, served)
        tokenizer = load_tokenizer(load_reference()[0])

        def expected(prompt: str) -> list[int]:
            return list(tokenizer(render(facts["template"], prompt))["input_ids"])

        backend = OllamaBackend(
            host,
            name,
            facts["num_ctx"],
            num_threads=self._params.evaluate.threads or None,
            expected=expected,
            parallel=self._params.evaluate.parallel,
            restore=partial(register_served, host, form),
            mode=form.mode,
        )
        self._missing.append(backend.missing)
        return backend


def weights(backend: str, arm: str, seed: int) -> list[Path]:
    """Every folder that a backend may read weights of an arm from."""
    if backend == "hf":
        return [BASE / "base.json", *([] if arm == BASE_ARM else [adapter_dir(arm, seed)])]
    return [gguf_dir(BASE_ARM, 0)] if backend == "ollama" and arm != BASE_ARM else []  # in mode adapter
