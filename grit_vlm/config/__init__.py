"""Which parts of a vision-language model are adapted, and on which device it is loaded."""

from grit_vlm.config.devices import get_device_config
from grit_vlm.config.families import get_model_config
from grit_vlm.config.model_configs import ModalityConfig, ModelGRITConfig
from grit_vlm.config.selection import LayerSelectionStrategy

__all__ = ["LayerSelectionStrategy", "ModalityConfig", "ModelGRITConfig", "get_device_config", "get_model_config"]
