"""The best number of threads for a training step, by layer width, on an idle and on a busy machine.

The contenders are processes: with one thread; with one per core that spins for a while before it sleeps (OpenMP's
default), spins briefly (as the stages do), or sleeps at once. Busy means next to twice as many endless loops as cores.
Run as `python -m benchmarks.threads`, with nothing else running.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from rich.console import Console
from rich.table import Table

from benchmarks._harness import alternate, command, ratios, write

WIDTHS = (64, 128, 256)
CORES = len(os.sched_getaffinity(0))
CONTENDERS = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "spinning": {"OMP_NUM_THREADS": str(CORES)},
    "for a moment": {"OMP_NUM_THREADS": str(CORES), "GOMP_SPINCOUNT": "50000"},
    "passive": {"OMP_NUM_THREADS": str(CORES), "OMP_WAIT_POLICY": "passive"},
}
ROUNDS, STEPS = 5, 3


def _serve(connection: Connection) -> None:
    """Take steps for every width received, until None."""
    from benchmarks import _steps

    loops: dict[int, _steps.Loop] = {}
    while (width := connection.recv()) is not None:
        if width not in loops:
            _steps.SHAPES.setdefault(width, (3 * width, 4, 4, 640, 16, 48, 0))
            loops[width] = _steps.Loop(width, None)
        for _ in range(STEPS):
            loops[width].step()
        connection.send(True)


def _spin() -> None:
    while True:
        pass


def main() -> None:
    """Measure and write the result."""
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    for name, settings in CONTENDERS.items():
        os.environ.update(settings)
        connections[name], theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(theirs,), daemon=True))
        processes[-1].start()
        for key in settings:
            del os.environ[key]

    def steps(name: str, width: int) -> Callable[[], None]:
        def work() -> None:
            connections[name].send(width)
            connections[name].recv()

        return work

    rows = []
    table = Table("width", "machine", *(f"{name}, ms a step" for name in CONTENDERS), title="A step of LoRA training")
    for busy in (False, True):
        others = [context.Process(target=_spin, daemon=True) for _ in range(2 * CORES if busy else 0)]
        for other in others:
            other.start()
        time.sleep(1)
        for width in WIDTHS:
            seconds = alternate({name: steps(name, width) for name in CONTENDERS}, ROUNDS)
            shares = ratios(seconds, "1 thread")
            cells = [
                f"{1000 * sorted(seconds[n])[ROUNDS // 2] / STEPS:.1f} ({shares[n]['median']:.2f})" for n in seconds
            ]
            table.add_row(str(width), "busy" if busy else "idle", *cells)
            rows.append({"width": width, "busy": busy, "seconds": seconds, "ratios": shares})
        for other in others:
            other.kill()
    for connection in connections.values():
        connection.send(None)
    Console().print(table)
    write("threads", f"{STEPS} steps of LoRA training by threads and width", rows=rows, cores=CORES)


if __name__ == "__main__":
    command(main)
