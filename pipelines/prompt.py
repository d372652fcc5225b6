"""The text round every question: params.yaml's own, or the base's chat template.

Stage prepare_base turns the chat template into a text once and leaves it in base.json. All later stages read it there,
so that training, scoring, parity and the Modelfile have the very same.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from export.chat import from_tokenizer
from pipelines.config import ConfigError
from pipelines.runinfo import read_json
from pipelines.schema_common import CHAT, Prompt
from pipelines.stage import BASE
from trainers.models import load_tokenizer
from trainers.settings import BaseReference


def read_chat_template(prompt: Prompt, reference: BaseReference) -> dict[str, Any]:
    """What base.json keeps of the base's chat template.

    Raises:
        TemplateError: it has none, or one that cannot be served as it is.
    """
    return {**asdict(from_tokenizer(load_tokenizer(reference), prompt.system)), "asked_system": prompt.system}


def chat_facts(folder: Path = BASE) -> dict[str, Any]:
    """The chat template as stage prepare_base left it; keys of `export.templates.ChatTemplate`.

    Raises:
        ConfigError: the stage has not run with `prompt.template: chat`.
    """
    file = folder / "base.json"
    content = read_json(file) if file.is_file() else {}
    if "chat" not in content:
        raise ConfigError(f"{file}: expected the base's chat template there, found none; run `dvc repro prepare_base`")
    return dict(content["chat"])


def literal(template: str) -> str:
    """The text with `{prompt}` that `prompt.template` stands for."""
    return str(chat_facts()["text"]) if template == CHAT else template


def prompt_text(prompt: Prompt) -> str:
    """The text with `{prompt}` that every stage uses.

    Raises:
        ConfigError: stage prepare_base ran with another system message, or not at all.
    """
    if prompt.template == CHAT and (asked := chat_facts()["asked_system"]) != prompt.system:
        raise ConfigError(
            f"prompt.system: stage prepare_base read the chat template with {asked!r}, got {prompt.system!r}; run "
            "`dvc repro prepare_base`"
        )
    return literal(prompt.template)
