"""What a training process takes before its tensors count: measured, by training a miniature in a process of its own.

The miniature goes the very way of the arm (`trainers.common.run`: its packages, Trainer, probe, GRIT, checkpoints,
plots) with a model of a few kilobytes.
"""

import importlib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from pipelines.planning.bases import PlanError
from pipelines.stage import cli, quiet_libraries
from trainers import ARMS
from trainers.common import Arm, TrainingJob, peak_memory_bytes
from trainers.common import run as train
from trainers.settings import BaseReference, TrainSettings

_WORDS = [f"w{i}" for i in range(60)]
_STEPS = 3


def peak_of_this_process() -> int:
    """Bytes of the largest resident size since this program started.

    Of Linux's two figures that of /proc: the other one (getrusage) begins with the size of the process that called
    this one.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return peak_memory_bytes()


def write_miniature(folder: Path) -> None:
    """A Llama of about 20,000 numbers with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<pad>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *_WORDS])}, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(special) + len(_WORDS),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        )
    ).save_pretrained(folder)


def miniature(settings: TrainSettings) -> TrainSettings:
    """The same packages and paths with next to no tensors."""
    changes: dict[str, Any] = {
        "target_modules": ["q_proj", "v_proj"], "max_steps": _STEPS, "epochs": None, "batch_size": 2,
        "gradient_accumulation": 1, "warmup_steps": 0, "max_length": 64, "logging_steps": 1, "eval_steps": 2,
        "save_steps": 2, "probe_every": 2, "report_to": [], "keep_best": False, "early_stopping_patience": None,
    }  # fmt: skip
    return settings.model_copy(update=changes)


def run(code: str, settings: TrainSettings) -> int:
    """Train the miniature in this process; returns its peak in bytes."""
    arm: Arm = importlib.import_module(ARMS[code]).ARM
    with TemporaryDirectory() as name:
        folder = Path(name)
        reference = BaseReference(location=str(folder / "base"))
        output, checkpoints = folder / "out", folder / "checkpoints"
        output.mkdir()
        items = [(f"w{i} w{i + 1} ", f"w{i + 2}") for i in range(8)]
        job = TrainingJob(
            base=reference, settings=miniature(settings), seed=0, train=items, valid=items[:2], output=output,
            checkpoints=checkpoints,
        )  # fmt: skip
        if arm.prepare:  # before transformers is loaded by the miniature's model
            arm.prepare(job)
        write_miniature(folder / "base")
        train(arm, job)
    return peak_of_this_process()


@cache
def _measured(code: str, settings: str) -> int:
    with TemporaryDirectory() as folder:
        given, out = Path(folder) / "settings.json", Path(folder) / "peak.json"
        given.write_text(settings, encoding="utf-8")
        command = [sys.executable, "-m", "pipelines.planning.overhead", "--code", code]
        command += ["--settings", str(given), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not out.is_file():
            tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-4:])
            raise PlanError(
                f"the miniature of {code} could not be trained, so its process is not measured "
                f"(--no-measure leaves it out):\n{tail}"
            )
        return int(json.loads(out.read_text(encoding="utf-8"))["peak"])


def measured(code: str, settings: TrainSettings) -> int:
    """Bytes that a training process of this arm takes without its tensors; about 15 seconds, once for each arm.

    Args:
        code: The arm whose code runs.
        settings: Of the arm.

    Raises:
        PlanError: the miniature could not be trained; with the end of what it said.
    """
    return _measured(code, settings.model_dump_json())


def main(
    code: Annotated[str, typer.Option(help="arm whose code runs")],
    settings: Annotated[Path, typer.Option(help="JSON file with section train")],
    out: Annotated[Path, typer.Option(help="JSON file for the peak")],
) -> None:
    """Train the miniature and write the process's peak."""
    quiet_libraries()
    peak = run(code, TrainSettings(**json.loads(settings.read_text(encoding="utf-8"))))
    out.write_text(json.dumps({"peak": peak}), encoding="utf-8")


if __name__ == "__main__":
    cli(main)
