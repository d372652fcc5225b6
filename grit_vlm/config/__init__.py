"""What of a vision-language model is adapted, and on which device it is loaded."""

from grit_vlm.config.devices import DeviceError, get_device_config
from grit_vlm.config.families import adapted_modules, get_model_config
from grit_vlm.config.model_configs import ModalityConfig, ModelConfigError, ModelGRITConfig
from grit_vlm.config.selection import LayerSelectionStrategy, SelectionError

__all__ = [
    "DeviceError",
    "LayerSelectionStrategy",
    "ModalityConfig",
    "ModelConfigError",
    "ModelGRITConfig",
    "SelectionError",
    "adapted_modules",
    "get_device_config",
    "get_model_config",
]
