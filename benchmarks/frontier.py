"""How many steps LoRA's optimizers and starts need, each tuned with the same budget, against AdamW that is tuned too.

Every run is one of the pipeline's arms, by `trainers.run.run`, on the data and the base of the default profile: rank
16, batches of 16, a linear schedule that ends at the horizon, nothing preserved. Batches that a start reads count as
steps. A row a run goes to results/frontier_runs.jsonl; a run whose row is there is not repeated, so the bench goes on
after a kill, and several processes share the work (each with one thread). Seconds in rows are those of a shared
machine; the table's time ratio comes from `--time`, which takes the methods in turn.

Tuning, the same for every method, on split valid and seed 100; the best five (two after 150) are run on seeds 101 and
102 too, and the mean decides, since single runs differ by 0.01 nats between seeds: with one seed more for three, AdamW
had been given a setting 0.006 nats worse than another of its grid.
  150  5 pairs of α and β₁ × 3 rates; then the best without warm-up, and a rate beyond where its rate is the last
  300  the best two of 150, × rate 1 and 0.6
  600  the best of 300 × rate 1 and 0.6, the second × 0.6; the best × rate 1 and 0.6 with β₂ 0.99, where there is one:
       0.999 remembers more than 600 steps (at 150 it is no worse)
   75  the best of 150, × rate 1 and 1.5 (AdamW and ours); 112, 225, 450 likewise, × 1 and 1.3 (ours)
Of a method whose best on seed 100 is more than 8% above AdamW's, that one alone is run on the other two seeds.
A run on seed 100 is given up where at a third of its steps it is more than 15% above the best so far, of its method and
horizon.

Comparing: seeds 0 to 4 on split test, with `--more-seeds` 0 to 9; the table takes all that are there. What is tuned
to no better than 8% above AdamW at 150 is compared there alone.

Our own entry was found in earlier trials, among them three other entries with the whole budget (docs/log):
that is more than any rival had.

rsLoRA is AdamW with α·√r in the place of α, a point of the grid, and has no runs of its own. A new method is an entry
of METHODS; one that has been changed is run anew, since its entry is part of a row's key. A new centre of rates keeps
the rows that both grids share.

  python -m benchmarks.frontier --horizons 150 300    # run them, then write results/frontier.json
  python -m benchmarks.frontier --report              # that alone, from the rows
  python -m benchmarks.frontier --world rank4 --rank 4 --horizons 150 --methods adamw grit
  python -m benchmarks.frontier --world yes_no --project ../another-clone --horizons 150 --methods adamw grit
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from benchmarks._harness import FOLDER, RESULTS, interval, interval_text, ratios, write
from db.files import git_state, torch_device

NAME, RANK, OURS = "frontier", 16, "grit"
HORIZONS = (75, 150, 300, 600)
SEEDS, MORE_SEEDS, TUNING_SEEDS = range(5), range(10), (100, 101, 102)
AGAIN = {75: 2, 150: 5, 300: 2, 600: 2}
"""Horizon → how many of the best are run on the other tuning seeds too."""
STEPS_BETWEEN = {112: 150, 225: 300, 450: 600}
"""Where the curve of our own method is measured too → the horizon that its tuning starts from."""
KEPT = ("method", "horizon", "seed", "kind", "settings", "loss", "pruned", "seconds_a_step")
FARTHER, FEWER = 1.7, 0.6
GIVE_UP, TOO_FAR = 1.15, 1.08

POINTS = ((64, 0.8), (128, 0.8), (128, 0.7), (128, 0.9), (64, 0.9))
SLOWER = ((64, 0.9), (128, 0.9), (128, 0.8), (128, 0.95), (64, 0.95))
"""(α, β₁) where the package's own β₁ is above AdamW's."""


@dataclass(frozen=True)
class Method:
    rate: float  # the middle one of three
    train: Mapping[str, Any] = field(default_factory=dict)  # of section train, and of the arm
    arm: str = "baseline_lora"
    points: Sequence[tuple[int, float]] = POINTS
    momentum: str | None = "betas"  # argument that takes β₁; None: it has none
    beta2: float = 0.999
    start: int = 0  # steps that the batches of its start would have made


def _peft(**values: Any) -> dict[str, Any]:
    return {"peft": values}


def _optimizer(path: str, **own: Any) -> dict[str, Any]:
    return {"optimizer": path, "optim_args": own}


# Centres: AdamW's and GRIT's from earlier trials, the others' from a scan at 48 steps with α 64 and β₁ 0.8 (0.9 of
# SLOWER), rates a factor of 3 apart.
METHODS: dict[str, Method] = {
    "adamw": Method(3e-3),
    OURS: Method(
        2.8e-3,
        {"grit": {"enable_rank_adaptation": False, "nesterov": True, "cautious": True, "orthogonal": True}},
        arm="pure_grit",
    ),
    "adamw_ahead": Method(3e-3, _optimizer("benchmarks._rivals.AheadAdamW")),
    # GRIT without its axes:
    "adamw_orthogonal": Method(2.8e-3, _optimizer("benchmarks._rivals.AheadAdamW", orthogonal=True)),
    "lora_plus": Method(4e-3, _optimizer("peft.optimizers.create_loraplus_optimizer", loraplus_lr_ratio=4)),
    "dora": Method(3e-3, _peft(use_dora=True)),
    "pissa": Method(3e-3, _peft(init_lora_weights="pissa")),
    "olora": Method(2.5e-3, _peft(init_lora_weights="olora")),
    "eva": Method(6e-3, _peft(init_lora_weights="eva"), start=4),
    "lora_ga": Method(3e-3, _peft(init_lora_weights="lora_ga"), start=4),
    "corda": Method(2.5e-3, _peft(init_lora_weights="corda"), start=4),
    "lora_one": Method(8e-3, arm="lora_one", start=1),
    "riemannian": Method(7e-3, _optimizer("peft.optimizers.create_riemannian_optimizer")),
    "lora_fa": Method(
        1.5e-2,
        _optimizer("peft.optimizers.create_lorafa_optimizer"),
        points=((32, 0), (64, 0), (128, 0), (256, 0), (512, 0)),
        momentum=None,
    ),
    "lora_rite": Method(4e-3, _optimizer("pytorch_optimizer.LoRARite") | {"max_grad_norm": 0.0}),  # it clips itself
    "muon": Method(
        2.5e-2, _optimizer("torch.optim.Muon", adjust_lr_fn="match_rms_adamw"), points=SLOWER, momentum="momentum"
    ),
    "soap": Method(9e-3, _optimizer("pytorch_optimizer.SOAP", precondition_frequency=5), beta2=0.95),
    "shampoo": Method(
        3e-3,
        _optimizer(
            "pytorch_optimizer.ScalableShampoo",
            graft_type=3,  # RMSProp's length of step
            moving_average_for_momentum=True,
            start_preconditioning_step=5,
            preconditioning_compute_steps=5,
        ),
        beta2=0.99,
    ),
    # With its d₀ of 1e-6, or guarded against the warm-up, it has hardly moved after 48 steps.
    "prodigy": Method(1.0, _optimizer("prodigyopt.Prodigy", use_bias_correction=True, d0=1e-4)),
    "schedule_free": Method(7e-3, _optimizer("schedule_free_adamw") | {"lr_scheduler": "constant"}, points=SLOWER),
}

# Rows


def key(run: Mapping[str, Any]) -> str:
    return json.dumps(
        [run[name] for name in ("method", "entry", "settings", "horizon", "seed", "kind")], sort_keys=True
    )


def rows_of(file: Path) -> list[dict[str, Any]]:
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with suppress(ValueError):  # cut short by a kill
            rows.append(json.loads(line))
    return rows


def read_rows() -> dict[str, dict[str, Any]]:
    return {key(row): row for row in rows_of(_file())}


def _file() -> Path:
    return RESULTS / f"{NAME}_runs.jsonl"


def append(row: Mapping[str, Any], to: Path) -> None:
    with to.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(max(0, file.tell() - 1))
        cut = file.read(1) not in (b"\n", b"")
        file.write(b"\n" * cut + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


# What there is to run

Rows = Mapping[str, Mapping[str, Any]]


def _run(name: str, horizon: int, settings: Mapping[str, Any], kind: str = "tune", seed: int = TUNING_SEEDS[0]) -> Any:
    entry = {k: v for k, v in asdict(METHODS[name]).items() if k not in ("rate", "points")}
    if RANK != 16:
        entry["rank"] = RANK
    return {
        "method": name, "entry": entry, "settings": dict(settings), "horizon": horizon, "seed": seed, "kind": kind,
    }  # fmt: skip


def _loss(row: Mapping[str, Any]) -> float:
    return math.inf if row["loss"] is None else float(row["loss"])


def _times(settings: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {**settings, "rate": float(f"{settings['rate'] * factor:.3g}")}


def tried(name: str, horizon: int, rows: Rows) -> list[dict[str, Any]]:
    """Settings that a method is tuned over at a horizon, as far as they can be told from the rows."""
    if horizon != 150:
        first = ranked(name, {300: 150, 600: 300, 75: 150, **STEPS_BETWEEN}[horizon], rows)
        if not first:
            return []
        best, second = first[0][1], first[min(1, len(first) - 1)][1]
        both = (best, _times(best, FEWER)) if METHODS[name].momentum == "betas" else ()
        shorter = [{**settings, "beta2": 0.99} for settings in both]
        choices = {
            300: [best, _times(best, FEWER), second, _times(second, FEWER)],
            600: [best, _times(best, FEWER), _times(second, FEWER), *shorter],
            75: [best, _times(best, 1.5)],
        }.get(horizon, [best, _times(best, 1.3)])
        return [settings for number, settings in enumerate(choices) if settings not in choices[:number]]
    rates = [float(f"{METHODS[name].rate * factor:.3g}") for factor in (1, FEWER, FARTHER)]
    grid: list[dict[str, Any]] = [
        {"alpha": alpha, "beta1": beta1, "warmup": 0.13, "rate": rate}
        for rate in rates
        for alpha, beta1 in METHODS[name].points
    ]
    return grid


def tries(name: str, horizon: int, rows: Rows) -> list[Any]:
    """The tuning runs of a method at a horizon, as far as they can be told from the rows."""
    first = [_run(name, horizon, settings) for settings in tried(name, horizon, rows)]
    if not first or any(key(run) not in rows for run in first):
        return first
    best = sorted(first, key=lambda run: _loss(rows[key(run)]))
    yardstick = [key(_run("adamw", horizon, settings)) for settings in tried("adamw", horizon, rows)]
    adamw = [_loss(rows[k]) for k in yardstick if k in rows]
    far = adamw and _loss(rows[key(best[0])]) > TOO_FAR * min(adamw)
    again = best[: 1 if far else AGAIN.get(horizon, 2)]
    runs = first + _on_all_seeds(again)
    if horizon != 150 or far or any(key(run) not in rows for run in runs):
        return runs
    chosen = min(again, key=lambda run: _mean_loss(run, rows))["settings"]
    rates = sorted({run["settings"]["rate"] for run in first})
    beyond = {rates[0]: FEWER, rates[-1]: FARTHER}.get(chosen["rate"])
    more = [{**chosen, "warmup": 0.0}, *([_times(chosen, beyond)] if beyond else [])]
    extra = [_run(name, horizon, settings) for settings in more]
    return runs + extra + _on_all_seeds(extra)


def _on_all_seeds(tuned: Sequence[Any]) -> list[Any]:
    return [{**run, "seed": seed} for run in tuned for seed in TUNING_SEEDS[1:]]


def _mean_loss(run: Mapping[str, Any], rows: Rows) -> float:
    return statistics.fmean(_loss(rows[key({**run, "seed": seed})]) for seed in TUNING_SEEDS)


def ranked(name: str, horizon: int, rows: Rows) -> list[tuple[float, dict[str, Any]]]:
    """Mean loss and settings of what was run on all tuning seeds, the best first; empty while some are to come."""
    planned = tries(name, horizon, rows)
    if any(key(run) not in rows for run in planned):
        return []
    again = [run for run in planned if run["seed"] == TUNING_SEEDS[1]]
    return sorted(((_mean_loss(run, rows), run["settings"]) for run in again), key=lambda pair: pair[0])


def compared(name: str, horizon: int, rows: Rows, seeds: Sequence[int] = SEEDS) -> list[Any]:
    best = ranked(name, horizon, rows)
    if not best or math.isinf(best[0][0]):
        return []
    return [_run(name, horizon, best[0][1], "compare", seed) for seed in seeds]


def too_far(name: str, rows: Rows) -> bool:
    own, adamw = ranked(name, 150, rows), ranked("adamw", 150, rows)
    return bool(own and adamw) and own[0][0] > TOO_FAR * adamw[0][0]


def runs(horizons: Sequence[int], methods: Sequence[str], rows: Rows, seeds: Sequence[int] = SEEDS) -> Iterator[Any]:
    """What can be run by now and has no row, in order."""
    first = [name for name in methods if name in ("adamw", OURS)]
    stages = [(150, first), (75, first), (150, methods), (300, methods), (600, methods)]
    for horizon, names in stages:
        for name in names if horizon in horizons else ():
            if horizon != 150 and too_far(name, rows):
                continue
            ours = [h for h, of in STEPS_BETWEEN.items() if of == horizon and name == OURS]
            wanted = []
            for h in [horizon, *ours]:
                wanted += tries(name, h, rows) + compared(name, h, rows, seeds)
            yield from (run for run in wanted if key(run) not in rows)


# A run


def _arm(name: str) -> Any:
    from benchmarks import _rivals
    from trainers import arms

    return _rivals.LORA_ONE if name == "lora_one" else arms.load(name)


def train(
    run: Mapping[str, Any], limit: float = math.inf, report: Any = None, callbacks: Sequence[Any] = ()
) -> dict[str, Any]:
    """The row of a run; `limit`: validation loss at a third of its steps above which it is given up.

    `report`: as an arm's.
    """
    import torch
    from transformers import TrainerCallback

    from pipelines.params import load_params
    from pipelines.prompt import prompt_text
    from pipelines.train import Params, examples, job_of
    from trainers.run import run as train_arm

    torch.set_num_threads(1)
    params = load_params(Params)
    own, entry, arm = run["settings"], run["entry"], _arm(run["entry"]["arm"])
    steps = run["horizon"] - entry["start"]
    optim_args = dict(entry["train"].get("optim_args", {}))
    if entry["momentum"]:
        betas = {"betas": [own["beta1"], own.get("beta2", entry["beta2"])]}
        optim_args |= betas if entry["momentum"] == "betas" else {entry["momentum"]: own["beta1"]}
    never = dict.fromkeys(("logging_steps", "eval_steps", "save_steps", "probe_every"), 10**9)
    settings = arm.settings(
        **{
            **params.train.model_dump(),
            **entry["train"],
            **never,
            "max_steps": steps,
            "epochs": None,
            "rank": RANK,
            "learning_rate": own["rate"],
            "alpha": own["alpha"] * RANK / 16,  # as for rank 16, so that s is the same
            "warmup_steps": round(own["warmup"] * run["horizon"]),
            "optim_args": optim_args,
        }
    )
    third: dict[str, float] = {}

    class GiveUp(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_evaluate |= run["kind"] == "tune" and state.global_step == steps // 3

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
            if state.global_step == steps // 3:
                third["loss"] = metrics["eval_loss"]
                control.should_training_stop = not metrics["eval_loss"] <= limit

    def make_trainer(settings: Any, **kwargs: Any) -> Any:
        trainer = arm.make_trainer(settings, **kwargs)
        for callback in (GiveUp(), *callbacks):
            trainer.add_callback(callback)
        return trainer

    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "adapter").mkdir()
        job = job_of(params, settings, run["seed"], folder / "adapter", folder / "checkpoints")
        if run["kind"] == "compare":
            job = replace(job, valid=examples("test", prompt_text(params.prompt)))
        said = train_arm(replace(arm, make_trainer=make_trainer, report=report), replace(job, texts=[]))
    loss, at_third = said["final_eval_loss"], third.get("loss", math.nan)
    pruned = said["steps"] < steps
    return {
        **run,
        "loss": loss if math.isfinite(loss) and not pruned else None,  # nats a token
        "pruned": pruned,
        "loss_at_a_third": at_third if math.isfinite(at_third) else None,
        "steps": said["steps"],
        "start_steps": entry["start"],
        "train_seconds": said["train_seconds"],
        "seconds_a_step": said["train_seconds"] / said["steps"],
        "parameters": said["trainable_parameters"],
        "peak_memory_bytes": said["peak_memory_bytes"],  # of the whole process
        "device": torch_device(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(),
    }


def work(horizons: Sequence[int], methods: Sequence[str], seeds: Sequence[int] = SEEDS) -> None:
    """Run whatever is to be run, together with other processes that do the same."""
    import peft.optimizers  # noqa: F401
    import trl  # noqa: F401

    claims = Path(tempfile.gettempdir()) / "frontier_claims"
    claims.mkdir(exist_ok=True)
    while waiting := list(runs(horizons, methods, read_rows(), seeds)):
        for run in waiting:
            try:
                with FileLock(claims / hashlib.sha256(f"{NAME} {key(run)}".encode()).hexdigest()[:16], timeout=0):
                    if key(run) in (rows := read_rows()):
                        continue
                    limit = math.inf
                    if run["seed"] == TUNING_SEEDS[0]:  # on the others only the best are run
                        alike = ("method", "entry", "horizon", "seed")
                        thirds = [r["loss_at_a_third"] for r in rows.values() if all(r[k] == run[k] for k in alike)]
                        limit = GIVE_UP * min((loss for loss in thirds if loss), default=math.inf)
                    # A process of its own: memory is that of the run.
                    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
                        row = pool.submit(train, run, limit).result()
                    append(row, _file())
                    said = "given up" if row["pruned"] else row["loss"]
                    print(run["method"], run["kind"], run["horizon"], run["seed"], run["settings"], said, flush=True)
                break
            except Timeout:
                continue
        else:
            time.sleep(5)


# The table


def time_steps(methods: Sequence[str], blocks: int = 6, block: int = 10) -> None:
    """Seconds a step, on a machine that does nothing else: every method in a process of its own, a step each in turn.

    A block holds all that GRIT does every few steps; one block goes before, unmeasured. What a start computes before
    the first step is not in it. Beside it the bytes of an optimizer's state over those of the weights it trains.
    """
    from transformers import TrainerCallback

    context = get_context("fork")
    turns = [context.Semaphore(number == 0) for number in range(len(methods))]
    found = context.SimpleQueue()
    steps = (blocks + 1) * block + 1  # in the last one others have begun to evaluate

    def work(number: int, name: str) -> None:
        seconds, share = [], []

        class Turn(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                turns[number].acquire()
                self.begun = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                seconds.append(time.perf_counter() - self.begun)
                if state.global_step == state.max_steps:  # before PiSSA and its like are saved at twice the rank
                    weights = [p for p in kwargs["model"].parameters() if p.requires_grad]
                    share.append(_bytes(kwargs["optimizer"].state_dict()) / _bytes(weights))
                turns[(number + 1) % len(methods)].release()

        own = {"alpha": 64, "beta1": 0.8, "warmup": 0.13, "rate": METHODS[name].rate / 10}
        train(_run(name, steps + METHODS[name].start, own, "compare"), callbacks=[Turn()])
        means = [statistics.fmean(seconds[i : i + block]) for i in range(block, steps - 1, block)]
        found.put((name, means, share[0]))

    processes = [context.Process(target=work, args=pair) for pair in enumerate(methods)]
    for process in processes:
        process.start()
    running: dict[Any, Any] = {process.sentinel: process for process in processes}
    while running:
        for sentinel in wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:  # nobody gets a turn any more
                for other in running.values():
                    other.terminate()
                raise SystemExit("not every method ended well: see above; `make foreign` installs the rivals' packages")
    of = {name: (seconds, share) for name, seconds, share in (found.get() for _ in methods)}
    seconds, state = ({name: of[name][place] for name in methods} for place in (0, 1))
    write(f"{NAME}_time", "Time of a step", seconds=seconds, ratios=ratios(seconds, "adamw"), state=state)


def _bytes(value: Any) -> int:
    """Of all tensors in an optimizer's state; what it keeps in objects, as Shampoo does, is not seen."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return sum(map(_bytes, value))
    return value.nbytes if hasattr(value, "nbytes") else 0


