"""Stage quantize on a real, small export: what it measures, what it leaves behind, and what stops it."""

import json
import shutil

import llama_cpp
import pytest

from db.records import QuantizedRecord, QuantizedSampleRecord
from export import ExportError, gguf
from pipelines import export, quantize
from pipelines.check import parse_params
from pipelines.params import ConfigError

OUT = "quantized/baseline_lora/0"


@pytest.fixture(scope="module")
def raw(smoke_raw):
    return {**smoke_raw, "prepare_data": {**smoke_raw["prepare_data"], "test_items": 12}}


@pytest.fixture(scope="module")
def project(make_project, raw):
    return make_project(raw, export.run)


def with_types(raw, *types):
    return parse_params({**raw, "quantize": {"types": list(types)}})


def results(folder):
    rows = QuantizedRecord.model_validate_json((folder / OUT / "quantized.json").read_text()).rows
    lines = (folder / OUT / "quantized_samples.jsonl").read_text().splitlines()
    return rows, [QuantizedSampleRecord.model_validate_json(line) for line in lines]


def content(folder):
    return {f.name: f.read_bytes() for f in (folder / OUT).iterdir()}


def test_every_precision_is_measured_on_the_test_items(here, raw, monkeypatch):
    monkeypatch.delattr("db.files.torch_device")  # the work is llama.cpp's, and so is the device
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    quantize.run(with_types(raw, "bf16", "f16", "q8_0", "q4_K_M"), "baseline_lora", 0)
    rows, samples = results(here)
    assert [row.type for row in rows] == ["f16", "bf16", "q8_0", "q4_K_M"], "f16 once, and first"
    f16, bf16, q8, q4 = rows
    assert f16.bytes == (here / "gguf/baseline_lora/0/model.gguf").stat().st_size
    assert f16.bytes == pytest.approx(bf16.bytes, rel=0.01) and f16.bytes > q8.bytes > q4.bytes
    assert 16 < bf16.bits_per_weight < 16.2 and 8.5 < q8.bits_per_weight < 8.7
    assert set(bf16.tensor_types) == {"BF16", "F32"} and set(q8.tensor_types) == {"Q8_0", "F32"}
    # Rows of 64 and 128 hold no block of 256.
    assert q4.fallbacks >= 14 and "Q4_K" not in q4.tensor_types and (f16.fallbacks, q8.fallbacks) == (0, 0)
    items = [json.loads(line)["id"] for line in open("data/test.jsonl", encoding="utf-8")]
    for row in rows:
        mine = [s for s in samples if s.type == row.type]
        assert [s.item_id for s in mine] == items and len(mine) == row.n == 12
        assert sum(s.correct for s in mine) == row.correct
        first = [s.answer for s in samples if s.type == "f16"]
        assert row.answers_equal_to_f16 == sum(a.answer == b for a, b in zip(mine, first, strict=True)) / 12
    assert {f.name for f in (here / OUT).iterdir()} == {"quantized.json", "quantized_samples.jsonl", "run.json"}
    record = json.loads((here / OUT / "run.json").read_text())
    assert (record["stage"], record["status"], record["arm"]) == ("quantize", "finished", "baseline_lora")
    assert "gguf/baseline_lora/0/model.gguf" in record["inputs"] and "data/test.jsonl" in record["inputs"]
    assert (record["device"]["class"] == "cuda") == llama_cpp.llama_supports_gpu_offload()
    assert record["device"]["threads"] == 1


def test_where_the_export_kept_no_f16_it_is_made_anew_and_one_file_is_on_the_disk_at_a_time(here, raw, monkeypatch):
    exported = (here / "gguf/baseline_lora/0/model.gguf").read_bytes()
    export.run(parse_params({**raw, "export": {**raw["export"], "quantization": "q8_0"}}), "baseline_lora", 0)
    assert (here / "gguf/baseline_lora/0/model.gguf").read_bytes() != exported
    make, seen = gguf.quantize, []

    def watched(source, out, precision):
        assert source.read_bytes() == exported
        seen.append(sorted(f.name for f in out.parent.iterdir()))
        return make(source, out, precision)

    monkeypatch.setattr(gguf, "quantize", watched)
    quantize.run(with_types(raw, "bf16", "q8_0"), "baseline_lora", 0)
    assert seen == [["model-f16.gguf"]] * 2, "the one before is gone"
    assert results(here)[0][0].bytes == len(exported)


def test_nothing_exported(here, raw):
    shutil.rmtree(here / "gguf/baseline_lora/0")
    with pytest.raises(ConfigError, match=r"gguf/baseline_lora/0: .*`dvc repro export`"):
        quantize.run(with_types(raw), "baseline_lora", 0)
    with pytest.raises(ConfigError, match="unknown arm 'magic'"):
        quantize.run(with_types(raw), "magic", 0)
    assert not (here / OUT).exists()


def test_a_damaged_export_is_named_and_the_old_results_stand(here, raw):
    quantize.run(with_types(raw), "baseline_lora", 0)
    before, file = content(here), here / "gguf/baseline_lora/0/model.gguf"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ExportError, match=r"model\.gguf: expected a GGUF file"):
        quantize.run(with_types(raw), "baseline_lora", 0)
    gguf.quantize(here / "gguf/base/0/model.gguf", file, "q8_0")
    with pytest.raises(ExportError, match=r"model\.gguf: expected a model in f16, found {'Q8_0'"):
        quantize.run(with_types(raw), "baseline_lora", 0)
    assert content(here) == before


def test_types_that_cannot_be_had_stop_before_any_work(raw):
    for types, words in (
        (["q8_0", "iq2_xxs"], r"quantize\.types\.1: 'iq2_xxs' cannot be used"),
        (["q8_0", "q8_0"], r"quantize\.types: expected each once, got \['q8_0', 'q8_0'\]"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_params({**raw, "quantize": {"types": types}})
    with pytest.raises(ConfigError, match=r"export\.quantization: 'iq1_s' cannot be used"):
        parse_params({**raw, "export": {**raw["export"], "quantization": "iq1_s"}})
