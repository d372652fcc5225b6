"""Stage measure: measured/<arm>/<seed>/measured.json, what fine-tuning did beside the task.

Perplexity of general text and of the right answers, size and rank of the update, drift of the hidden states, and the
Alignment Quality Index. The model is loaded once, as it was trained on (4 bit where training was); the base is that
model with the adapter off.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import alignment, drift, perplexity, prompts, resampling
from evaluation.hidden import Encoded, TextFigures, layer_numbers, pooled_states, read_texts
from evaluation.tasks import render
from pipelines.base_model import load_reference
from pipelines.config import ConfigError, check_arm, for_text, load_params
from pipelines.measure_texts import RETENTION, TEST, answer_texts, general_texts
from pipelines.outputs import staged
from pipelines.prompt import prompt_text
from pipelines.runinfo import RunRecord, hash_inputs, key_of, read_json, write_json
from pipelines.schema import Measure, Params
from pipelines.stage import (
    BASE,
    BASE_ARM,
    DATA,
    ArmOption,
    SeedOption,
    adapter_dir,
    cli,
    main_for,
    measured_dir,
)
from trainers.data import encode_prompt
from trainers.models import load_base_model, load_tokenizer

WATCHED = Path("inputs")
MEASURED, REFERENCE = "measured.json", "alignment.npz"
GENERAL = "answers of the retention questions", "held-out general text"
ANSWERS = "right answers of test items, given their questions"
SUMMARY = (
    "perplexity answer_perplexity update_norm effective_rank drift_relative alignment_index alignment_p_value "
    "delta_alignment_index delta_alignment_p_value"
).split()
# Largest relative difference between the base's loss and that of the model with its adapter off, by dtype of the
# weights: what is computed is the same, rounding may not be.
BASE_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3, "float16": 5e-3}


@dataclass
class Found:
    """Rows of measured.json.

    Attributes:
        texts: What the general perplexity is of, in words.
        notes: What went wrong, one sentence each.
    """

    texts: str = GENERAL[1]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, split: str, values: Mapping[str, float], n: int) -> None:
        """Figures of the whole model, from `n` tokens, modules or prompts."""
        self.metrics += [{"name": k, "split": split, "value": finite(v), "n": n} for k, v in values.items()]

    def add_layer(self, split: str, layer: str, values: Mapping[str, float]) -> None:
        """Figures of one layer or module."""
        self.layers += [{"name": k, "split": split, "layer": layer, "value": finite(v)} for k, v in values.items()]

    def defined(self) -> dict[str, dict[str, str]]:
        """Unit, direction and meaning of every figure."""
        answers = perplexity.metrics(ANSWERS, "answer_")
        known = {**perplexity.metrics(self.texts), **answers, **drift.METRICS, **alignment.METRICS}
        names = dict.fromkeys(row["name"] for row in [*self.metrics, *self.layers])
        return {n: dict(zip(("unit", "direction", "description"), known[n], strict=True)) for n in names}


def finite(value: float) -> float | None:
    """The value; None where it could not be computed (JSON has no NaN)."""
    return float(value) if math.isfinite(value) else None


def safety_prompts(section: Measure) -> prompts.PromptSet:
    """The prompts of the Alignment Quality Index that are asked.

    Raises:
        PromptError, SourceError: they cannot be used.
    """
    found = prompts.read_prompts(
        section.prompts,
        columns={str(name): column for name, column in section.columns.items()},
        safe_label=section.safe_label,
        unsafe_label=section.unsafe_label,
        split=section.prompts_split,
        subset=section.prompts_subset,
    )
    return replace(found, prompts=prompts.choose(found.prompts, section.max_prompts))


def add_perplexity(found: Found, split: str, read: TextFigures, resamples: int, of: str, prefix: str = "") -> None:
    """Perplexity of texts, with its interval over so many resamples, and their loss."""
    low, high = perplexity.perplexity_interval(read.by_text, resamples=resamples)
    values = {"perplexity": read.loss.perplexity, "perplexity_low": low, "perplexity_high": high}
    values["loss"] = read.loss.mean
    found.add(split, {f"{prefix}{name}": value for name, value in values.items()}, read.loss.tokens)
    if not math.isfinite(read.loss.mean):
        found.notes.append(f"the loss on {of} is not finite")


def add_general(found: Found, read: TextFigures, resamples: int) -> None:
    """Perplexity of general texts, and drift."""
    add_perplexity(found, "general", read, resamples, found.texts)
    if read.base_loss is None:
        return
    layers = list(zip(read.relative, read.cosine, strict=True))
    mean = [math.fsum(values) / len(layers) for values in zip(*layers, strict=True)]
    found.add("hidden", dict(zip(("drift_relative", "drift_cosine"), mean, strict=True)), read.tokens)
    for number, (relative, cosine) in enumerate(layers, start=1):
        found.add_layer("hidden", f"layer {number}", {"drift_relative": relative, "drift_cosine": cosine})


def add_weights(found: Found, model: Any) -> None:
    """Size and ranks of the update."""
    updates = list(drift.updates(model))
    found.add("weights", drift.summarize(updates), len(updates))
    broken = [update.name for update in updates if math.isnan(update.norm)]
    if broken:
        modules = ", ".join([*broken[:5], *([f"… and {len(broken) - 5} more"] if len(broken) > 5 else [])])
        found.notes.append(f"the adapter holds NaN or infinity: training diverged; modules {modules}")
    for update in updates:
        found.add_layer("weights", update.name, update.figures())


def check_base(read: TextFigures, dtype: str) -> None:
    """Hold the model with its adapter off against the base as measured by itself.

    Raises:
        ConfigError: their losses differ.
    """
    file = measured_dir(BASE_ARM, 0) / MEASURED
    expected = next((m["value"] for m in read_json(file)["metrics"] if m["name"] == "loss"), None)
    came = None if read.base_loss is None else read.base_loss.mean
    if expected is None or came is None or not math.isclose(expected, came, rel_tol=BASE_TOLERANCE.get(dtype, 5e-3)):
        raise ConfigError(
            f"with the adapter off, the loss on general text is {came}, and the base's own is {expected} ({file}): "
            "this is not the base that was measured; run `dvc repro measure_base`"
        )


def add_alignment(
    found: Found, section: Measure, model: Any, asked: list[Encoded], plan: resampling.Design, mark: str, folder: Path
) -> list[int]:
    """The Alignment Quality Index, and the indices beside it.

    Args:
        found: Takes the figures.
        section: Settings.
        model: In eval mode; without an adapter it is the base, and what is fixed on the base goes to `folder`.
        asked: Token ids of the prompts.
        plan: Their labels and resamplings.
        mark: Fingerprint of the base.
        folder: Where this stage writes.

    Returns:
        Numbers of the layers.
    """
    layers = layer_numbers(section.layers, int(model.config.get_text_config().num_hidden_layers))
    states = pooled_states(model, asked, layers, pooling=section.pooling, batch_size=section.batch_size)
    key = key_of([[e.ids for e in asked], plan.unsafe.tolist(), layers, section.pooling, mark])
    is_base = not hasattr(model, "disable_adapter")
    if is_base:
        reference = alignment.fix_reference(states, plan, key)
        reference.save(folder / REFERENCE)
    else:
        reference = alignment.Reference.load(measured_dir(BASE_ARM, 0) / REFERENCE, key)
    if is_base or np.isfinite(states).all():
        measured = alignment.measure(states, plan, reference, weight=section.index_weight, is_base=is_base)
    else:  # a result like others: the report shows that nothing could be computed
        found.notes.append("hidden states of prompts hold NaN or infinity; there is no Alignment Quality Index")
        measured = alignment.unknown(len(layers))
    found.add("alignment", measured.overall, len(asked))
    for number, values in zip(layers, measured.layers, strict=True):
        found.add_layer("alignment", f"layer {number}", values)
    return layers


def load_model(params: Params, arm: str, seed: int) -> tuple[Any, Any, str]:
    """Model in eval mode, with the arm's adapter; its tokenizer; the base's fingerprint.

    Raises:
        ConfigError, ModelError: base or adapter cannot be loaded.
    """
    reference, base_fingerprint = load_reference()
    # Nothing is trained here, so checkpointing would only warn.
    model = load_base_model(reference, params.train.model_copy(update={"gradient_checkpointing": False}))
    if arm != BASE_ARM:
        from peft import PeftModel

        place = adapter_dir(arm, seed)
        try:
            model = PeftModel.from_pretrained(model, str(place))
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{place}: PEFT cannot load this adapter: {error}; run `dvc repro train`") from error
    return model.eval(), load_tokenizer(reference), base_fingerprint


def run(params: Params, arm: str, seed: int) -> None:
    """Measure one arm with one seed, or the base."""
    section, template, is_base = params.measure, prompt_text(params.prompt), arm == BASE_ARM
    if not is_base:
        check_arm(arm, params)
    asked_for = safety_prompts(section)  # first, since a user's file may be what is wrong
    chosen = asked_for.prompts
    own = [Path(name) for name in (section.prompts, section.text) if Path(name).is_file()]
    for file in own:
        if not file.resolve().is_relative_to(WATCHED.resolve()):
            print(f"{file} lies outside {WATCHED}/, where DVC sees changes; after one, `dvc repro -f measure_base`")
    needed = [] if is_base else [adapter_dir(arm, seed), measured_dir(BASE_ARM, 0)]
    items = [DATA / "retention.jsonl", *([TEST] if section.max_answers else [])]
    inputs = hash_inputs(BASE, *items, *needed, *own)
    trained_on = params.train.model_dump(include={"quantize_base", "precision"})
    shown = {"measure": section.model_dump(), "prompt": params.prompt.model_dump(), "train": trained_on}
    with staged(measured_dir(arm, seed)) as folder:
        record = RunRecord("measure", params=shown, inputs=inputs, arm=arm, seed=seed, prompt_template=template)
        model, tokenizer, mark = load_model(params, arm, seed)
        config, found = model.config.get_text_config(), Found(GENERAL[section.text != RETENTION])
        most = min(section.max_tokens, getattr(config, "max_position_embeddings", section.max_tokens))

        if not is_base:
            add_weights(found, model)  # first: on a CPU bitsandbytes packs 4-bit weights anew at the first pass
        general, cut = general_texts(section, tokenizer, template, most)
        read = read_texts(model, general, batch_size=section.batch_size)
        add_general(found, read, section.bootstrap)
        if not is_base:
            check_base(read, str(model.dtype).removeprefix("torch."))
        answers, answers_cut = answer_texts(section, tokenizer, template, most)
        if answers_cut:
            found.notes.append(f"{answers_cut} right answers are cut or left out, at {most} tokens with their question")
        if answers:  # the base's own are in its own measured.json
            read = read_texts(model, answers, batch_size=section.batch_size, against_base=False)
            add_perplexity(found, "test_answers", read, section.bootstrap, ANSWERS, "answer_")

        whole = [encode_prompt(tokenizer, render(template, prompt.text)) for prompt in chosen]
        plan = resampling.design(
            np.array([prompt.unsafe for prompt in chosen]),
            [prompt.pair for prompt in chosen],
            bootstrap=section.bootstrap,
            permutations=section.permutations,
        )
        asked = [Encoded(tuple(ids[:most])) for ids in whole]
        layers = add_alignment(found, section, model, asked, plan, mark, folder)

        content = {"schema": 1, "arm": arm, "seed": seed, "metrics": found.metrics, "metric_defs": found.defined()}
        write_json(folder / MEASURED, {**content, "layers": found.layers, "notes": found.notes})
        record.extra = {
            "texts": len(general),
            "texts_cut_or_left_out": cut,
            "answers": len(answers),
            "answers_cut_or_left_out": answers_cut,
            "prompts": len(chosen),
            "prompt_rows_left_out": asked_for.rows_left_out,
            "prompts_cut": sum(len(ids) > most for ids in whole),
            "prompts_in_pairs": plan.paired,
            "layers": layers,
            "notes": found.notes,
        }
        record.write(folder)
    for note in found.notes:
        print(f"measure {arm}-{seed}: {note}")
    values = {row["name"]: row["value"] for row in found.metrics}
    print(json.dumps({name: values[name] and round(values[name], 4) for name in SUMMARY if name in values}))


def main(arm: ArmOption, seed: SeedOption = 0) -> None:
    """Measure one arm with one seed, or the base."""
    main_for("measure", lambda: run(for_text(load_params(), "stage measure"), arm, seed), arm, seed)


if __name__ == "__main__":
    cli(main)
