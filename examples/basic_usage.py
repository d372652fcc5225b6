"""Adapt a vision-language model with GRIT-VLM, see what the probe says of it, save the adapter and use it with PEFT.

    python examples/basic_usage.py                                  # a tiny Idefics3, no network, within a minute
    python examples/basic_usage.py --model HuggingFaceTB/SmolVLM-256M-Instruct --steps 100

Without --model it takes the base that `make repro-vlm` has trained, or, where there is none, one with random weights:
that shows how everything is called; sensible answers want a trained model.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from _shared import PIPELINE_BASE, TEMPLATE, image_size, questions, quiet, random_base, rendered, work_folder
from peft import PeftModel
from transformers import AutoModelForImageTextToText, PrinterCallback

from evaluation.tasks import Item, render
from grit_vlm import GRITLoRAConfig, GRITTrainer, GRITTrainingArguments, VLMGRITAdapter, create_vlm_grit_adapter
from grit_vlm.data import VisionProcessor, load_processor
from probes import ProbeCallback, judge
from trainers.settings import BaseReference


def train(base: str, processor: VisionProcessor, items: list[Item], steps: int, folder: Path) -> VLMGRITAdapter:
    """Adapt the model and train it; prints what the layers, the loss and the probe say."""
    torch.manual_seed(0)
    config = GRITLoRAConfig(r=8, lora_alpha=16, lora_dropout=0.0, fisher_approximation="kfac")
    model, adapter = create_vlm_grit_adapter(base, config)
    print(f"Adapted: {adapter.describe()}.")
    rows = [processor.encode(prompt, answer) for prompt, answer in rendered(items)]
    trainer = GRITTrainer(
        model=model,
        grit_adapter=adapter,
        args=GRITTrainingArguments(
            output_dir=str(folder / "run"), max_steps=steps, per_device_train_batch_size=8, learning_rate=3e-3,
            logging_steps=max(1, steps // 5), report_to="none", save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=processor.collate,
    )  # fmt: skip
    probe = ProbeCallback(every=max(1, steps // 10), grit=adapter.manager)
    trainer.add_callback(probe)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"Trained for {steps} steps; loss {' → '.join(f'{loss:.3f}' for loss in losses)}.")
    print("What the updates were, beside AdamW's on the same gradients:")
    if probe.probe is not None:
        print(judge(probe.probe).table())
    return adapter


def answer(base: str, adapter: Path, processor: VisionProcessor, item: Item) -> str:
    """What the saved adapter answers, with plain PEFT on a freshly loaded model."""
    model: Any = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    batch = processor.collate([processor.encode(render(TEMPLATE, item.prompt))], model.device)
    with torch.inference_mode():
        ids = model.generate(**batch, max_new_tokens=16, do_sample=False)
    text: str = processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of a vision-language model")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps: expected at least 1, got {arguments.steps}")
    quiet()
    with work_folder() as made:
        folder = Path(made)
        if arguments.model:
            base, kind = arguments.model, "given"
        elif (PIPELINE_BASE / "config.json").is_file():
            base, kind = str(PIPELINE_BASE), "trained by make repro-vlm"
        else:
            base, kind = random_base(folder), "a tiny Idefics3 with random weights"
        print(f"Model: {base} ({kind}).")
        items = questions(folder, {"train": 72, "test": 18}, image_size(base))
        processor = load_processor(BaseReference(base), folder)
        first = items["train"][0]
        print(f"Data: {len(items['train'])} pictures, the first with {first.prompt.splitlines()[-1]!r} → "
              f"{first.completion!r}.")  # fmt: skip
        adapter = train(base, processor, items["train"], arguments.steps, folder)
        saved = folder / "adapter"
        adapter.save_pretrained(saved)
        print(f"Saved an ordinary PEFT adapter: {', '.join(sorted(file.name for file in saved.iterdir()))}.")
        asked = items["test"][0]
        said = answer(base, saved, processor, asked)
        print(f"Loaded with plain PEFT and asked about a new picture: {said!r}; right is {asked.completion!r}.")


if __name__ == "__main__":
    main()
