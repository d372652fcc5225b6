"""A chat template is converted right, or refused with the reason."""

import copy
import functools
import json
import re
import shutil

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template

from export import ExportError
from export.engines.engine import conversation
from export.go import CONTENT, END, LAST, MESSAGES, SYSTEM, go_template, render_go
from export.modelfile import Serving
from export.served import read_references
from export.template import convert, from_tokenizer
from pipelines import train
from pipelines.check import parse_params
from pipelines.params import ConfigError
from tests.export import chat_templates as published
from tests.export.verify_runs import add_adapter, without_prefix

CHATML = (
    "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n{{ else }}<|im_start|>user\n"
    '{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}{{ .Content }}{{ else if eq .Role "assistant" }}<|im_end|>\n'
    "<|im_start|>assistant\n{{ .Content }}<|im_end|>\n<|im_start|>user\n{{ end }}{{ end }}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
# Name → (BOS, EOS, stop words, what holds of it: it trims messages, it takes a system message, it writes BOS).
SHAPES = {
    "LLAMA3": ("<|begin_of_text|>", "<|eot_id|>", ["<|eot_id|>"], "trims system bos"),
    "LLAMA31": ("<|begin_of_text|>", "<|eot_id|>", ["<|eot_id|>"], "trims system bos"),
    "CHATML": (None, "<|endoftext|>", ["<|im_end|>", "<|endoftext|>"], "system"),
    "QWEN2": (None, "<|im_end|>", ["<|im_end|>"], "system"),
    "MISTRAL": ("<s>", "</s>", ["</s>"], "bos"),
    "LLAMA2": ("<s>", "</s>", ["</s>"], "trims system bos"),
    "GEMMA2": ("<bos>", "<eos>", ["<end_of_turn>", "<eos>"], "trims bos"),
    "PHI3": ("<s>", "<|endoftext|>", ["<|end|>", "<|endoftext|>"], "system"),
    "ALPACA": ("<s>", "</s>", ["</s>"], "system"),
}


def named(word):
    return [name for name in SHAPES if word in SHAPES[name][-1].split()]


def renderer(template, bos=None, eos="</s>"):
    compiled = _compile_jinja_template(template)
    return lambda messages, generation, **variables: compiled.render(
        messages=messages, add_generation_prompt=generation, bos_token=bos, eos_token=eos, **variables
    )


@functools.cache
def made(name, **changes):
    bos, eos = SHAPES[name][:2]
    settings = {"bos_token": bos, "eos_token": eos, "adds_bos": bos is not None, **changes}
    return convert(renderer(getattr(published, name), bos, eos), **settings)


def rendered(name, system, prompt, turns=()):
    """What the published template makes of it, without the BOS that the tokenizer puts there."""
    bos, eos = SHAPES[name][:2]
    text = renderer(getattr(published, name), bos, eos)(conversation(prompt, system, turns), True)
    return text.removeprefix(bos) if name in named("bos") else text


@pytest.mark.parametrize("name", SHAPES)
def test_published_templates(name):
    stop, asked = SHAPES[name][2], "Answer with a number."
    for system in (None, asked) if name in named("system") else (None,):
        got = made(name, system=system)
        assert (list(got.stop), got.system) == (stop, system)
        assert got.text == render_go(got.go, conversation("{prompt}", system)) and "{prompt}" in got.text
        assert got.go == CHATML or name != "CHATML"
        Serving(template=got.text, go=got.go, stop=stop, num_ctx=8, system=got.system).check()


@given(st.text(max_size=60), st.sampled_from([None, "Be brief.", "Two\n\nlines, {{b}} and {c} 🙂"]))
@pytest.mark.parametrize("name", SHAPES)
def test_whatever_the_user_says(name, prompt, system):
    """Jinja and Go agree; where the template trims, for messages without blanks at their ends."""
    got = made(name)
    if not prompt.strip() or (system and name not in named("system")):
        return
    said = prompt.strip() if name in named("trims") else prompt
    assert render_go(got.go, conversation(said, system)) == rendered(name, system, said)


def test_earlier_answers_without_an_end_of_turn_are_not_learnt():
    words = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    words += "{% if add_generation_prompt %}assistant: {% endif %}"
    found = convert(renderer(words), bos_token=None, eos_token="</s>", adds_bos=False)
    assert "{{ .Content }}" in found.go and found.end is None, "conversations are served, and none is trained on"


@pytest.mark.parametrize("name", [name for name in SHAPES if SHAPES[name][0]])
def test_bos_comes_once_whoever_writes_it(name):
    bos, writes = SHAPES[name][0], name in named("bos")
    added, written = made(name, adds_bos=True), made(name, adds_bos=False)
    assert bos not in added.text
    assert written.text == bos * writes + added.text
    assert render_go(written.go, conversation("p", "s")).count(bos) == writes


def test_several_turns():
    turns = [("One?", "1."), ("Two\n\nlines?", "2 {{.}} {% x %}"), ("Three?", "3")]
    for name in SHAPES:
        for system in (None, "Be {{brief}}.") if name in named("system") else (None,):
            expected = rendered(name, system, "Last?", turns)
            assert render_go(made(name).go, conversation("Last?", system, turns)) == expected, name


def test_where_conversations_would_come_out_otherwise_the_last_question_is_asked_alone():
    """This one writes the system message into the last user's turn, as newer ones of Mistral."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{% if loop.last and messages[0].role == 'system' %}"
        "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %}"
        "{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    got = convert(renderer(template), bos_token=None, eos_token="</s>", adds_bos=False, system="Be brief.")
    assert render_go(got.go, conversation("b", "S", [("a", "1")])) == "[INST]S\n\nb[/INST]"
    assert render_go(got.go, conversation("b", None, [("a", "1")])) == "[INST]b[/INST]"
    assert got.stop == ("</s>",)


def said_about(template, **changes):
    settings = {"bos_token": "<s>", "eos_token": "</s>", "adds_bos": True, **changes}
    with pytest.raises(ExportError) as caught:
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


def test_a_system_message_with_blanks_at_its_ends_is_refused():
    for system in ("", " x", "x\n"):
        assert "prompt.system" in said_about(published.CHATML, system=system)


def test_go_is_read_as_ollama_reads_it():
    """What Go's text/template made of them behind Ollama's own preparations."""
    asked = [*conversation("{{ .System }}", "s1"), *conversation("u2", "s2", [("{% q %}", 'a"')])]
    go = "a{{ if .System }}[{{ .System }}]{{ else }}-{{ end }}"
    last = go + go_template("Q: {prompt} ")
    assert render_go(last, asked) == "a[s1\n\ns2]Q: u2 " and render_go(last, asked[:1]) == "a[s1]Q:  "
    assert render_go(last, conversation("a") * 2) == "a-Q: a\n\na "
    whole = go + '{{ range .Messages }}{{ if eq .Role "user" }}<{{ .Content }}>{{ else if eq .Role "assistant" }}'
    whole += "{{ .Content }}{{ end }}{{ end }}"
    assert render_go(whole, asked) == 'a[s1\n\ns2]<{{ .System }}><{% q %}>a"<u2>'


def test_go_that_this_project_never_writes_is_refused():
    single = ("{{.Prompt}}", "{{- .Prompt }}", "{{{ .Prompt }}", "{{ .Prompt", "{{ end }}", "{{ else }}", LAST)
    blocks = ("{{ if .System }}{{ .Prompt }}", "{{ if .System }}{{ else }}{{ else }}{{ end }}", CONTENT)
    for go in (*single, *blocks, MESSAGES, MESSAGES + SYSTEM + END, MESSAGES + END + "{{ .Prompt }}"):
        with pytest.raises(ExportError):
            render_go(go, conversation("p", "s"))


# --- a tokenizer's own -----------------------------------------------------------------------------------------------

ASKED = ["What is 2 + 2?", "Two\n\nlines: {a} {{b}}, 'c' \"d\" é 漢字 🙂", "12 34"]


@pytest.fixture
def load(base_dir, tmp_path):
    """A tokenizer with a chat template, with or without the blank in front and BOS."""

    def make(template, *, blank=False, adds_bos=True):
        out = tmp_path / "tokenizer"
        (shutil.copytree if blank else without_prefix)(base_dir, out)
        if not adds_bos:
            tokenizer = json.loads((out / "tokenizer.json").read_text())
            (out / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert (tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id) is adds_bos
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = template
        return tokenizer

    return make


def same_ids(tokenizer, made, system=None):
    for prompt in ASKED:
        chat = tokenizer.apply_chat_template(conversation(prompt, system), add_generation_prompt=True)["input_ids"]
        if tokenizer(made.text.replace("{prompt}", prompt))["input_ids"] != chat:
            return False
    return True


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("name", ["MISTRAL", "GEMMA2", "LLAMA3"])
def test_ids_are_those_of_the_chat_template_whoever_writes_bos(load, name, adds_bos):
    tokenizer = load(getattr(published, name), adds_bos=adds_bos)
    made = from_tokenizer(tokenizer)
    assert made.text.startswith("<s>") is not adds_bos
    assert same_ids(tokenizer, made)


def test_system_message_and_special_tokens(load):
    tokenizer = load("{{ bos_token }}" + published.QWEN2)
    made = from_tokenizer(tokenizer, "Be brief.")
    assert made.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n") and made.stop == ("<|im_end|>", "</s>")
    assert same_ids(tokenizer, made, "Be brief.") and not same_ids(tokenizer, made, "Be long.")


def test_tokenizers_that_cannot_serve_their_template_are_refused(load, tmp_path):
    refused = {
        r"does not write <s>.* add_bos_token to false .*im_start.*\{prompt\}": {"template": published.CHATML},
        r"other tokens .*blank .*prompt\.template: '\[INST\] \{prompt\} \[/INST\]'": {
            "template": published.MISTRAL, "blank": True},
        "no chat template; write the text as prompt.template": {"template": None},
    }  # fmt: skip
    for said, settings in refused.items():
        with pytest.raises(ExportError, match=said):
            from_tokenizer(load(**settings))
        shutil.rmtree(tmp_path / "tokenizer")
    tokenizer = load(published.CHATML, adds_bos=False)
    assert same_ids(tokenizer, from_tokenizer(tokenizer)), "without that BOS it is taken"


# --- the stages ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(chat_base_dir, tmp_path_factory):
    """The folder and settings of a smoke run up to the base's export, its base one with a chat template."""
    from pipelines import base_texts, export, prepare_base, prepare_data, profile

    raw = yaml.safe_load(profile.compose("smoke"))
    raw["prepare_base"]["source"] = str(chat_base_dir)
    raw["prompt"] = {"template": "chat", "system": "Answer the question."}
    raw["export"]["license"] = "MIT"
    raw["train"]["max_steps"] = 4
    raw["evaluate"]["backend"] = "llama_cpp"
    params = parse_params(raw)
    work = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        prepare_data.run(params)
        with pytest.raises(ConfigError, match=r"chat template.*dvc repro prepare_base"):
            train.run(params, "baseline_lora", 0)
        prepare_base.run(params)
        base_texts.run(params)
        export.run(params, "base", 0)
    return work, raw


@pytest.fixture
def project(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(finished[0], tmp_path / "work"))
    return tmp_path / "work", copy.deepcopy(finished[1])


def test_all_stages_read_the_same_text(project):
    from pipelines import evaluate, export, verify

    work, raw = project
    params = parse_params(raw)
    for stage in (train, export, evaluate, verify):
        stage.run(params, "baseline_lora", 0)
    text = (
        "<|im_start|>system\nAnswer the question.<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    records = [work / part / "baseline_lora/0/run.json" for part in ("adapters", "gguf", "scores")]
    assert [json.loads(record.read_text())["prompt_template"] for record in records] == [text] * 3
    assert train.examples("train", "chat") == train.examples("train", text)
    out = work / "gguf/baseline_lora/0"
    assert {row["counted"] for row in json.loads((out / "parity.json").read_text())["rows"]} == {1.0}
    serving = Serving.read(out / "serving.json")
    second = read_references(out)[-1]
    [[question, answer]] = second.turns
    told = f"{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n<|im_start|>user\n{second.prompt}"
    assert second.rendered == text.replace("{prompt}", told)
    assert (serving.go_template, serving.system, serving.license) == (CHATML, "Answer the question.", "MIT")
    assert serving.stop == ["<|im_end|>", "</s>"]

    raw["prompt"]["system"] = "Another one."
    with pytest.raises(ConfigError, match=r"prompt\.system: .*'Answer the question\.', got 'Another one\.'"):
        train.run(parse_params(raw), "baseline_lora", 0)


def test_an_adapter_that_can_only_be_merged_is_exported_with_a_notice(project, capsys):
    from pipelines import export

    work, raw = project
    base = raw["prepare_base"]["source"]
    adapter = add_adapter(base, work / "adapters/baseline_lora/0", use_dora=True, modules_to_save=["lm_head"])
    AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
    export.run(parse_params(raw), "baseline_lora", 0)
    assert "a GGUF adapter would lose use_dora" in capsys.readouterr().out
    out = work / "gguf/baseline_lora/0"
    assert not (out / "adapter.gguf").exists() and (out / "model.gguf").is_file()
    assert [row["mode"] for row in json.loads((out / "parity.json").read_text())["rows"]] == ["merged"]
    extra = json.loads((out / "run.json").read_text())["extra"]
    assert "would lose use_dora" in extra["only_merged"] and "modules_to_save ['lm_head']" in extra["only_merged"]
