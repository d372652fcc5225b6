"""The prompt template: a text from params.yaml, or the base's chat template.

In a conversation a chat template is used as the base defines it. A text from params.yaml is filled in again for every
turn; each answer is closed with the end-of-sequence token, and a system message comes first, followed by an empty line.

Stage prepare_base turns the chat template into a text once and stores it in base.json. All later stages read it there,
so that training, scoring, proof and the Modelfile use exactly the same text.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import field_validator, model_validator

from db.files import read_json
from evaluation.tasks import Item
from pipelines.base_model import load_reference
from pipelines.params import ConfigError
from pipelines.stage import BASE
from trainers.models import load_tokenizer
from trainers.settings import Section

# As prompt.template: the chat template of the base's tokenizer.
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
            raise ValueError("expected no '{{' or '}}', which Ollama would read as template commands")
        return template

    @model_validator(mode="after")
    def _system(self) -> "Prompt":
        if self.system is not None and self.template != CHAT:
            raise ValueError(f"system: only with template: {CHAT}; write a system message into your own text instead")
        if self.system is not None and (self.system != self.system.strip() or not self.system):
            raise ValueError(f"system: expected a text without white space at its ends, got {self.system!r}")
        return self


def chat_facts(folder: Path = BASE) -> dict[str, Any]:
    """What prepare_base stored of the chat template; ConfigError if it ran without `prompt.template: chat`."""
    file = folder / "base.json"
    content = read_json(file) if file.is_file() else {}
    if "chat" not in content:
        raise ConfigError(f"{file}: expected the base's chat template, found none; run `dvc repro prepare_base`")
    return dict(content["chat"])


def literal(template: str) -> str:
    """The text with `{prompt}` that `prompt.template` stands for."""
    return str(chat_facts()["text"]) if template == CHAT else template


def prompt_text(prompt: Prompt) -> str:
    """The text with `{prompt}` of every stage; ConfigError if prepare_base ran with another system message."""
    if prompt.template == CHAT and (system := chat_facts()["asked_system"]) != prompt.system:
        raise ConfigError(
            f"prompt.system: stage prepare_base read the chat template with {system!r}, got {prompt.system!r}; run "
            "`dvc repro prepare_base`"
        )
    return literal(prompt.template)


class Form:
    """Renders items with prompt.template."""

    def __init__(self, template: str) -> None:
        self._pieces: dict[str, Any] = chat_facts() if template == CHAT else {}
        if not self._pieces:
            self._pieces = {"text": template, "before": "", "then": template, "start": ""}
            self._pieces["between"] = f"\n\n{template.split('{prompt}')[0]}"

    @cached_property
    def end(self) -> str | None:
        """What closes an answer that is not the last; None: the chat template cannot express several turns."""
        return self._pieces["end"] if "end" in self._pieces else str(load_tokenizer(load_reference()[0]).eos_token)

    def asked(self, item: Item) -> str:
        """The prompt for the item's answer."""
        return item.prompt if item.whole else "".join(self.parts(item)[:-1])

    def parts(self, item: Item) -> tuple[str, ...]:
        """Prompts and answers, alternating, from the first question to the last answer without its end."""
        if item.whole:
            return ("", item.prompt + item.completion)
        before, after = self._pieces["text"].split("{prompt}")
        if item.system and self._pieces["before"] is None:
            raise ConfigError(
                f"prompt.template: the base's chat template takes no system message, and {item.id} has one; put it "
                "into the first question, or write out the text as prompt.template"
            )
        if item.turns and self.end is None:
            raise ConfigError(
                "prompt.template: the base's chat template formats earlier answers differently from the last one, and "
                f"{item.id} has several turns; write out the text as prompt.template"
            )
        if item.system:
            before = f"{self._pieces['before']}{item.system}{self._pieces['between']}"
        texts: list[str] = []
        for place, (question, answer) in enumerate(item.turns):
            asked, answered = f"{before}{question}{after}", f"{self._pieces['start']}{answer}{self.end}"
            before, after = self._pieces["then"].split("{prompt}")
            if place in item.given:
                before = f"{asked}{answered}{before}"
            else:
                texts += [asked, answered]
        return (*texts, f"{before}{item.prompt}{after}", item.completion)
