"""One function on many inputs, some at once, in threads."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def as_finished(function: Callable[[A], B], inputs: Sequence[A], workers: int) -> Iterator[tuple[int, B]]:
    """Results in the order in which they are finished.

    No more than `workers` inputs are under way, so that little is lost when the first exception, or the caller, ends
    the loop; what was finished before the exception comes first.

    Args:
        function: Must be safe to call from several threads.
        inputs: Its arguments.
        workers: Calls at once, ≥ 1.

    Yields:
        Place in `inputs`, and result.
    """
    waiting = iter(enumerate(inputs))
    with ThreadPoolExecutor(workers) as pool:
        running: dict[Future[B], int] = {}
        failed: Future[B] | None = None
        while True:
            while failed is None and len(running) < workers and (task := next(waiting, None)) is not None:
                running[pool.submit(function, task[1])] = task[0]
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                place = running.pop(future)
                if future.exception() is None:
                    yield place, future.result()
                else:
                    failed = failed or future
        if failed is not None:
            failed.result()