def steps_to(loss: float, curve: Mapping[int, float]) -> float:
    """Log of the steps at which a curve, linear between its points in log steps, has a loss.

    Beyond its ends it goes on as there, for a factor of two at most; NaN where it is not reached.
    """
    points = sorted((math.log(steps), own) for steps, own in curve.items())
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 <= loss or (x1, y1) == points[-1]:
            found = x0 + (loss - y0) * (x1 - x0) / (y1 - y0) if y1 < y0 else math.nan
            return found if points[0][0] - math.log(2) <= found <= points[-1][0] + math.log(2) else math.nan
    return math.nan


def sensitivity(name: str, rows: Rows) -> float | None:
    """Largest over smallest rate of the tuning runs at 150 within 2% of the best."""
    found = [rows[k] for run in tries(name, 150, rows) if run["seed"] == TUNING_SEEDS[0] and (k := key(run)) in rows]
    best = min(map(_loss, found), default=0.0)
    rates = [row["settings"]["rate"] for row in found if _loss(row) <= 1.02 * best]
    return max(rates) / min(rates) if rates else None


def report(rows: Rows) -> None:
    losses: dict[str, dict[int, dict[int, float]]] = {}  # method → horizon → seed → loss
    timed = RESULTS / f"{NAME}_time.json"
    measured = json.loads(timed.read_text(encoding="utf-8")) if timed.is_file() else {"ratios": {}, "state": {}}
    share = measured["ratios"]
    for name in METHODS:
        for horizon in sorted({*HORIZONS, *STEPS_BETWEEN}):
            if horizon != 150 and too_far(name, rows):
                continue
            planned = compared(name, horizon, rows, MORE_SEEDS)
            done = {run["seed"]: _loss(rows[k]) for run in planned if (k := key(run)) in rows}
            if len(done) >= len(SEEDS):
                losses.setdefault(name, {})[horizon] = done
    if "adamw" not in losses:
        raise SystemExit("no table yet: AdamW has not been compared")
    adamw = losses["adamw"]
    lines: list[dict[str, Any]] = []
    for name, own in losses.items():
        mean = {h: statistics.fmean(of_seeds.values()) for h, of_seeds in own.items()}
        for horizon in (h for h in HORIZONS if h in own and h in adamw):
            at, theirs = own[horizon], adamw[horizon]
            both = sorted(at.keys() & theirs.keys())
            line = {"method": name, "horizon": horizon, "settings": compared(name, horizon, rows)[0]["settings"]}
            line["seeds"] = len(both)
            line["loss"] = interval(list(at.values()))
            line["to_adamw"] = interval([at[seed] - theirs[seed] for seed in both])
            # The method's mean curve, moved to where this seed has it at the horizon, meets this seed's AdamW.
            moved = {seed: at[seed] - mean[horizon] for seed in both}
            logs = [steps_to(theirs[seed] - moved[seed], mean) - math.log(horizon) for seed in both]
            if all(map(math.isfinite, logs)):
                beyond = math.exp(min(logs)) * horizon < min(mean) or math.exp(max(logs)) * horizon > max(mean)
                line["extrapolated"] = beyond
                line["steps_ratio"] = [math.exp(value) for value in interval(logs)]
                if name in share:
                    line["time_ratio"] = [share[name]["median"] * value for value in line["steps_ratio"]]
            line["sensitivity"] = sensitivity(name, rows)
            line["state"] = measured["state"].get(name)
            rates = [run["settings"]["rate"] for run in tries(name, 150, rows)]
            line["at_border"] = horizon == 150 and line["settings"]["rate"] in (min(rates), max(rates))
            line["compared_at_150_alone"] = too_far(name, rows)
            lines.append(line)
    table = Table(
        "method", "steps", "seeds", "loss", "− AdamW's", "steps ratio", "time ratio", "rates within 2%",
        "state / weights",
        title="95% t-intervals; *: too far to go on; !: best rate at border; ~: beyond the curve",
        title_justify="left",
    )  # fmt: skip
    for line in sorted(lines, key=lambda line: (line["horizon"], line["loss"][0])):
        marks = "*" * line["compared_at_150_alone"] + "!" * line["at_border"]
        shown = [line["method"] + marks, str(line["horizon"]), str(line["seeds"])]
        for kind in ("loss", "to_adamw", "steps_ratio", "time_ratio"):
            digits = 2 if "ratio" in kind else 4
            text = interval_text(line[kind], digits) if kind in line else ""
            shown.append(text + "~" * (kind == "steps_ratio" and line.get("extrapolated", False)))
        state = f"{line['state']:.2f}" if line["state"] else ""
        table.add_row(*shown, f"{line['sensitivity']:.2f}×" if line["sensitivity"] else "", state)
    Console(width=180).print(table)
    plot(losses, share, FOLDER / "docs" / f"{NAME}.png")
    ahead: dict[str, dict[int, float]] = {}
    for name, own in losses.items():
        for horizon, theirs in own.items():
            ours = losses.get(OURS, {}).get(horizon, {})
            gain = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
            if gain and statistics.fmean(gain) > 0:
                ahead.setdefault(name, {})[horizon] = statistics.fmean(gain)
    write(
        NAME,
        "Loss at equal steps, and steps to tuned AdamW's loss",
        ours=OURS,
        seeds=list(SEEDS),
        steps_ratio={line["horizon"]: line.get("steps_ratio") for line in lines if line["method"] == OURS},
        rivals_ahead=ahead,  # name → horizon → nats
        table=lines,
        rows=[{name: row[name] for name in KEPT} for row in rows.values()],
    )


