"""What a probe looks at: LoRA pairs A [r, d_in], B [d_out, r] where names show them, else single tensors."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

LORA_A, LORA_B = ".lora_A.", ".lora_B."


@dataclass(eq=False)
class Unit:
    """Tensors that are judged together.

    Attributes:
        name: Module name of the LoRA layer, or name of the parameter.
        sides: Side → parameter: "a" and "b" of a LoRA pair, "w" of anything else.
    """

    name: str
    sides: dict[str, nn.Parameter]

    @property
    def is_pair(self) -> bool:
        """Whether ΔW = s·B·A is defined."""
        return self.sides.keys() == {"a", "b"}


def find_units(model: nn.Module) -> list[Unit]:
    """Every trainable parameter, LoRA's in pairs, in the model's order.

    Raises:
        ValueError: nothing is trainable.
    """
    adapters: dict[str, set[str]] = {}
    for name, _ in model.named_parameters():
        if LORA_A in name:
            layer, rest = name.split(LORA_A, 1)
            adapters.setdefault(layer, set()).add(rest.removesuffix(".weight"))
    units: dict[str, Unit] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key, side = name, "w"
        for marker, letter in ((LORA_A, "a"), (LORA_B, "b")):
            if marker in name and parameter.dim() == 2:
                layer, rest = name.split(marker, 1)
                adapter = rest.removesuffix(".weight")
                # As GRIT names them: the adapter is told where there are several.
                key, side = (layer if len(adapters.get(layer, ())) < 2 else f"{layer}[{adapter}]"), letter
        units.setdefault(key, Unit(key, {})).sides[side] = parameter
    if not units:
        raise ValueError("expected a model with trainable parameters, got one in which all are frozen")
    found = []
    for unit in units.values():
        if len(unit.sides) == 1 and "w" not in unit.sides:  # half of a pair is frozen (LoRA-FA): a tensor like others
            unit.sides = {"w": next(iter(unit.sides.values()))}
        found.append(unit)
    return found


def tensors(units: list[Unit]) -> list[tuple[Unit, str, nn.Parameter]]:
    """(unit, side, parameter) of every tensor, in order."""
    return [(unit, side, parameter) for unit in units for side, parameter in unit.sides.items()]


def in_place(model: nn.Module, parameters: list[nn.Parameter]) -> Callable[[], bool]:
    """A quick check whether the very same parameters still stand where they stood (walking a model takes long)."""
    wanted = {id(p) for p in parameters}
    places = [
        (module._parameters, name)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in wanted
    ]
    return lambda: all(id(held.get(name)) in wanted for held, name in places)


Values = dict[str, Tensor]
"""Side → tensor of the parameter's shape: a gradient or a change of one unit."""
