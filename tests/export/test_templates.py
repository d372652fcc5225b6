"""A chat template is converted right, or refused with the reason."""

import functools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import _compile_jinja_template

from export.gotemplate import GoTemplateError, converse, evaluate
from export.modelfile import ModelfileError, ModelfileSpec, check_bos, parse_modelfile, render_modelfile
from export.templates import TemplateError, conversation, convert
from tests.export import chat_templates as published

SYSTEM_TURN = "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
CHATML = SYSTEM_TURN + ("<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}<|im_end|>\n")
DATED = (
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
)
USER3 = "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
# Name → (BOS, EOS, Ollama's template where the GGUF adds BOS, SYSTEM, stop words, trims, several turns).
SHAPES = {
    "LLAMA3": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        "{{ if .System }}<|start_header_id|>system<|end_header_id|>\n\n{{ .System }}<|eot_id|>{{ end }}"
        "<|start_header_id|>user<|end_header_id|>\n\n{{ .Prompt }}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{{ .Response }}<|eot_id|>",
        None,
        ("<|eot_id|>",),
        True,
        True,
    ),
    "LLAMA31": (  # its date is a constant; the system turn is always there, so Ollama would repeat it in each turn
        "<|begin_of_text|>",
        "<|eot_id|>",
        f"{{{{ if .System }}}}{DATED}{{{{ .System }}}}{USER3}{{{{ else }}}}{DATED}{USER3}{{{{ end }}}}"
        "{{ .Prompt }}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        None,
        ("<|eot_id|>",),
        True,
        False,
    ),
    "CHATML": (None, "<|endoftext|>", CHATML, None, ("<|im_end|>", "<|endoftext|>"), False, True),
    "QWEN2": (
        None,
        "<|im_end|>",
        CHATML,
        "You are a helpful assistant.",
        ("<|im_end|>",),
        False,
        True,
    ),
    "QWEN3": (None, "<|im_end|>", CHATML, None, ("<|im_end|>",), False, True),
    "MISTRAL": (
        "<s>",
        "</s>",
        "[INST] {{ .Prompt }} [/INST]{{ .Response }}</s>",
        None,
        ("</s>",),
        False,
        True,
    ),
    "LLAMA2": (  # its history has blanks round answers that the prompt of an answer has not
        "<s>",
        "</s>",
        "[INST] {{ if .System }}<<SYS>>\n{{ .System }}\n<</SYS>>\n\n{{ end }}{{ .Prompt }} [/INST]",
        None,
        ("</s>",),
        True,
        False,
    ),
    "GEMMA2": (
        "<bos>",
        "<eos>",
        "<start_of_turn>user\n{{ .Prompt }}<end_of_turn>\n<start_of_turn>model\n{{ .Response }}<end_of_turn>\n",
        None,
        ("<end_of_turn>", "<eos>"),
        True,
        True,
    ),
    "GEMMA3": (
        "<bos>",
        "<eos>",
        "<start_of_turn>user\n{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}<end_of_turn>\n"
        "<start_of_turn>model\n{{ .Response }}<end_of_turn>\n",
        None,
        ("<end_of_turn>", "<eos>"),
        True,
        True,
    ),
    "PHI3": (
        "<s>",
        "<|endoftext|>",
        "{{ if .System }}<|system|>\n{{ .System }}<|end|>\n{{ end }}<|user|>\n{{ .Prompt }}<|end|>\n<|assistant|>\n"
        "{{ .Response }}<|end|>\n",
        None,
        ("<|end|>", "<|endoftext|>"),
        False,
        True,
    ),
    "ZEPHYR": (
        "<s>",
        "</s>",
        "{{ if .System }}<|system|>\n{{ .System }}</s>\n{{ end }}<|user|>\n{{ .Prompt }}</s>\n<|assistant|>\n"
        "{{ .Response }}</s>\n",
        None,
        ("</s>",),
        False,
        True,
    ),
    "ALPACA": (
        "<s>",
        "</s>",
        "{{ if .System }}{{ .System }}{{ end }}\n\n### Instruction:\n{{ .Prompt }}\n\n### Response:\n"
        "{{ .Response }}</s>",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
        ("</s>",),
        False,
        True,
    ),
}
NO_SYSTEM = {"MISTRAL", "GEMMA2"}
WRITES_BOS = {"LLAMA3", "LLAMA31", "MISTRAL", "LLAMA2", "GEMMA2", "GEMMA3"}


