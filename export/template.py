"""Chat templates: from a tokenizer's (Jinja) to the text trained on and to Ollama's Go template.

The Jinja template is not parsed. It is rendered with marks for the messages, the constant pieces are read off, a Go
template is put together from them, and both are rendered with many other messages: only what comes out the same is
accepted. So a template of any shape is either converted right or refused, with the reason.

Some templates trim messages. Ollama does not, nor does training here, so that both still read the same text, which is
the chat template's own only for messages without blanks at their ends.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from jinja2 import TemplateError as JinjaError

from export import ExportError
from export.engines.engine import PROMPT_SLOT, Message, conversation
from export.go import (
    CONTENT,
    ELSE,
    ELSE_ASSISTANT,
    END,
    FIND_LAST,
    IF_SYSTEM,
    IF_USER,
    LAST,
    MESSAGES,
    SYSTEM,
    render_go,
)
from export.modelfile import Serving
from trainers.encode import control_tokens, encode_prompt, spelled_out

Render = Callable[..., str]
"""(messages, add_generation_prompt, **variables) → text; what `apply_chat_template` does with tokenize=False."""

_USER, _SYSTEM, _ANSWER = "Ask7f3Q", "Sys7f3Q", "Ans7f3Q"
_TOKEN = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
# What every conversion is tried with.
PROMPTS = (
    "What is 2 + 2?",
    """braces {a} {{b}} {{ .Prompt }} {% if x %} {# c #} "double" 'single' \\n back\\slash % & <b> </b> `x`""",
    "first line\n\n  third line\n\n\n- ends with a full stop.\tTab.",
    "é ß Ω 漢字 🙂 no\u00a0break, İstanbul",
    "UPPER lower Title " + "long " * 300 + "end",
    "1",
)
_SYSTEMS = ("Be brief.", 'Answer "so" {and} {{so}}.\n\nSecond part: é 漢字 🙂', "x " * 200 + "end")


@dataclass(frozen=True)
class ChatTemplate:
    text: str  # trained on: `{prompt}` once, up to the answer, system message included; for `tokenizer(text)`
    go: str  # Ollama's TEMPLATE; of the last question alone where conversations come out otherwise than in the original
    system: str | None  # Ollama's SYSTEM: the one asked for; the template's own default stands in `go`
    stop: tuple[str, ...]  # the end-of-turn token and the end of sequence
    # Of a conversation: before, SYSTEM, between, PROMPT … where it has a system message; round earlier answers `start`
    # and `end`, which are learnt with it, and then `then`, with `{prompt}` once. None: no system message, no turns.
    before: str | None = None
    between: str = ""
    start: str = ""
    end: str | None = None
    then: str = ""


@dataclass(frozen=True)
class _Pieces:
    """Constant pieces: [bos] plain PROMPT after, [bos] before SYSTEM between PROMPT after.

    In a conversation `answer` stands between a prompt and its answer, and `again` between that and the next prompt.
    """

    bos: str
    plain: str
    after: str
    before: str | None = None
    between: str = ""
    answer: str | None = None
    again: str = ""

    def go(self, turns: bool) -> str:
        """The Go template, of all `turns` or of the last question."""
        lead = self.plain
        if self.before is not None:
            lead = f"{IF_SYSTEM}{self.before}{SYSTEM}{self.between}{ELSE}{self.plain}{END}"
        if not turns:
            return FIND_LAST + self.bos + lead + LAST + self.after
        turn = f"{IF_USER}{CONTENT}{ELSE_ASSISTANT}{self.answer}{CONTENT}{self.again}{END}"
        return self.bos + lead + MESSAGES + turn + END + self.after


def _cut(text: str, *marks: str) -> list[str] | None:
    """The pieces between the marks, None unless each is there once and in this order."""
    pieces = []
    for mark in marks:
        head, separator, text = text.partition(mark)
        pieces.append(head)
        if not separator or mark in text:
            return None
    return [*pieces, text]


def _try(render: Render, messages: list[Message], generation: bool = True) -> str | None:
    """The rendering, None where the template refuses such messages."""
    try:
        return render(messages, generation)
    except (JinjaError, TypeError, ValueError):
        return None


def _refuse_dates(render: Render) -> None:
    def at(date: str) -> str:
        return render(conversation(_USER), True, strftime_now=lambda _: date)

    if at("Date7f3Q") != at("Date8g4R"):
        text = at("26 Jul 2024").replace(_USER, PROMPT_SLOT)
        raise ExportError(
            "it writes the date of the day, so that training and serving would read different texts. Fix the date: "
            f"write the text itself as prompt.template, e.g. {text!r} (without the token that the tokenizer puts in "
            "front of every text)"
        )


