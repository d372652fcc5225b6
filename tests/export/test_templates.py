"""A chat template is converted right, or refused with the reason."""

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

from export import gguf
from export.modelfile import ModelfileError, Serving, check_bos
from export.template import GoTemplateError, TemplateError, conversation, converse, convert, evaluate, from_tokenizer
from tests.export import chat_templates as published
from tests.export import fast_convert
from tests.export.bare_tokenizer import without_prefix
from trainers.base import train_tokenizer

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
    "QWEN2": (None, "<|im_end|>", CHATML, "You are a helpful assistant.", ("<|im_end|>",), False, True),
    "MISTRAL": ("<s>", "</s>", "[INST] {{ .Prompt }} [/INST]{{ .Response }}</s>", None, ("</s>",), False, True),
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
WRITES_BOS = {"LLAMA3", "LLAMA31", "MISTRAL", "LLAMA2", "GEMMA2"}


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


@pytest.mark.parametrize("name", SHAPES)
def test_published_templates(name):
    got, (_, _, go, system, *rest) = made(name), SHAPES[name]
    assert (got.go, got.system, got.stop, got.trims, got.multi_turn) == (go, system, *rest)
    assert got.text.count("{prompt}") == 1 and got.text == evaluate(go, system=system or "", prompt="{prompt}")


@given(st.text(max_size=60), st.sampled_from([None, "Be brief.", "Two\n\nlines, {{b}} and {c} 🙂"]))
@pytest.mark.parametrize("name", SHAPES)
def test_whatever_the_user_says(name, prompt, system):
    """Jinja and Go agree; where the template trims, for messages without blanks at their ends."""
    bos, eos = SHAPES[name][:2]
    got = made(name)
    if not prompt.strip() or (system and name in NO_SYSTEM):
        return
    said = prompt.strip() if got.trims else prompt
    lead = bos if bos and name in WRITES_BOS else ""
    expected = renderer(getattr(published, name), bos, eos)(conversation(said, system), True)
    assert lead + evaluate(got.go, system=system or got.system or "", prompt=said) == expected


@pytest.mark.parametrize("name", sorted(set(SHAPES) - NO_SYSTEM))
def test_a_system_message_is_in_the_text_trained_on_and_in_the_modelfile(name):
    got = made(name, system="Answer with a number.")
    assert got.system == "Answer with a number." and got.go == SHAPES[name][2]
    assert got.text == evaluate(got.go, system=got.system, prompt="{prompt}")
    Serving(template=got.text, go=got.go, stop=list(got.stop), num_ctx=8, system=got.system).check()


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


# --- a tokenizer's own -----------------------------------------------------------------------------------------------

