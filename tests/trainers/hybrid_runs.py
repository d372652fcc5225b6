"""Runs jobs of the arm hybrid_grit in a process of its own: python -m tests.trainers.hybrid_runs FILE.

FILE holds [(name, job, whether Unsloth's get_peft_model fuses MLPs as on a GPU, step → evaluation loss to report
instead of the measured one)]; FILE.seen gets what was seen.
"""

import dataclasses
import logging
import pickle
import sys
from pathlib import Path

from tests.trainers.fused_double import fuse_mlps
from tests.trainers.lasting_runs import tell
from trainers.common import run
from trainers.hybrid_grit import ARM

LIGHT = not {"unsloth", "trl", "transformers"} & set(sys.modules)


def watched(seen, fused, losses):
    """The arm, with its steps looked at and `losses` (step → evaluation loss) told, where there are any."""

    def add_adapter(model, settings):
        from unsloth import FastLanguageModel

        plain = FastLanguageModel.get_peft_model
        if fused:
            FastLanguageModel.get_peft_model = staticmethod(lambda *a, **k: fuse_mlps(plain(*a, **k)))
        try:
            model = ARM.add_adapter(model, settings)
        finally:
            FastLanguageModel.get_peft_model = plain
        seen["start"] = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        seen["forward"] = 0
        first = next(m for n, m in model.named_modules() if n.endswith("q_proj.lora_A.default"))

        def count(*_):
            seen["forward"] += model.training

        first.register_forward_hook(count)
        return model

    def make_trainer(settings, **kwargs):
        from grit import statistics

        gather = statistics.gather
        seen["tokens"] = []  # of each step, as GRIT's hooks on the first layer counted them

        def looked_at(manager):
            if manager.capture is not None:
                seen["tokens"].append(float(manager.capture.sums[0].tokens[0]))
            return gather(manager)

        statistics.gather = looked_at
        trainer = ARM.make_trainer(settings, **kwargs)
        tell(trainer, losses)
        seen["classes"] = [f"{c.__module__}.{c.__qualname__}" for c in type(trainer).__mro__]
        seen["optimizer"] = str(trainer.args.optim.value)
        return trainer

    return dataclasses.replace(ARM, add_adapter=add_adapter, make_trainer=make_trainer)


def main(file: Path) -> None:
    results = {}
    log, network = [], []
    asked = ("socket.connect", "socket.getaddrinfo")
    sys.addaudithook(lambda event, args: network.append(str(args[1:])) if event in asked else None)
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())
    logging.getLogger("grit").addHandler(handler)
    for name, job, fused, losses in pickle.loads(file.read_bytes()):
        from grit import statistics

        log.clear()
        seen = {"light": LIGHT, "network": network}
        gather = statistics.gather
        result = run(watched(seen, fused, losses), job)
        statistics.gather = gather
        results[name] = {**seen, "summary": result.summary, "history": result.history, "log": list(log)}
    file.with_suffix(".seen").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