def plot(losses: Mapping[str, Any], share: Mapping[str, Any], file: Path) -> None:
    """Loss at the end of a schedule over its steps, and over its time in AdamW's steps; means and 95% t-intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = ("steps", "time, in steps of AdamW") if share else ("steps",)
    figure, axes = plt.subplots(
        1, len(titles), figsize=(5 * len(titles), 4.2), sharey=True, layout="constrained", squeeze=False
    )
    panels = axes[0]
    colors = {"adamw": "#555555", OURS: "#0b6fb8"}
    labels: dict[tuple[Any, int], list[tuple[float, float, str]]] = {}
    for name, own in sorted(losses.items(), key=lambda pair: pair[0] in colors):
        horizons = sorted(own)
        points = [interval(list(own[h].values())) for h in horizons]
        mean = [point[0] for point in points]
        spread = [[m - low for m, low, _ in points], [high - m for m, _, high in points]]
        for panel, scale in zip(panels, (1.0, share.get(name, {}).get("median")), strict=False):
            if scale is None:  # not timed
                continue
            style = {"color": colors.get(name, "#d9a441"), "linewidth": 2.0 if name in colors else 0.8}
            label = {"adamw": "AdamW", OURS: "GRIT"}.get(name)
            bars = spread if name in colors else None
            panel.errorbar([h * scale for h in horizons], mean, yerr=bars, capsize=2, marker=".", label=label, **style)
            if name not in colors:
                labels.setdefault((panel, horizons[-1]), []).append((mean[-1], horizons[-1] * scale, name))
    low, high = panels[0].get_ylim()
    for (panel, _), own in labels.items():
        heights = [low]
        for y, *_ in sorted(own):
            heights.append(max(y, heights[-1] + (high - low) / 45))  # none on another one
        lift = statistics.fmean(heights[1:]) - statistics.fmean(y for y, *_ in own)
        right = max(x for _, x, _ in own) * 1.1
        for height, (y, x, name) in zip(heights[1:], sorted(own), strict=True):
            line = {"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.5}
            panel.annotate(name, (x, y), (right, height - lift), va="center", size=6, arrowprops=line)
    for panel, title in zip(panels, titles, strict=True):
        panel.set_xscale("log")
        ticks = [75, 150, 300, 600]
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.set_xlabel(title)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("loss on split test, nats a token")
    panels[0].legend(frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    global NAME, RANK
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--horizons", nargs="+", type=int, choices=HORIZONS, default=HORIZONS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--more-seeds", action="store_true", help=f"compare on {len(MORE_SEEDS)} seeds, not {len(SEEDS)}"
    )
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument(
        "--world", default="", help="a name for rows and results of their own: another task, base, rank"
    )
    parser.add_argument(
        "--project", type=Path, default=FOLDER, help="folder with its params.yaml, data/ and models/base"
    )
    parser.add_argument("--report", action="store_true", help="the table alone")
    parser.add_argument("--time", action="store_true", help="time a step of each method, on an idle machine")
    args = parser.parse_args()
    if args.world == "" and (args.rank != RANK or args.project != FOLDER):
        parser.error("--world: expected a name beside --rank or --project, so that their rows stand apart")
    if args.world:
        NAME, RANK = f"frontier_{args.world}", args.rank
    os.chdir(args.project)
    from pipelines.stage import quiet_libraries

    quiet_libraries()
    if args.time:
        time_steps(list(dict.fromkeys(["adamw", *args.methods])))
    elif not args.report:
        work(args.horizons, args.methods, MORE_SEEDS if args.more_seeds else SEEDS)
    report(read_rows())


if __name__ == "__main__":
    main()
