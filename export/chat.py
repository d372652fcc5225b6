"""A tokenizer's own chat template as the prompt of training and serving, token ids compared."""

from typing import Any

from export.modelfile import PROMPT_SLOT
from export.templates import PROMPTS, ChatTemplate, Message, TemplateError, conversation, convert


def from_tokenizer(tokenizer: Any, system: str | None = None) -> ChatTemplate:
    """The forms of a tokenizer's own chat template; `tokenizer(text)` gives the very ids of `apply_chat_template`.

    Args:
        tokenizer: Of transformers.
        system: System message to train and serve with.

    Raises:
        TemplateError: no chat template, or one without a right form; says why and what to do.
    """
    name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
    if not getattr(tokenizer, "chat_template", None):
        raise TemplateError(f"{name} has no chat template; write the text as prompt.template instead of `chat`")

    def render(messages: list[Message], generation: bool, **variables: Any) -> str:
        made = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation, **variables)
        return str(made)

    bos = tokenizer.bos_token
    try:
        made = convert(
            render,
            bos_token=bos,
            eos_token=tokenizer.eos_token,
            adds_bos=bos is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id],
            system=system,
            special_tokens=[*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()],
        )
        _check_ids(tokenizer, made, system)
    except TemplateError as error:
        raise TemplateError(f"the chat template of {name} cannot be used: {error}") from error
    return made


def _check_ids(tokenizer: Any, made: ChatTemplate, system: str | None) -> None:
    for prompt in PROMPTS:
        expected = list(
            tokenizer.apply_chat_template(conversation(prompt, system), add_generation_prompt=True)["input_ids"]
        )
        got = list(tokenizer(made.text.replace(PROMPT_SLOT, prompt))["input_ids"])
        if got == expected:
            continue
        if got == [tokenizer.bos_token_id, *expected]:
            why = (
                f"it does not write {tokenizer.bos_token}, but the tokenizer puts it in front of every text, and so "
                "does the server. Set add_bos_token to false in the base's tokenizer_config.json, or, to train with "
                f"that token, write the text itself as prompt.template: {made.text!r}"
            )
        else:
            why = (
                f"the tokenizer makes other tokens of its text ({got[:8]}… instead of {expected[:8]}…), mostly by a "
                f"blank that it puts in front of a text. Write the text itself as prompt.template: {made.text!r}"
            )
        raise TemplateError(why)
