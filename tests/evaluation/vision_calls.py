"""What a picture is drawn of, for tests that hold answers against it."""

from collections.abc import Callable
from typing import Any

from evaluation.vision.canvas import Canvas


def recorded(monkeypatch: Any, draw: Callable[[], Any]) -> tuple[Any, list[tuple[Any, ...]]]:
    """What `draw` returns, and the names and arguments of all it drew."""
    calls: list[tuple[Any, ...]] = []
    for name in ("rectangle", "line", "disc", "polygon"):
        original = getattr(Canvas, name)
        monkeypatch.setattr(
            Canvas, name, lambda self, *a, _name=name, _draw=original: (calls.append((_name, *a)), _draw(self, *a))[1]
        )
    made = draw()
    monkeypatch.undo()
    return made, calls


def needle(calls: list[tuple[Any, ...]]) -> float:
    """Where the needle of a dial points, as a share of the way from left to right: it is the last line."""
    import math

    (x, y), (tip_x, tip_y) = next(call[1:3] for call in reversed(calls) if call[0] == "line")
    return 1.0 - math.atan2(y - tip_y, tip_x - x) / math.pi
