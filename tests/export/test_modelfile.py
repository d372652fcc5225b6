"""A Modelfile reads back as what was meant, or is refused by name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.modelfile import (
    ModelfileError,
    ModelfileSpec,
    check_bos,
    go_template,
    parse_modelfile,
    render_modelfile,
)

TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"
GO = "### Instruction:\n{{ .Prompt }}\n\n### Response:\n"


def spec(**changes: object) -> ModelfileSpec:
    fields: dict = {
        "from_path": "./model.gguf",
        "template": GO,
        "stop": ["###"],
        "num_ctx": 512,
        "temperature": 0.0,
    }
    return ModelfileSpec(**{**fields, **changes})


def test_go_template_keeps_every_other_character():
    assert go_template(TEMPLATE) == GO
    assert go_template("{prompt}") == "{{ .Prompt }}"
    assert go_template("a } b { {prompt} %s \n") == "a } b { {{ .Prompt }} %s \n"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("no slot", "found it 0 times"),
        ("{prompt}{prompt}", "found it 2 times"),
        ("{{ .System }}{prompt}", "'{{'"),
        ("{{prompt}}", "'{{'"),
    ],
)
def test_go_template_refuses(template, said):
    with pytest.raises(ModelfileError, match=said):
        go_template(template)


def test_the_text_is_what_ollama_documents():
    text = render_modelfile(spec(num_predict=8, stop=["###", 'say "x"', "\n\n"], adapter_path="./adapter.gguf"))
    assert text == (
        "FROM ./model.gguf\n"
        "ADAPTER ./adapter.gguf\n"
        'TEMPLATE """### Instruction:\n{{ .Prompt }}\n\n### Response:\n"""\n'
        "PARAMETER num_ctx 512\n"
        "PARAMETER temperature 0.0\n"
        "PARAMETER num_predict 8\n"
        "PARAMETER repeat_penalty 1.0\n"
        'PARAMETER stop "###"\n'
        'PARAMETER stop """say "x""""\n'
        'PARAMETER stop """\n\n"""\n'
    )


def test_parser_follows_ollamas_grammar():
    text = (
        "# a comment\n\nfrom ./a b.gguf\nParameter  num_ctx  64\nPARAMETER temperature 1\n"
        'TEMPLATE "x\n{{ .Prompt }} y\n"\nPARAMETER stop </s>\nSYSTEM   """\n a"b """\n'
    )
    with pytest.raises(ModelfileError, match="system"):
        parse_modelfile(text)  # the template has no .System
    got = parse_modelfile(text.replace("y\n", "{{ .System }}\n"))
    assert (got.from_path, got.num_ctx, got.temperature) == ("./a b.gguf", 64, 1.0)
    assert got.template == "x\n{{ .Prompt }} {{ .System }}\n" and got.stop == ("</s>",) and got.system == '\n a"b '
    assert got.repeat_penalty is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("FROM ./m.gguf\n", "expected template, num_ctx, temperature"),
        ('FROM ./m.gguf\nTEMPLATE """{{ .Prompt }}\n', "line 2: the quotes are never closed"),
        ("FROM ./m.gguf\nFROM ./n.gguf\n", "line 2: from_path is given twice"),
        ("ADAPTER ./a.gguf\nADAPTER ./b.gguf\n", "adapter_path is given twice"),
        ("FROM ./m.gguf\nPARAMETER num_ctx many\n", "line 2: expected a number for num_ctx, got 'many'"),
        ("FROM ./m.gguf\nPARAMETER num_ctxx 4\n", "got 'parameter num_ctxx'"),
        ("MESSAGE user hi\n", "got 'message'"),
    ],
)
def test_parser_names_line_and_fault(text, said):
    with pytest.raises(ModelfileError, match=said):
        parse_modelfile(text)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"from_path": "model.gguf"}, "from_path"),
        ({"from_path": "./../model.gguf"}, "from_path"),
        ({"from_path": "/abs/model.gguf"}, "from_path"),
        ({"adapter_path": "./adapter/"}, "adapter_path"),
        ({"template": "no slot"}, "found it 0 times"),
        ({"stop": []}, "at least one word"),
        ({"stop": ["a", ""]}, "none empty"),
        ({"stop": ["a", "a"]}, "twice"),
        ({"num_ctx": 0}, "num_ctx"),
        ({"num_predict": 0}, "num_predict"),
        ({"temperature": float("nan")}, "temperature"),
        ({"repeat_penalty": 0.0}, "repeat_penalty"),
        ({"system": "Be brief."}, r"no \{\{ .System \}\}"),
        ({"license": 'a """ b'}, 'license: holds """'),
        ({"stop": ["a\u00a0b"]}, "stop: holds U\\+00A0"),
        ({"license": "a\r\nb"}, "license: holds U\\+000D"),
    ],
)
def test_spec_refuses_by_name(changes, said):
    with pytest.raises(ModelfileError, match=said):
        spec(**changes)


def test_all_faults_are_listed_at_once():
    with pytest.raises(ModelfileError) as caught:
        spec(num_ctx=0, stop=[], temperature=-1.0)
    assert str(caught.value).count("\n  - ") == 3


@pytest.mark.parametrize("token", ["<|begin_of_text|>", "<s>", "<bos>"])
def test_bos_must_not_come_twice(token):
    bad = spec(template=token + GO)
    with pytest.raises(ModelfileError, match="twice") as caught:
        render_modelfile(bad)
    assert token in str(caught.value)
    assert parse_modelfile(render_modelfile(bad, gguf_adds_bos=False)) == bad  # the template's own BOS is the only one
    with pytest.raises(ModelfileError, match="«bos»"):
        check_bos("«bos»{prompt}", gguf_adds_bos=True, bos_token="«bos»")
    check_bos("a " + token, gguf_adds_bos=True)  # not leading


plain = st.text(st.characters(exclude_categories=["C", "Z"], include_characters=' \n\t"#{}'), min_size=1).filter(
    lambda s: '"""' not in s
)


@given(
    before=plain,
    after=plain,
    stop=st.lists(plain, min_size=1, max_size=4, unique=True),
    license=st.none() | plain,
    num_ctx=st.integers(1, 2**31),
    temperature=st.floats(0, 10),
    num_predict=st.none() | st.integers(1, 2**31),
)
def test_any_sayable_spec_reads_back(before, after, stop, license, num_ctx, temperature, num_predict):
    made = spec(
        template=f"{before}{{{{ .Prompt }}}}{after}",
        stop=stop,
        license=license,
        num_ctx=num_ctx,
        temperature=temperature,
        num_predict=num_predict,
    )
    assert parse_modelfile(render_modelfile(made)) == made
