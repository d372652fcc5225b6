"""The text round every question: params.yaml's own, or the base's chat template.

Stage prepare_base turns the chat template into a text once and leaves it in base.json. All later stages read it there,
so that training, scoring, parity and the Modelfile have the very same.
"""

from pathlib import Path
from typing import Any

from pydantic import field_validator, model_validator

from db.files import read_json
from pipelines.params import ConfigError
from pipelines.stage import BASE
from trainers.settings import Section

# As prompt.template: the chat template of the base's own tokenizer.
CHAT = "chat"


class Prompt(Section):
    template: str
    system: str | None

    @field_validator("template")
    @classmethod
    def _one_slot(cls, template: str) -> str:
        if template == CHAT:
            return template
        if template.count("{prompt}") != 1:
            raise ValueError(f"expected exactly one {{prompt}}, got {template.count('{prompt}')}")
        if "{{" in template or "}}" in template:
            raise ValueError("'{{' and '}}' cannot be told from Ollama's template commands; use other signs")
        return template

    @model_validator(mode="after")
    def _system(self) -> "Prompt":
        if self.system is not None and self.template != CHAT:
            raise ValueError(f"system: only with template: {CHAT}; a text of your own holds its system message itself")
        if self.system is not None and (self.system != self.system.strip() or not self.system):
            raise ValueError(f"system: expected a text without blanks at its ends, got {self.system!r}")
        return self


def chat_facts(folder: Path = BASE) -> dict[str, Any]:
    """What stage prepare_base left of the chat template; ConfigError where it ran without `prompt.template: chat`."""
    file = folder / "base.json"
    content = read_json(file) if file.is_file() else {}
    if "chat" not in content:
        raise ConfigError(f"{file}: expected the base's chat template there, found none; run `dvc repro prepare_base`")
    return dict(content["chat"])


def literal(template: str) -> str:
    """The text with `{prompt}` that `prompt.template` stands for."""
    return str(chat_facts()["text"]) if template == CHAT else template


def prompt_text(prompt: Prompt) -> str:
    """The text with `{prompt}` of every stage; ConfigError where prepare_base has another system message."""
    if prompt.template == CHAT and (asked := chat_facts()["asked_system"]) != prompt.system:
        raise ConfigError(
            f"prompt.system: stage prepare_base read the chat template with {asked!r}, got {prompt.system!r}; run "
            "`dvc repro prepare_base`"
        )
    return literal(prompt.template)
