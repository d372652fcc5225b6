"""The vision-language models that stage evaluate asks: base and adapter, as training left them."""

from pathlib import Path
from typing import Any

from evaluation.backends.vision import VisionBackend
from pipelines.base_model import load_reference
from pipelines.prompt import prompt_text
from pipelines.schema_vision import VisionParams
from pipelines.stage import BASE, BASE_ARM, DATA, adapter_dir


class VisionModels:
    """See `pipelines.answering.Models`; nothing is exported: llama.cpp knows no adapter in a vision tower."""

    exported = False
    backend = "hf"

    def __init__(self, params: VisionParams) -> None:
        self._params = params

    @property
    def missing(self) -> list[str]:
        """None: everything is measured here."""
        return []

    def facts(self, arm: str, seed: int) -> dict[str, Any]:
        """Template and stop words: none, since the end token ends an answer in any case."""
        return {"template": prompt_text(self._params.prompt), "stop": []}

    def made_of(self, arm: str, seed: int) -> list[Path]:
        """The base's name and fingerprint, and the adapter without the logs beside it, which hold times."""
        folder = adapter_dir(arm, seed)
        adapter = [folder / name for name in ("adapter_config.json", "adapter_model.safetensors")]
        return [BASE / "base.json", *([] if arm == BASE_ARM else adapter)]

    def also_read(self, arm: str, seed: int) -> list[Path]:
        """Nothing: base.json has the base's fingerprint."""
        return []

    def open(self, arm: str, seed: int) -> VisionBackend:
        """The base, with the adapter of an arm beside it."""
        return VisionBackend(
            load_reference()[0],
            self.facts(arm, seed)["template"],
            DATA,
            adapter=None if arm == BASE_ARM else adapter_dir(arm, seed),
            parallel=self._params.evaluate.parallel,
        )
