"""What an Ollama server says about a model that it has, and where that is not what was exported."""

import ast
import re
from dataclasses import dataclass
from typing import Any

from export.modelfile import ModelfileSpec
from export.ollama_client import GREEDY, full_name, list_models, show_model
from export.serving import Mode

DECIDES_ANSWERS = {*GREEDY, "num_predict", "repeat_last_n", "mirostat", "typical_p", "stop", "num_ctx"}


@dataclass(frozen=True)
class Stored:
    """A model as the server has it.

    Attributes:
        digest: Of the whole model.
        stored_sha256: Hash of its weights as stored; None where the server does not say.
        mode: "adapter" where an adapter lies on top of them, else "merged".
        template: Go template.
        system: System message; "" where there is none.
        parameters: Name → values in order.
        precision: Type of its weights, e.g. "F16"; None where the server does not say.
    """

    digest: str
    stored_sha256: str | None
    mode: Mode
    template: str
    system: str
    parameters: dict[str, list[object]]
    precision: str | None

    @property
    def stop(self) -> tuple[str, ...]:
        """Stop words."""
        return tuple(str(word) for word in self.parameters.get("stop", []))

    def differences(self, spec: ModelfileSpec) -> list[str]:
        """Every setting that is stored otherwise than it was exported, and what decides answers and nobody exported.

        Other parameters that a server puts there by itself are its own affair.
        """
        expected: dict[str, Any] = {"template": spec.template, "system": spec.system or ""}
        got: dict[str, Any] = {"template": self.template, "system": self.system}
        for key, value in spec.parameters.items():
            expected[key] = value if isinstance(value, list) else [value]
            got[key] = self.parameters.get(key)
        added = {k: values for k, values in self.parameters.items() if k in DECIDES_ANSWERS - spec.parameters.keys()}
        return [
            *(f"{key}: expected {value!r}, got {got[key]!r}" for key, value in expected.items() if got[key] != value),
            *(f"{key}: expected none, got {values!r}" for key, values in added.items()),
        ]


def stored_model(host: str | None, name: str) -> Stored | None:
    """What the server has under a name; None when nothing.

    Raises:
        OllamaUnavailable, OllamaError: the server cannot be asked.
    """
    digest = list_models(host).get(full_name(name))
    if digest is None:
        return None
    shown = show_model(host, name)
    modelfile = str(shown.get("modelfile") or "")
    weights = re.search(r"^FROM .*sha256[-:]([0-9a-f]{64})", modelfile, re.MULTILINE)
    level = (shown.get("details") or {}).get("quantization_level")
    return Stored(
        digest,
        weights[1] if weights else None,
        "adapter" if re.search(r"^ADAPTER ", modelfile, re.MULTILINE) else "merged",
        str(shown.get("template") or ""),
        str(shown.get("system") or ""),
        parse_parameters(str(shown.get("parameters") or "")),
        str(level) if level and level != "unknown" else None,
    )


def parse_parameters(text: str) -> dict[str, list[object]]:
    """The `parameters` text of /api/show: name → values in order, numbers as numbers, texts unquoted."""
    found: dict[str, list[object]] = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        try:
            parsed = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            parsed = value.strip()
        found.setdefault(name, []).append(parsed)
    return found
