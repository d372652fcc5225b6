"""Real, tiny artifacts that several tests share."""

import json
import os
import random
import shutil
import zlib
from itertools import cycle
from pathlib import Path

import pytest
from filelock import FileLock

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker a core; read when torch is imported. llama.cpp, which asks for a thread a core, heeds the limit only.
    os.environ["OMP_NUM_THREADS"] = os.environ["OMP_THREAD_LIMIT"] = "1"

TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"
SERVED_TOKENS = 6


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make): a folder that make(folder) fills once for all test processes."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def shared(name, make):
        folder, finished = root / name, root / f"{name}.finished"
        with FileLock(root / f"{name}.lock"):
            if not finished.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                finished.touch()
        return folder

    return shared


@pytest.fixture(scope="session")
def base_dir(once, tmp_path_factory):
    """A Llama with a SentencePiece tokenizer, briefly trained on general questions."""
    from evaluation.tasks import general, render
    from trainers.embedded_base import EmbeddedSettings, train_base

    settings = EmbeddedSettings(
        seed=0, vocab_size=512, hidden_size=64, intermediate_size=128, layers=2, heads=2, context=256,
        examples=1600, batch_size=32, learning_rate=3e-3, precision="fp32",
    )  # fmt: skip
    # Drawn here and not by general.questions: tests lean on what so small a base happens to say, which must not change
    # with the rule of what is held out.
    rng = random.Random("general-0-False")
    examples = []
    for name in cycle(general.TRAINING_TURNS):
        prompt, answer = general.GENERAL_TASKS[name](rng)
        while zlib.crc32(prompt.encode()) % 10 == 0:
            prompt, answer = general.GENERAL_TASKS[name](rng)
        examples.append((render(TEMPLATE, prompt), answer))
        if len(examples) == settings.examples:
            break

    def make(folder):
        train_base(settings, examples, folder, tmp_path_factory.mktemp("checkpoints"), folder)

    return once("base", make)


@pytest.fixture(scope="session")
def chat_base_dir(base_dir, once):
    """The same with a chat template whose marks are added tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.export import chat_templates
    from tests.export.verify_runs import without_prefix

    def make(folder):
        base = without_prefix(base_dir, folder / "base")
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = "{{ bos_token }}" + chat_templates.CHATML
        tokenizer.save_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(base)

    return once("chat", make) / "base"


@pytest.fixture(scope="session")
def train_settings():
    from trainers.settings import TrainSettings

    return TrainSettings(
        rank=4, alpha=8, dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"], quantize_base="none",
        max_steps=12, epochs=None, batch_size=4, gradient_accumulation=1, learning_rate=1e-2, lr_scheduler="linear",
        warmup_steps=1, weight_decay=0.0, max_grad_norm=1.0, optimizer="adamw_torch", precision="fp32",
        max_length=128, overlong="refuse", gradient_checkpointing=False, unsloth_fused_lora=True,
        logging_steps=2, eval_steps=6, save_steps=4, keep_best=False, early_stopping_patience=None,
        early_stopping_min_delta=0.0, probe_every=4,
    )  # fmt: skip


@pytest.fixture(scope="session")
def aqi_examples():
    """(rendered prompt, completion) of AQI items."""
    from evaluation.tasks import aqi, render

    items = aqi.generate({"train": 80}, seed=0, pollutants=["pm25", "no2"], max_pollutants=1)["train"]
    return [(render(TEMPLATE, item.prompt), item.completion) for item in items]


@pytest.fixture(scope="session")
def make_job(base_dir, train_settings, aqi_examples, tmp_path_factory):
    from trainers.arms.pure_grit import GritSettings
    from trainers.run import TrainingJob
    from trainers.settings import BaseReference, TrainSettings

    def make(seed=0, checkpoints: Path | None = None, grit=None, output: Path | None = None, **changes):
        custom = {} if grit is None else {"grit": grit}
        kind = GritSettings if custom else TrainSettings
        return TrainingJob(
            base=BaseReference(str(base_dir)),
            settings=kind(**{**train_settings.model_dump(), **changes, **custom}),
            seed=seed,
            train=aqi_examples[:64],
            valid=aqi_examples[64:],
            output=output or tmp_path_factory.mktemp("adapter"),
            checkpoints=checkpoints or tmp_path_factory.mktemp("checkpoints"),
        )

    return make


@pytest.fixture(scope="session")
def adapter_dir(make_job, once):
    from trainers.arms.baseline_lora import ARM
    from trainers.run import run

    return once("adapter", lambda folder: run(ARM, make_job(output=folder)))


@pytest.fixture(scope="session")
def exported(base_dir, adapter_dir, once, tmp_path_factory):
    """base.gguf, model.gguf and adapter.gguf of the two above."""
    from export import gguf

    def make(folder):
        for name, adapter in (("base", None), ("model", adapter_dir)):
            merged = tmp_path_factory.mktemp(name) / "model"
            gguf.save_merged(str(base_dir), adapter, merged, {})
            gguf.convert_model(merged, folder / f"{name}.gguf", name)
        gguf.convert_adapter(adapter_dir, base_dir, folder / "adapter.gguf")

    return once("exported", make)


@pytest.fixture(scope="session")
def served_tree(exported, base_dir, adapter_dir, prompts, once):
    """gguf/ as stage export writes it, for the base and one arm, with Hugging Face's answers."""
    from export.engines.hf import HfEngine
    from export.modelfile import Serving
    from export.served import make_references, modelfile_text, write_references

    def make(root):
        serving = Serving(template=TEMPLATE, stop=["</s>"], num_ctx=256, adds_bos=True, bos_token="<s>")
        questions = [text.split("Instruction:\n")[1].split("\n\n### Response")[0] for text in prompts[:6]]
        for arm, file, adapter in (("base", "base.gguf", None), ("pure_grit", "model.gguf", adapter_dir)):
            folder = root / arm / "0"
            folder.mkdir(parents=True)
            shutil.copy(exported / file, folder / "model.gguf")
            if adapter:
                shutil.copy(exported / "adapter.gguf", folder / "adapter.gguf")
                (folder / "Modelfile.adapter").write_text(modelfile_text(serving, folder, root / "base/0/model.gguf"))
            (folder / "serving.json").write_text(json.dumps(serving.as_json()))
            (folder / "Modelfile").write_text(modelfile_text(serving, folder))
            with HfEngine(str(base_dir), TEMPLATE, adapter=adapter) as engine:
                write_references(folder, make_references(engine, serving, questions, SERVED_TOKENS, engine.render, {}))

    return once("served", make)


@pytest.fixture
def tree(served_tree, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(served_tree, tmp_path / "gguf")


@pytest.fixture
def own_records(tmp_path, monkeypatch):
    """Keeps the record of registered models, normally in the home folder, within the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def prompts():
    from evaluation.tasks import aqi, general, render

    items = aqi.generate({"x": 6}, seed=5, pollutants=["pm25", "o3_8h"], max_pollutants=2)["x"]
    suite = general.retention_items(1, seed=5)
    random.Random(0).shuffle(suite)
    return [render(TEMPLATE, item.prompt) for item in [*items, *suite[:6]]]