def _read(render: Render, bos_token: str | None) -> _Pieces:
    """The pieces of the template as far as it has them.

    Raises ExportError: the user's text is not in the rendering as it was given.
    """
    plain = _cut(render(conversation(_USER), True), _USER)
    if plain is None:
        raise ExportError("it changes the user's text, leaves it out or repeats it")
    bos = bos_token if bos_token and plain[0].startswith(bos_token) else ""
    pieces = _Pieces(bos, plain[0].removeprefix(bos), plain[1])
    with_system = _cut(_try(render, conversation(_USER, _SYSTEM)) or "", _SYSTEM, _USER)
    if with_system and with_system[2] == pieces.after and with_system[0].startswith(bos):
        before, between = with_system[0].removeprefix(bos), with_system[1]
        pieces = replace(pieces, before=before, between=between)
    turns = _cut(_try(render, conversation(f"{_USER}2", turns=[(f"{_USER}1", _ANSWER)])) or "",
                 f"{_USER}1", _ANSWER, f"{_USER}2")  # fmt: skip
    if turns and turns[0] == plain[0] and turns[3] == pieces.after:
        return replace(pieces, answer=turns[1], again=turns[2])
    over = _cut(_try(render, [*conversation(_USER), {"role": "assistant", "content": _ANSWER}], False) or "", _ANSWER)
    return replace(pieces, again=over[1]) if over else pieces


def _end_of_turn(again: str, special_tokens: Sequence[str]) -> str | None:
    """The token that ends an answer: the first of what the template writes behind one."""
    text = again.lstrip()
    special = max((t for t in special_tokens if t and text.startswith(t)), key=len, default=None)
    guess = _TOKEN.match(text)
    return special or (guess[0] if guess else None)


def convert(
    render: Render,
    *,
    bos_token: str | None,
    eos_token: str,
    adds_bos: bool,
    system: str | None = None,
    special_tokens: Sequence[str] = (),
) -> ChatTemplate:
    """The forms of a chat template that training and serving need.

    With `adds_bos` tokenizer and GGUF put BOS in front of every text, and it is taken out of the template;
    `special_tokens` are the tokenizer's, to find the one that ends a turn. Raises ExportError: no right form; says
    why and what to do.
    """

    def bare(messages: list[Message], generation: bool, **variables: Any) -> str:
        text = render(messages, generation, **variables)
        return text.removeprefix(bos_token) if adds_bos and bos_token else text

    try:
        _refuse_dates(bare)
        pieces = _read(bare, bos_token)
    except (JinjaError, TypeError, ValueError) as error:
        raise ExportError(f"it does not render a single user message: {error}") from error
    if system is not None:
        if system != system.strip() or not system:
            raise ExportError(f"prompt.system: expected a text without blanks at its ends, got {system!r}")
        if pieces.before is None:
            raise ExportError("it takes no system message; leave out prompt.system, or put it into the questions")
    lead = pieces.bos + (pieces.plain if system is None else f"{pieces.before}{system}{pieces.between}")
    text = lead + PROMPT_SLOT + pieces.after
    stop = tuple(dict.fromkeys(filter(None, (_end_of_turn(pieces.again, special_tokens), eos_token))))
    _check_blanks(bare, pieces)
    turns = pieces.answer is not None and _talks(bare, pieces.go(turns=True), pieces.before is not None)
    before = None if pieces.before is None else pieces.bos + pieces.before
    chat = ChatTemplate(text, pieces.go(turns), system, stop, before, pieces.between)
    token = _end_of_turn(pieces.again, special_tokens)
    if turns and token and (pieces.answer or "").startswith(pieces.after):
        again = pieces.again
        at = again.index(token) + len(token)
        start = (pieces.answer or "").removeprefix(pieces.after)
        chat = replace(chat, start=start, end=again[:at], then=f"{again[at:]}{PROMPT_SLOT}{pieces.after}")
    _check_syntax(chat, bos_token, adds_bos)
    _check(bare, chat, system)
    return chat


def _check_syntax(chat: ChatTemplate, bos_token: str | None, adds_bos: bool) -> None:
    if chat.text.count(PROMPT_SLOT) != 1 or "{{" in chat.text or "}}" in chat.text:
        raise ExportError(
            f"its own text holds {PROMPT_SLOT}, '{{{{' or '}}}}', which Ollama's template language would run; write a "
            f"prompt.template without them. It is {chat.text!r}"
        )
    try:
        Serving(
            template=chat.text,
            go=chat.go,
            stop=list(chat.stop),
            num_ctx=1,
            system=chat.system,
            adds_bos=adds_bos,
            bos_token=bos_token,
        ).check()
    except ExportError as error:
        raise ExportError(f"it cannot be written into a Modelfile: {error}") from error


