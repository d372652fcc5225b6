"""`prompt.template: chat`: training, scoring and serving read the ids of the tokenizer's own chat template."""

import json
import shutil

import pytest
import yaml
from transformers import AutoTokenizer

from export import gguf
from export.chat import from_tokenizer
from export.modelfile import parse_modelfile
from export.templates import TemplateError, conversation
from tests.export import chat_templates as published
from tests.export import fast_convert
from tests.export.bare_tokenizer import without_prefix
from trainers.embedded_base import train_tokenizer

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
@pytest.mark.parametrize("name", ["MISTRAL", "GEMMA3", "LLAMA3"])
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


def test_a_tokenizer_that_adds_a_bos_which_the_template_has_not_is_refused(load):
    with pytest.raises(TemplateError, match=r"does not write <s>.* add_bos_token to false .*im_start.*\{prompt\}"):
        from_tokenizer(load(published.CHATML))


def test_without_that_bos_it_is_taken(load):
    tokenizer = load(published.CHATML, adds_bos=False)
    assert same_ids(tokenizer, from_tokenizer(tokenizer))


def test_a_tokenizer_that_puts_a_blank_in_front_is_refused(load):
    with pytest.raises(
        TemplateError, match=r"other tokens .*blank .*prompt\.template: '\[INST\] \{prompt\} \[/INST\]'"
    ):
        from_tokenizer(load(published.MISTRAL, blank=True))


def test_no_chat_template(load):
    with pytest.raises(TemplateError, match="no chat template; write the text as prompt.template"):
        from_tokenizer(load(None))


@pytest.fixture
def chat_base(base_dir, tmp_path):
    """The tests' base with a chat template, as a model folder of one's own."""
    base = without_prefix(base_dir, tmp_path / "chat-base")
    (base / "chat_template.jinja").write_text("{{ bos_token }}" + published.ALPACA, encoding="utf-8")
    return base


@pytest.mark.slow
def test_tokens_beyond_the_sentencepiece_model_reach_the_gguf(base_dir, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    from evaluation.backends.llama_cpp import LlamaCppBackend

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
    engine = LlamaCppBackend(tmp_path / "m.gguf", made.text, num_ctx=256)
    for prompt in ASKED:
        text = made.text.replace("{prompt}", prompt)
        assert engine.tokenize(text) == tokenizer(text)["input_ids"]
    engine.close()


@pytest.mark.slow
def test_all_stages_read_the_same_text(chat_base, tmp_path, monkeypatch):
    from pipelines import evaluate, export, prepare_base, prepare_data, profile, train
    from pipelines.config import ConfigError, parse_params

    monkeypatch.setattr(gguf, "_convert", fast_convert.convert)
    raw = yaml.safe_load(profile.compose("smoke"))
    raw["prepare_base"]["source"] = str(chat_base)
    raw["prompt"] = {"template": "chat", "system": "Answer the question."}
    raw["export"]["license"] = "MIT"
    raw["train"]["max_steps"] = 30
    raw["evaluate"]["backend"] = "llama_cpp"
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    params = parse_params(raw)
    prepare_data.run(params)
    with pytest.raises(ConfigError, match="chat template there, found none; run `dvc repro prepare_base`"):
        train.run(params, "baseline_lora", 0)
    prepare_base.run(params)
    train.run(params, "baseline_lora", 0)
    for arm in ("base", "baseline_lora"):
        export.run(params, arm, 0)
        evaluate.run(params, arm, 0, 0)

    text = "Answer the question.\n\n### Instruction:\n{prompt}\n\n### Response:\n"
    records = [json.loads((work / f"{part}/baseline_lora/0/run.json").read_text()) for part in
               ("adapters", "gguf", "scores")]  # fmt: skip
    assert [record["prompt_template"] for record in records] == [text] * 3
    assert train.examples("train", "chat") == train.examples("train", text)
    out = work / "gguf/baseline_lora/0"
    assert json.loads((out / "parity.json").read_text())["token_ids_equal"] == 1.0
    spec = parse_modelfile((out / "Modelfile").read_text())
    assert spec.template == (
        "{{ if .System }}{{ .System }}{{ end }}\n\n### Instruction:\n{{ .Prompt }}\n\n### Response:\n"
        "{{ .Response }}</s>"
    )
    assert (spec.system, spec.license, spec.stop) == ("Answer the question.", "MIT", ("</s>",))

    raw["prompt"]["system"] = "Another one."
    with pytest.raises(ConfigError, match=r"prompt\.system: .*'Answer the question\.', got 'Another one\.'"):
        train.run(parse_params(raw), "baseline_lora", 0)


@pytest.mark.slow
def test_an_adapter_that_can_only_be_merged_is_exported_with_a_notice(chat_base, tmp_path, monkeypatch, capsys):
    from pipelines import export, prepare_base, prepare_data, profile
    from pipelines.config import parse_params
    from tests.export.test_export_architectures import add_adapter

    monkeypatch.setattr(gguf, "_convert", fast_convert.convert)
    raw = yaml.safe_load(profile.compose("smoke"))
    raw["prepare_base"]["source"] = str(chat_base)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
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