def renderer(template, bos=None, eos="</s>"):
    compiled = _compile_jinja_template(template)
    return lambda messages, generation, **variables: compiled.render(
        messages=messages, add_generation_prompt=generation, bos_token=bos, eos_token=eos, **variables
    )


def made(name, **changes):
    bos, eos = SHAPES[name][:2]
    settings = {"bos_token": bos, "eos_token": eos, "adds_bos": bos is not None, **changes}
    return convert(renderer(getattr(published, name), bos, eos), **settings)


@pytest.mark.parametrize("name", SHAPES)
def test_published_templates(name):
    _, _, go, system, stop, trims, multi_turn = SHAPES[name]
    got = made(name)
    assert got.go == go
    assert (got.system, got.stop, got.trims, got.multi_turn) == (system, stop, trims, multi_turn)
    assert got.text.count("{prompt}") == 1 and got.text == evaluate(go, system=system or "", prompt="{prompt}")


@given(st.text(max_size=60), st.sampled_from([None, "Be brief.", "Two\n\nlines, {{b}} and {c} 🙂"]))
@pytest.mark.parametrize("name", SHAPES)
def test_whatever_the_user_says(name, prompt, system):
    """Jinja and Go agree; where the template trims, for messages without blanks at their ends."""
    bos, eos = SHAPES[name][:2]
    got = made_once(name)
    if not prompt.strip() or (system and name in NO_SYSTEM):
        return
    said = prompt.strip() if got.trims else prompt
    lead = bos if bos and name in WRITES_BOS else ""
    expected = renderer(getattr(published, name), bos, eos)(conversation(said, system), True)
    assert lead + evaluate(got.go, system=system or got.system or "", prompt=said) == expected


@functools.cache
def made_once(name):
    return made(name)


@pytest.mark.parametrize("name", sorted(set(SHAPES) - NO_SYSTEM))
def test_a_system_message_is_in_the_text_trained_on_and_in_the_modelfile(name):
    got = made(name, system="Answer with a number.")
    assert got.system == "Answer with a number." and got.go == SHAPES[name][2]
    assert got.text == evaluate(got.go, system=got.system, prompt="{prompt}")
    spec = ModelfileSpec("./m.gguf", got.go, got.stop, num_ctx=8, temperature=0.0, system=got.system)
    assert parse_modelfile(render_modelfile(spec)) == spec


@pytest.mark.parametrize("name", sorted(NO_SYSTEM))
def test_a_system_message_is_refused_where_there_is_none(name):
    with pytest.raises(TemplateError, match=r"takes no system message; leave out prompt\.system"):
        made(name, system="Answer with a number.")


@pytest.mark.parametrize("name", SHAPES)
def test_bos_comes_once_whoever_writes_it(name):
    bos = SHAPES[name][0]
    if bos is None:
        return
    added, written = made(name, adds_bos=True), made(name, adds_bos=False)
    assert bos not in added.go and bos not in added.text
    assert written.text == (bos if name in WRITES_BOS else "") + added.text
    assert evaluate(written.go, system="s", prompt="p").count(bos) == (name in WRITES_BOS)
    check_bos(added.go, True, bos)
    if name in WRITES_BOS:
        with pytest.raises(ModelfileError, match="twice"):
            check_bos(written.go, True, bos)


@pytest.mark.parametrize("name", [n for n in SHAPES if SHAPES[n][-1]])
def test_several_turns(name):
    bos, eos = SHAPES[name][:2]
    got, render = made(name), renderer(getattr(published, name), bos, eos)
    turns = [("One?", "1."), ("Two\n\nlines?", "2 {{.}}"), ("Three?", "3")]
    expected = render(conversation("Last?", None, turns), True)
    assert (bos or "") * (name in WRITES_BOS) + converse(got.go, turns, "Last?", got.system or "") == expected


