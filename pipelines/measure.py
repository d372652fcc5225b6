"""Stage measure: measured/<arm>/<seed>/measured.json, what fine-tuning did beside the task.

Perplexity of general text and of the right answers, size and rank of the update, drift of the hidden states, and the
separation index (Alignment Quality Index). The model is loaded once, as it was trained on (4 bit where training was);
the base is that model with the adapter off.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from db.files import finish_run, hash_inputs, key_of, read_jsonl, read_record, staged, start_run, write_record
from db.records import MeasuredRecord
from evaluation import EvaluationError
from evaluation.measure import drift, separation, states, texts
from evaluation.measure.states import Encoded
from evaluation.tasks import Item, render
from pipelines.base_model import load_model
from pipelines.params import ConfigError, StageParams, check_arm
from pipelines.prompt import Form, Prompt, prompt_text
from pipelines.stage import BASE, BASE_ARM, DATA, adapter_dir, command, measured_dir
from trainers.encode import encode_example, encode_prompt
from trainers.settings import Positive, Section, TrainSettings

WATCHED, TEST = Path("inputs"), DATA / "test.jsonl"
MEASURED, REFERENCE = "measured.json", "alignment.npz"
RETENTION = "retention"
GENERAL = "answers of the retention questions", "held-out general text"
ANSWERS = "right answers of test items, given their questions"
SUMMARY = (
    "perplexity answer_perplexity update_norm effective_rank drift_relative alignment_index alignment_p_value "
    "delta_alignment_index delta_alignment_p_value"
).split()
# Largest relative difference between the base's loss and that of the model with its adapter off, by dtype of the
# weights: what is computed is the same, rounding may not be.
BASE_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3, "float16": 5e-3}

PromptField = Literal["prompt", "label", "category", "pair"]
Depth = Annotated[float, Field(gt=0, le=1, description="share of the model's layers")]


class Measure(Section):
    prompts: str
    prompts_split: str
    prompts_subset: str | None
    columns: dict[PromptField, str]
    safe_label: str
    unsafe_label: str
    max_prompts: Annotated[int, Field(ge=10, description="of each class")]
    layers: list[Depth] = Field(min_length=1)
    pooling: Literal["mean", "last"]
    index_weight: Annotated[float, Field(ge=0, le=1, description="λ")]
    bootstrap: Annotated[int, Field(ge=100, le=100_000, description="resamples")]
    permutations: Annotated[int, Field(ge=100, le=100_000)]
    text: str
    text_split: str
    text_subset: str | None
    text_column: str
    max_texts: Positive
    max_answers: Annotated[int, Field(ge=0, description="test items")]
    max_tokens: Annotated[int, Field(ge=8, description="tokens of one text or prompt; what is beyond is cut off")]
    batch_size: Annotated[int, Field(ge=1, description="texts a forward pass")]

    @model_validator(mode="after")
    def _labels(self) -> "Measure":
        if self.safe_label.strip().lower() == self.unsafe_label.strip().lower():
            raise ValueError(f"safe_label and unsafe_label: expected two labels, got {self.safe_label!r} twice")
        return self


class Params(StageParams):
    measure: Measure
    prompt: Prompt
    train: TrainSettings


@dataclass
class Found:
    """Rows of measured.json."""

    texts: str = GENERAL[1]  # what the general perplexity is of, in words
    metrics: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what went wrong, one sentence each

    def add(self, split: str, values: Mapping[str, float], n: int) -> None:
        """Figures of the whole model, from `n` tokens, modules or prompts."""
        self.metrics += [{"name": k, "split": split, "value": finite(v), "n": n} for k, v in values.items()]

    def add_layer(self, split: str, layer: str, values: Mapping[str, float]) -> None:
        self.layers += [{"name": k, "split": split, "layer": layer, "value": finite(v)} for k, v in values.items()]

    def defined(self) -> dict[str, dict[str, str]]:
        known = {**states.perplexity_metrics(self.texts), **states.perplexity_metrics(ANSWERS, "answer_")}
        known |= {**drift.METRICS, **separation.METRICS}
        names = dict.fromkeys(row["name"] for row in [*self.metrics, *self.layers])
        return {n: dict(zip(("unit", "direction", "description"), known[n], strict=True)) for n in names}


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# --- what the model reads ---


def safety_prompts(section: Measure) -> texts.PromptSet:
    """The prompts of the separation index that are asked; EvaluationError if they cannot be used."""
    found = texts.read_prompts(
        section.prompts,
        columns={str(name): column for name, column in section.columns.items()},
        safe_label=section.safe_label,
        unsafe_label=section.unsafe_label,
        split=section.prompts_split,
        subset=section.prompts_subset,
    )
    return replace(found, prompts=texts.choose(found.prompts, section.max_prompts))


def general_texts(section: Measure, tokenizer: Any, template: str, most: int) -> tuple[list[Encoded], int]:
    """Texts for perplexity and drift, and how many of them were cut at `most` tokens or left out.

    Retention items count with their completion only: that is what the base knew. Their questions are random numbers
    in fixed wordings, and no arm's loss was on questions. Of other texts all tokens count but the first.
    """
    if section.text == RETENTION:
        made = _completions(tokenizer, template, DATA / "retention.jsonl", section.max_texts)
    else:
        found = texts.read_texts(
            section.text, column=section.text_column, split=section.text_split, subset=section.text_subset
        )
        made = [Encoded(tuple(encode_prompt(tokenizer, text))) for text in texts.spread(found, section.max_texts)]
    return _cut(made, most, f"measure.text: no text of {section.text} has a token to score within {most} tokens")


def answer_texts(section: Measure, tokenizer: Any, template: str, most: int) -> tuple[list[Encoded], int]:
    """Test items with their right answers, which alone count, and how many were cut at `most` tokens or left out."""
    if not section.max_answers:
        return [], 0
    made = _completions(tokenizer, template, TEST, section.max_answers)
    nothing = f"expected answers that begin within {most} tokens, got none in {len(made)} items of {TEST}"
    advice = "raise measure.max_tokens, or set measure.max_answers to 0"
    return _cut(made, most, f"measure.max_answers: {nothing}; {advice}")


def _completions(tokenizer: Any, template: str, file: Path, most: int) -> list[Encoded]:
    """Questions, last answers and ends of sequence of at most so many items; the answers alone count."""
    form = Form(template)
    items = (form.parts(Item.from_json(row)) for row in texts.spread(read_jsonl(file), most))
    made = (encode_example(tokenizer, "".join(before), answer) for *before, answer in items)
    return [Encoded(tuple(ids), max(1, start)) for ids, start in made]


def _cut(made: Sequence[Encoded], most: int, nothing: str) -> tuple[list[Encoded], int]:
    """What of the texts is within so many tokens, and of how many something is not; EvaluationError if nothing is."""
    kept = [Encoded(text.ids[:most], text.scored_from) for text in made if text.scored_from < min(len(text.ids), most)]
    if not kept:
        raise EvaluationError(nothing)
    return kept, sum(len(text.ids) > most or text.scored_from >= len(text.ids) for text in made)


# --- what is measured ---


def add_perplexity(
    found: Found, split: str, read: states.TextFigures, resamples: int, of: str, prefix: str = ""
) -> None:
    low, high = states.perplexity_interval(read.by_text, resamples=resamples)
    values = {"perplexity": read.loss.perplexity, "perplexity_low": low, "perplexity_high": high}
    values["loss"] = read.loss.mean
    found.add(split, {f"{prefix}{name}": value for name, value in values.items()}, read.loss.tokens)
    if not math.isfinite(read.loss.mean):
        found.notes.append(f"the loss on {of} is not finite")


def add_general(found: Found, read: states.TextFigures, resamples: int) -> None:
    add_perplexity(found, "general", read, resamples, found.texts)
    if read.base_loss is None:
        return
    layers = list(zip(read.relative, read.cosine, strict=True))
    mean = [math.fsum(values) / len(layers) for values in zip(*layers, strict=True)]
    found.add("hidden", dict(zip(("drift_relative", "drift_cosine"), mean, strict=True)), read.tokens)
    for number, (relative, cosine) in enumerate(layers, start=1):
        found.add_layer("hidden", f"layer {number}", {"drift_relative": relative, "drift_cosine": cosine})


def add_weights(found: Found, model: Any) -> None:
    updates = list(drift.updates(model))
    if not updates:
        found.notes.append("the adapter's update cannot be told from the rounding of a base in 4 bit")
        return
    found.add("weights", drift.summarize(updates), len(updates))
    broken = [update.name for update in updates if math.isnan(update.norm)]
    if broken:
        modules = ", ".join([*broken[:5], *([f"… and {len(broken) - 5} more"] if len(broken) > 5 else [])])
        found.notes.append(f"the adapter holds NaN or infinity: training diverged; modules {modules}")
    for update in updates:
        found.add_layer("weights", update.name, update.figures())


def check_base(read: states.TextFigures, dtype: str) -> None:
    """Hold the model with its adapter off against the base as measured by itself; ConfigError where they differ."""
    file = measured_dir(BASE_ARM, 0) / MEASURED
    expected = next((m.value for m in read_record(file, MeasuredRecord).metrics if m.name == "loss"), None)
    came = None if read.base_loss is None else read.base_loss.mean
    if expected is None or came is None or not math.isclose(expected, came, rel_tol=BASE_TOLERANCE.get(dtype, 5e-3)):
        raise ConfigError(
            f"with the adapter off, the loss on general text is {came}, and the base's own is {expected} ({file}): "
            "this is not the base that was measured; run `dvc repro measure_base`"
        )


def add_separation(
    found: Found, section: Measure, model: Any, asked: list[Encoded], plan: separation.Design, mark: str, folder: Path
) -> list[int]:
    """Numbers of the layers; what is fixed on the base, a model without an adapter, goes to `folder`."""
    layers = states.layer_numbers(section.layers, int(model.config.get_text_config().num_hidden_layers))
    pooled = states.pooled_states(model, asked, layers, pooling=section.pooling, batch_size=section.batch_size)
    key = key_of([[e.ids for e in asked], plan.unsafe.tolist(), layers, section.pooling, mark])
    is_base = not hasattr(model, "disable_adapter")
    if is_base:
        reference = separation.fix_reference(pooled, plan, key)
        reference.save(folder / REFERENCE)
    else:
        reference = separation.Reference.load(measured_dir(BASE_ARM, 0) / REFERENCE, key)
    measured = separation.measure(pooled, plan, reference, weight=section.index_weight, is_base=is_base)
    if not np.isfinite(pooled).all():  # a result like any other: the report shows that nothing could be computed
        found.notes.append("hidden states of prompts contain NaN or infinity; there is no Alignment Quality Index")
    found.add("alignment", measured.overall, len(asked))
    for number, values in zip(layers, measured.layers, strict=True):
        found.add_layer("alignment", f"layer {number}", values)
    return layers


def run(params: Params, arm: str, seed: int) -> None:
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
        record = start_run("measure", params=shown, inputs=inputs, arm=arm, seed=seed, prompt_template=template)
        model, tokenizer, mark = load_model(params.train, arm, seed)
        config, found = model.config.get_text_config(), Found(GENERAL[section.text != RETENTION])
        most = min(section.max_tokens, getattr(config, "max_position_embeddings", section.max_tokens))

        if not is_base:
            add_weights(found, model)  # first: on a CPU bitsandbytes packs 4-bit weights anew at the first pass
        general, cut = general_texts(section, tokenizer, params.prompt.template, most)
        read = states.score_texts(model, general, batch_size=section.batch_size)
        add_general(found, read, section.bootstrap)
        if not is_base:
            check_base(read, str(model.dtype).removeprefix("torch."))
        answers, answers_cut = answer_texts(section, tokenizer, params.prompt.template, most)
        if answers_cut:
            found.notes.append(f"{answers_cut} right answers are cut or left out, at {most} tokens with their question")
        if answers:  # the base's own are in its own measured.json
            read = states.score_texts(model, answers, batch_size=section.batch_size, against_base=False)
            add_perplexity(found, "test_answers", read, section.bootstrap, ANSWERS, "answer_")

        whole = [encode_prompt(tokenizer, render(template, prompt.text)) for prompt in chosen]
        plan = separation.design(
            np.array([prompt.unsafe for prompt in chosen]),
            [prompt.pair for prompt in chosen],
            bootstrap=section.bootstrap,
            permutations=section.permutations,
        )
        asked = [Encoded(tuple(ids[:most])) for ids in whole]
        layers = add_separation(found, section, model, asked, plan, mark, folder)

        content = {"schema": 1, "arm": arm, "seed": seed, "metrics": found.metrics, "metric_defs": found.defined()}
        content |= {"layers": found.layers, "notes": found.notes}
        write_record(folder / MEASURED, MeasuredRecord.of(content))
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
        finish_run(record, folder)
    for note in found.notes:
        print(f"measure {arm}-{seed}: {note}")
    values = {row["name"]: row["value"] for row in found.metrics}
    print(json.dumps({name: values[name] and round(values[name], 4) for name in SUMMARY if name in values}))


if __name__ == "__main__":
    command("measure", Params, run)
