"""The models that stage evaluate asks: opened on a backend, and what their answers depend on."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.schema import Params

if TYPE_CHECKING:
    from pipelines.schema_vision import VisionParams


class Models(Protocol):
    """The models of one evaluation on one backend.

    Attributes:
        backend: Its name.
        exported: Whether stage export made what is asked.
    """

    backend: str
    exported: bool

    @property
    def missing(self) -> list[str]:
        """Figures that a server left out, in scoring or timing, of any model."""

    def facts(self, arm: str, seed: int) -> dict[str, Any]:
        """How an arm is asked: at least `template` and `stop`.

        Raises:
            ConfigError: the stage that leaves them has not run.
        """

    def made_of(self, arm: str, seed: int) -> list[Path]:
        """Files and folders that an arm's model consists of, for run.json."""

    def also_read(self, arm: str, seed: int) -> list[Path]:
        """What else weights may be read from."""

    def open(self, arm: str, seed: int) -> Any:
        """Backend that answers for an arm."""


def models_for(params: "Params | VisionParams", arm: str, first_seed: int) -> Models:
    """The models of the pipeline that `params` belong to.

    Args:
        params: Settings.
        arm: The one that is scored.
        first_seed: The seed whose model in Ollama has no tag.

    Raises:
        BackendError: a server was asked for, or is needed, and does not answer.
    """
    if isinstance(params, Params):
        from pipelines.exported_models import ExportedModels, backend_for

        return ExportedModels(params, backend_for(params, arm), first_seed)
    from pipelines.vision_models import VisionModels

    return VisionModels(params)