def _check_blanks(render: Render, pieces: _Pieces) -> None:
    """Blanks at the ends of the user's text may be taken off. Raises ExportError: they are changed in another way."""
    blank = f" \n{_USER}\n\t "
    leads: dict[str | None, str] = {None: pieces.plain}
    if pieces.before is not None:
        leads[_SYSTEM] = f"{pieces.before}{_SYSTEM}{pieces.between}"
    for system, lead in leads.items():
        got = _try(render, conversation(blank, system))
        if got not in [pieces.bos + lead + text + pieces.after for text in (blank, blank.strip(), blank.rstrip())]:
            raise ExportError(f"it changes a message with blanks at its ends: of {blank!r} it makes {got!r}")


def _check(render: Render, chat: ChatTemplate, asked: str | None) -> None:
    """Go template and training text render what the chat template renders, whatever the messages say.

    Raises ExportError: shows the first messages for which they do not.
    """
    systems = (asked, None, *_SYSTEMS) if SYSTEM in chat.go else (None,)
    for prompt, system in product(PROMPTS, dict.fromkeys(systems)):
        expected = _try(render, conversation(prompt, system))
        texts = [render_go(chat.go, conversation(prompt, system))]
        if system == asked:
            texts.append(chat.text.replace(PROMPT_SLOT, prompt))
        wrong = next((text for text in texts if text != expected), None)
        if wrong is not None:
            raise ExportError(
                "what it writes round a message depends on what the message says: of system message "
                f"{system and system[:60]!r} and prompt {prompt[:60]!r} it makes {expected!r:.400}, expected "
                f"{wrong!r:.400}; write the text itself as prompt.template"
            )


def _talks(render: Render, go: str, takes_system: bool) -> bool:
    """Whether conversations of several turns come out in Ollama as in the chat template."""
    turns = [("What is 2 + 2?", "It is 4."), ("And\n\n{b}?", "é.")]
    conversations = [
        conversation("Thanks.", system, turns[:n])
        for n, system in product((1, 2), (None, *_SYSTEMS[:1]) if takes_system else (None,))
    ]
    try:
        return all(render_go(go, messages) == _try(render, messages) for messages in conversations)
    except ExportError:
        return False


# --- a tokenizer's own template -------------------------------------------------------------------------------------


def from_tokenizer(tokenizer: Any, system: str | None = None) -> ChatTemplate:
    """The forms of a tokenizer's own chat template; `tokenizer(text)` gives the very ids of `apply_chat_template`.

    Raises ExportError: no chat template, or one without a right form; says why and what to do.
    """
    name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
    if not getattr(tokenizer, "chat_template", None):
        raise ExportError(f"{name} has no chat template; write the text as prompt.template instead of `chat`")

    def render(messages: list[Message], generation: bool, **variables: Any) -> str:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation, **variables)
        )

    bos = tokenizer.bos_token
    try:
        if token := spelled_out(control_tokens(tokenizer), system):
            raise ExportError(f"prompt.system holds {token}, which is a control token; take it out")
        chat = convert(
            render,
            bos_token=bos,
            eos_token=tokenizer.eos_token,
            adds_bos=bos is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id],
            system=system,
            special_tokens=[*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()],
        )
        _check_ids(tokenizer, chat, system)
    except ExportError as error:
        raise ExportError(f"the chat template of {name} cannot be used: {error}") from error
    return chat


def _check_ids(tokenizer: Any, chat: ChatTemplate, system: str | None) -> None:
    for prompt in PROMPTS:
        encoded = tokenizer.apply_chat_template(conversation(prompt, system), add_generation_prompt=True)
        expected = list(encoded["input_ids"])
        got = encode_prompt(tokenizer, chat.text.replace(PROMPT_SLOT, prompt))
        if got == expected:
            continue
        first = next((n for n, pair in enumerate(zip(got, expected, strict=False)) if pair[0] != pair[1]), 0)
        if got == [tokenizer.bos_token_id, *expected]:
            why = (
                f"it does not write {tokenizer.bos_token}, but the tokenizer puts it in front of every text, and so "
                "does the server. Set add_bos_token to false in the base's tokenizer_config.json, or, to train with "
                f"that token, write the text itself as prompt.template: {chat.text!r}"
            )
        else:
            why = (
                f"the tokenizer makes other tokens of its text (from token {first} on {got[first : first + 8]}…, not "
                f"{expected[first : first + 8]}…), mostly by a blank that it puts in front of a text. Write the "
                f"text itself as prompt.template: {chat.text!r}"
            )
        raise ExportError(why)
