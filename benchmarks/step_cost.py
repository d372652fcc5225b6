"""What bounds a training step of the default profile: its share of one core's peak, and what else it spends time on.

Peak is a float32 product of two square matrices on one thread, timed in turn with the steps. Steps are those of
`benchmarks.preserve`. FLOPs are those of matrix products and attention, where a multiplication and an addition are two.
A step's share of the peak is the share of its time in products, times the speed of these products over the peak.
Run as `python -m benchmarks.step_cost`, on an idle machine.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks._harness import alternate, command, show, spread, write
from benchmarks.preserve import Loop, job_of
from pipelines.profile import merged

CONTENDERS = {"baseline_lora": "none", "pure_grit": "distill"}  # arm → preserve, as in profiles/tiny.yaml
SIZE, ROUNDS, WARM_UP, STEPS = 1536, 60, 8, 8
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm",
            str(ATTENTION).replace(".", "::"), str(ATTENTION_BACKWARD).replace(".", "::")}  # fmt: skip
# torch counts attention on GPUs alone.
OF_CPU: dict[Any, Any] = {
    ATTENTION: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    ATTENTION_BACKWARD: lambda out, q, k, v, *_, **__: sdpa_backward_flop_count(out, q, k, v),
}


def counted(loop: Loop) -> dict[str, float]:
    """GFLOP and operations of a step, the share of its tokens that are padding, and of its time in products."""
    masks: list[torch.Tensor] = []
    hook = loop.trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"].flatten()), with_kwargs=True
    )
    with FlopCounterMode(display=False, custom_mapping=OF_CPU) as counter:
        for _ in range(STEPS):
            loop.step()
    hook.remove()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            loop.step()
    events = profiler.key_averages()
    products = sum(event.self_cpu_time_total for event in events if event.key in PRODUCTS)
    return {
        "gflop": counter.get_total_flops() / STEPS / 1e9,
        "padding": 1 - float(torch.cat(masks).float().mean()),
        "in_products": products / sum(event.self_cpu_time_total for event in events),
        "operations": sum(event.count for event in events if event.key.startswith("aten::")) / STEPS,
    }


def main() -> None:
    torch.set_num_threads(1)
    raw, _ = merged("tiny")
    matrix = torch.rand(SIZE, SIZE)
    with TemporaryDirectory() as folder:
        loops = {arm: Loop(job_of(128, Path(folder), form, raw, arm), arm) for arm, form in CONTENDERS.items()}
        works = {"peak": lambda: matrix @ matrix, **{arm: loop.step for arm, loop in loops.items()}}
        seconds = alternate(works, ROUNDS, WARM_UP)
        counts = {arm: counted(loop) for arm, loop in loops.items()}
    peak = 2 * SIZE**3 / 1e9 / spread(seconds["peak"])["median"]
    rows = []
    for arm, count in counts.items():
        times = spread([1000 * one for one in seconds[arm]])
        speed = 1000 * count["gflop"] / times["median"]
        rows.append({
            "arm": arm, "preserve": CONTENDERS[arm], **count, "ms": times, "gflop_per_second": speed,
            "of_peak": speed / peak, "of_peak_without_padding": speed / peak * (1 - count["padding"]),
            "products_of_peak": speed / peak / count["in_products"],
        })  # fmt: skip
    columns = {
        "arm": lambda row: row["arm"],
        "GFLOP": lambda row: f"{row['gflop']:.2f}",
        "ms [min, max]": lambda row: "{median:.1f} [{low:.1f}, {high:.1f}]".format(**row["ms"]),
        "GFLOP/s": lambda row: f"{row['gflop_per_second']:.0f}",
        "of peak": lambda row: f"{row['of_peak']:.1%}",
        "time in products": lambda row: f"{row['in_products']:.1%}",
        "their speed of peak": lambda row: f"{row['products_of_peak']:.1%}",
        "padding": lambda row: f"{row['padding']:.1%}",
        "of peak without": lambda row: f"{row['of_peak_without_padding']:.1%}",
        "operations": lambda row: f"{row['operations']:,.0f}",
    }
    title = f"A step of the default profile; peak of one core {peak:.0f} GFLOP/s"
    show(title, columns, rows, width=140)
    write("step_cost", title, rows=rows, peak_gflop_per_second=peak, threads=1)


if __name__ == "__main__":
    command(main)