ASKED = ["What is 2 + 2?", "Two\n\nlines: {a} {{b}}, 'c' \"d\" é 漢字 🙂", "12 34"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([f"the sum of {i} and {i * 7} is {i * 8}" for i in range(300)], 400, made)
    return made


@pytest.fixture
def load(folder, tmp_path):
    """A tokenizer with a chat template, with or without the blank in front and BOS."""

    def make(template, *, blank=False, adds_bos=True):
        out = tmp_path / "tokenizer"
        if blank:
            shutil.copytree(folder, out)
        else:
            without_prefix(folder, out)
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
        with pytest.raises(TemplateError, match=said):
            from_tokenizer(load(**settings))
        shutil.rmtree(tmp_path / "tokenizer")
    tokenizer = load(published.CHATML, adds_bos=False)
    assert same_ids(tokenizer, from_tokenizer(tokenizer)), "without that BOS it is taken"


@pytest.fixture
def chat_base(base_dir, tmp_path):
    base = without_prefix(base_dir, tmp_path / "chat-base")
    (base / "chat_template.jinja").write_text("{{ bos_token }}" + published.ALPACA, encoding="utf-8")
    return base


def test_tokens_beyond_the_sentencepiece_model_reach_the_gguf(base_dir, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    from export.engines.llama_cpp import LlamaCppEngine

    monkeypatch.setattr(gguf, "_convert", fast_convert.convert)
    base = without_prefix(base_dir, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = "{{ bos_token }}" + published.CHATML
    tokenizer.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(base)
    gguf.save_merged(str(base), None, tmp_path / "m/model", {})
    gguf.convert_model(tmp_path / "m/model", tmp_path / "m.gguf", "m")
    made = from_tokenizer(tokenizer)
    engine = LlamaCppEngine(tmp_path / "m.gguf", made.text, num_ctx=256)
    for prompt in ASKED:
        text = made.text.replace("{prompt}", prompt)
        assert engine.tokenize(text) == tokenizer(text)["input_ids"]
    engine.close()


@pytest.fixture
def project(chat_base, tmp_path, monkeypatch):
    """A folder of one's own, and the smoke profile's params.yaml on that base."""
    from pipelines import profile

    monkeypatch.setattr(gguf, "_convert", fast_convert.convert)
    raw = yaml.safe_load(profile.compose("smoke"))
    raw["prepare_base"]["source"] = str(chat_base)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work", raw


def test_all_stages_read_the_same_text(project):
    from pipelines import evaluate, export, prepare_base, prepare_data, train
    from pipelines.check import parse_params
    from pipelines.params import ConfigError

    work, raw = project
    raw["prompt"] = {"template": "chat", "system": "Answer the question."}
    raw["export"]["license"] = "MIT"
    raw["train"]["max_steps"] = 30
    raw["evaluate"]["backend"] = "llama_cpp"
    params = parse_params(raw)
    prepare_data.run(params)
    with pytest.raises(ConfigError, match="chat template there, found none; run `dvc repro prepare_base`"):
        train.run(params, "baseline_lora", 0)
    prepare_base.run(params)
    train.run(params, "baseline_lora", 0)
    for arm in ("base", "baseline_lora"):
        export.run(params, arm, 0)
        evaluate.run(params, arm, 0)

    text = "Answer the question.\n\n### Instruction:\n{prompt}\n\n### Response:\n"
    records = [json.loads((work / f"{part}/baseline_lora/0/run.json").read_text()) for part in
               ("adapters", "gguf", "scores")]  # fmt: skip
    assert [record["prompt_template"] for record in records] == [text] * 3
    assert train.examples("train", "chat") == train.examples("train", text)
    out = work / "gguf/baseline_lora/0"
    assert json.loads((out / "parity.json").read_text())["token_ids_equal"] == 1.0
    serving = Serving.read(out / "serving.json")
    assert serving.go_template == (
        "{{ if .System }}{{ .System }}{{ end }}\n\n### Instruction:\n{{ .Prompt }}\n\n### Response:\n"
        "{{ .Response }}</s>"
    )
    assert (serving.system, serving.license, serving.stop) == ("Answer the question.", "MIT", ["</s>"])

    raw["prompt"]["system"] = "Another one."
    with pytest.raises(ConfigError, match=r"prompt\.system: .*'Answer the question\.', got 'Another one\.'"):
        train.run(parse_params(raw), "baseline_lora", 0)


def test_an_adapter_that_can_only_be_merged_is_exported_with_a_notice(project, chat_base, capsys):
    from pipelines import export, prepare_base, prepare_data
    from pipelines.check import parse_params
    from tests.export.test_export_architectures import add_adapter

    work, raw = project
    params = parse_params(raw)
    prepare_data.run(params)
    prepare_base.run(params)
    adapter = add_adapter(chat_base, work / "adapters/baseline_lora/0", use_dora=True, modules_to_save=["lm_head"])
    AutoTokenizer.from_pretrained(chat_base).save_pretrained(adapter)
    export.run(params, "base", 0)
    export.run(params, "baseline_lora", 0)
    assert "no GGUF adapter, it would lose use_dora" in capsys.readouterr().out
    out = work / "gguf/baseline_lora/0"
    assert not (out / "adapter.gguf").exists() and (out / "model.gguf").is_file()
    assert json.loads((out / "parity.json").read_text())["pairs"].keys() == {"hf/merged_gguf"}
    extra = json.loads((out / "run.json").read_text())["extra"]
    assert len(extra["only_merged"]) == 2 and "modules_to_save ['lm_head']" in extra["only_merged"][1]