def said_about(template, **changes):
    settings = {"bos_token": "<s>", "eos_token": "</s>", "adds_bos": True, **changes}
    with pytest.raises(TemplateError) as caught:
        convert(renderer(template, "<s>"), **settings)
    return str(caught.value)


TURN = "{{% for m in messages %}}{}{{% endfor %}}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (TURN.format("{{ m.content | upper }}"), "changes the user's text"),
        (TURN.format("{{ m.content }}{{ m.content }}"), "repeats it"),
        ("hello", "leaves it out"),
        (TURN.format("[{{ m.content | replace('\"', '\\'') }}]"), "depends on what the message says"),
        (TURN.format("{% if m.content | length > 200 %}long: {% endif %}{{ m.content }}!"), "depends on what"),
        (TURN.format("{{ '<b>' if '\\n' in m.content else '' }}{{ m.content }}!"), "with blanks at its ends"),
        (TURN.format("[{{ m.content | e }}]"), "depends on what"),
        (TURN.format("[{{ m.content | replace('\\t', ' ') }}]"), "with blanks at its ends"),
        (TURN.format("{{ '{{' }}{{ m.content }}"), "Ollama's template language would run"),
        (TURN.format("{{ '{' }}{{ m.content }}"), "cannot be written|would run"),
        (TURN.format("use {prompt}: {{ m.content }}"), r"holds \{prompt\}"),
        (TURN.format('"""{{ m.content }}"""'), 'cannot be written into a Modelfile: .*"""'),
        (TURN.format("a\u00a0b{{ m.content }}"), "U\\+00A0"),
        (TURN.format("{{ raise_exception('tools are missing') }}"), "does not render .*: tools are missing"),
        (TURN.format("{{ functions[0].name }}{{ m.content }}"), "does not render"),
        (TURN.format("{{ m.content[0].text }}"), "does not render|changes the user's text"),
        ("<s>" + TURN.format("<s>{{ m.content }}"), "twice"),
    ],
)
def test_refused_with_the_reason(template, said):
    assert re.search(said, said_about(template), re.DOTALL), said_about(template)


def test_a_date_of_the_day_is_refused_and_the_text_to_write_instead_is_named():
    said = said_about(published.LLAMA32)
    assert "date of the day" in said and "Today Date: 26 Jul 2024" in said and "{prompt}<|eot_id|>" in said
    assert "write the text itself as prompt.template" in said


@pytest.mark.parametrize("system", ["", " x", "x\n"])
def test_a_system_message_with_blanks_at_its_ends_is_refused(system):
    assert "prompt.system" in said_about(published.CHATML, system=system)


def test_the_evaluator_is_ollamas_reading():
    go = "a{{ if .System }}[{{ .System }}]{{ else }}-{{ end }}{{ .Prompt }}:{{ .Response }};"
    assert evaluate(go, prompt="p") == "a-p:" == evaluate(go, prompt="p", system="")
    assert evaluate(go, system="s", prompt="{{ .System }}", response="r") == "a[s]{{ .System }}:r;"
    assert converse(go, [("p", "r"), ("q", "")], "z", "s") == "a[s]p:r;a-q:;a-z:"
    assert converse("{{ .Prompt }}!", [("p", "r")], "q") == "p!rq!"  # Ollama adds {{ .Response }} at the end


@pytest.mark.parametrize(
    "go",
    [
        "{{.Prompt}}",
        "{{- .Prompt }}",
        "{{ .Messages }}",
        "{{{ .Prompt }}",
        "{{ .Prompt",
        "{{ end }}",
        "{{ else }}",
        "{{ if .System }}{{ .Prompt }}",
        "{{ if .System }}{{ if .System }}{{ end }}{{ end }}",
    ],
)
def test_the_evaluator_refuses_what_it_does_not_know(go):
    with pytest.raises(GoTemplateError):
        evaluate(go, prompt="p")
