"""Adapt a vision-language model with GRIT-VLM, check it with the probe, save the adapter and load it with PEFT.

    python examples/basic_usage.py                                  # a tiny Idefics3, no network, within a minute
    python examples/basic_usage.py --model HuggingFaceTB/SmolVLM-256M-Instruct --steps 100

The tiny model is barely trained and only shows the calls; for sensible answers use a trained one.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from _shared import encode, prepare
from peft import PeftModel
from transformers import AutoModelForImageTextToText, PrinterCallback

from evaluation.tasks import Item
from grit_vlm import GRITLoRAConfig, GRITTrainer, GRITTrainingArguments, VLMGRITAdapter, create_vlm_grit_adapter
from probes import ProbeCallback, judge
from trainers.pictures import VisionProcessor


def train(base: str, processor: VisionProcessor, items: list[Item], steps: int, folder: Path) -> VLMGRITAdapter:
    torch.manual_seed(0)
    config = GRITLoRAConfig(r=8, lora_alpha=16, lora_dropout=0.0, fisher_approximation="kfac")
    model, adapter = create_vlm_grit_adapter(base, config)
    print(f"Adapted: {adapter.describe()}.")
    trainer = GRITTrainer(
        model=model,
        grit_adapter=adapter,
        args=GRITTrainingArguments(
            output_dir=str(folder / "run"), max_steps=steps, per_device_train_batch_size=8, learning_rate=3e-3,
            logging_steps=max(1, steps // 5), report_to="none", save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=encode(processor, items),
        data_collator=processor.collate,
    )  # fmt: skip
    probe = ProbeCallback(every=max(1, steps // 10), readings=adapter.manager.readings)
    trainer.add_callback(probe)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"Trained for {steps} steps; loss {' → '.join(f'{loss:.3f}' for loss in losses)}.")
    print("The updates, compared with those of AdamW on the same gradients:")
    if probe.probe is not None:
        print(judge(probe.probe).table())
    return adapter


def answer(base: str, adapter: Path, processor: VisionProcessor, item: Item) -> str:
    """The answer of the saved adapter, loaded with plain PEFT on a fresh model."""
    model: Any = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    batch = processor.collate(encode(processor, [item], taught=False), model.device)
    with torch.inference_mode():
        ids = model.generate(**batch, max_new_tokens=16, do_sample=False)
    text: str = processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of a vision-language model")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps: expected at least 1, got {arguments.steps}")
    with tempfile.TemporaryDirectory(prefix="grit-vlm-") as name:
        folder = Path(name)
        base, processor, items = prepare(arguments.model, folder, 640, {"train": 72, "test": 18})
        first, asked = items["train"][0], items["test"][0]
        print(f"Data: {len(items['train'])} pictures, the first with {first.prompt.splitlines()[-1]!r} → "
              f"{first.completion!r}.")  # fmt: skip
        adapter = train(base, processor, items["train"], arguments.steps, folder)
        saved = folder / "adapter"
        adapter.save_pretrained(saved)
        print(f"Saved an ordinary PEFT adapter: {', '.join(sorted(file.name for file in saved.iterdir()))}.")
        reply = answer(base, saved, processor, asked)
        print(f"Loaded with plain PEFT and asked about a new picture: {reply!r}; correct: {asked.completion!r}.")


if __name__ == "__main__":
    main()
