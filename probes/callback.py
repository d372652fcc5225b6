"""The probe on a Hugging Face or TRL Trainer, and its ledger as a file."""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from probes.geometry import Provider, Record
from probes.probe import WARM_UP, Probe

logger = logging.getLogger("probes")

STATE_FOLDER = "probe-{step}"  # beside the Trainer's checkpoint-<step>


class LedgerFile:
    """JSON Lines: each record as it comes, and at the end a line with the events and the claim."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rewrite([])

    def append(self, record: Record) -> None:
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(record, allow_nan=False) + "\n")

    def rewrite(self, records: list[Record]) -> None:
        self.path.write_text("", encoding="utf-8")
        for record in records:
            self.append(record)

    def end(self, probe: Probe) -> None:
        facts = {"claims": probe.claims, "watched": probe.watched}
        self.append({"events": probe.events, **facts, "tally": probe.tally.table()})


class ProbeCallback(TrainerCallback):  # type: ignore[misc]
    """Opens a probe when training starts and closes it at the end. Add it after all other callbacks.

    ``trainer.add_callback(ProbeCallback(ledger="ledger.jsonl", preconditioner=(kfac, "precondition")))``, then
    ``judge(callback.probe)`` after training. With GRIT: ``ProbeCallback(readings=manager.readings)``.

    The probe's state is saved beside every checkpoint, so that a resumed run has the ledger of an undisturbed one.
    """

    def __init__(
        self,
        *,
        every: int = 50,
        ledger: str | Path | None = None,
        preconditioner: tuple[Any, str] | None = None,
        readings: Provider | None = None,
        claims: bool | None = None,
    ):
        self.probe: Probe | None = None
        self._file = LedgerFile(ledger) if ledger is not None else None
        write = None if self._file is None else self._file.append
        options = {"preconditioner": preconditioner, "readings": readings, "claims": claims}
        self._options: dict[str, Any] = {"every": every, "on_record": write, **options}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.probe is not None:  # of a training that was interrupted or has ended
            self.probe.close()
            if self._file is not None:
                self._file.rewrite([])
        self.probe = Probe(
            kwargs["model"],
            kwargs["optimizer"],
            max_grad_norm=args.max_grad_norm or 0.0,
            scaler=getattr(kwargs["optimizer"], "scaler", None),
            **self._options,
        )
        if not state.is_world_process_zero:  # every rank measures (sums are taken over all of them), one writes
            self.probe.on_record, self._file = None, None
        if state.global_step:
            folder = Path(args.output_dir) / STATE_FOLDER.format(step=state.global_step)
            try:
                load(self.probe, folder)
                if self._file is not None:
                    self._file.rewrite(self.probe.records)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                logger.warning(
                    "probe: no state of this run in %s beside the checkpoint (%s): the shadow's moments start at zero "
                    "here, and the next %d steps are not judged",
                    folder.name,
                    error,
                    WARM_UP,
                )
                self.probe.start_cold(state.global_step)
        self.probe.open()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.probe is not None:
            self.probe.look_after_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:  # before the Trainer saves its checkpoint, so that none lacks a state
            self._save(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # For checkpoints that the Trainer decides on later (at the end of an epoch, after an evaluation).
        if not (Path(args.output_dir) / STATE_FOLDER.format(step=state.global_step)).is_dir():
            self._save(args, state)

    def _save(self, args: Any, state: Any) -> None:
        if self.probe is None or not state.is_world_process_zero:
            return
        output = Path(args.output_dir)
        save(self.probe, output / STATE_FOLDER.format(step=state.global_step))
        steps = {path.name.rsplit("-", 1)[-1] for path in output.glob("checkpoint-*")} | {str(state.global_step)}
        for old in output.glob(STATE_FOLDER.format(step="*")):
            if re.fullmatch(r"probe-\d+", old.name) and old.name.rsplit("-", 1)[-1] not in steps:
                shutil.rmtree(old, ignore_errors=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.probe is not None:
            self.probe.close()
            if self._file is not None:
                self._file.end(self.probe)


def save(probe: Probe, folder: Path) -> None:
    """Write the probe's state; the folder appears whole or not at all."""
    state = probe.state_dict()
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file({name: t.contiguous().cpu() for name, t in state["tensors"].items()}, beside / "shadow.safetensors")
    (beside / "ledger.json").write_text(json.dumps(state["plain"], allow_nan=False), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def load(probe: Probe, folder: Path) -> None:
    """OSError, SafetensorError: missing or damaged files; ValueError, KeyError: not a state of these tensors."""
    plain = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
    probe.load_state_dict({"tensors": load_file(folder / "shadow.safetensors"), "plain": plain})
