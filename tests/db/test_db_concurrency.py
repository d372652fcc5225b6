"""Several processes on one database, and what is left of it when one of them is killed or the disk is full."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from db import DatabaseError, open_session
from db.cli import app
from db.ingest import ingest, rebuild
from tests.db.result_tree import make_arm, make_tree
from tests.db.workers import CONTEXT, PHASES, Worker, content

ROOT = Path(__file__).parents[2]
TIMES = 20
STEPS = 1500


def history(seed: int) -> list[dict[str, float]]:
    draw = random.Random(seed)
    return [{"loss": draw.random(), "grad_norm": draw.random(), "step": step} for step in range(1, STEPS + 1)]


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """The process that all workers are forked from imports the packages when it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        CONTEXT.Process(target=int).start()
        yield


class Case:
    """Two trees, and every content that a database may rightly have."""

    def __init__(self, folder: Path) -> None:
        self.trees = {"a": make_tree(folder / "a"), "b": make_tree(folder / "b")}
        for seed, (name, correct) in enumerate([("a", 60), ("b", 80)]):
            for arm_seed in (0, 1):
                right = [i < correct for i in range(100)]
                make_arm(self.trees[name], "baseline_lora", arm_seed, correct=right, history=history(seed + arm_seed))
        # The second tree also has a changed experiment and a new arm, so ingest inserts, updates and retires.
        train = self.trees["b"] / "adapters/baseline_lora/1/run.json"
        train.write_text(train.read_text().replace('"learning_rate": 0.001', '"learning_rate": 0.002'))
        make_arm(self.trees["b"], "pure_grit", correct=[True] * 100, history=history(9))
        self.files: dict[str, Path] = {}
        self.contents: dict[str, str] = {}
        self.folder = folder

    def after(self, *steps: str) -> str:
        """The content after steps such as `ingest a`, one after the other."""
        name = ", ".join(steps)
        if name not in self.contents:
            path = self.folder / f"{len(self.files)}.db"
            for step in steps:
                action, tree = step.split()
                (ingest if action == "ingest" else rebuild)(self.trees[tree], path)
            self.files[name], self.contents[name] = path, content(path)
        return self.contents[name]

    def copy(self, path: Path, *steps: str) -> Path:
        """A database to work on; no file for no steps."""
        for old in path.parent.glob(f"{path.name}*"):
            old.unlink()
        if steps:
            self.after(*steps)
            shutil.copy(self.files[", ".join(steps)], path)
        return path

    def measured(self, action: str, path: Path) -> dict[str, float]:
        """Phase → seconds when nobody disturbs."""
        worker = Worker(action, self.trees["b"], path)
        worker.end()
        return worker.durations()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("trees"))


def assert_sound(path: Path) -> None:
    checked = CliRunner().invoke(app, ["check", "--db", str(path)])
    assert checked.exit_code == 0, checked.output
    assert checked.output.splitlines()[-1] == "sound"


def test_the_contents_differ(case: Case) -> None:
    """Else the tests below would prove nothing."""
    steps = [("ingest a",), ("ingest b",), ("ingest a", "ingest b"), ("ingest b", "ingest a")]
    assert len({case.after(*step) for step in steps}) == len(steps)
    assert case.after("ingest a", "ingest a") == case.after("ingest a")
    assert case.after("ingest a", "rebuild b") == case.after("ingest b")
    assert int(case.after("ingest a").split(" metric ")[1].split(",")[0]) > 4 * STEPS


PLANS = [
    (before, first, second)
    for before in ((), ("ingest a",))
    for first, second in (
        ("ingest a", "ingest a"),
        ("ingest a", "ingest b"),
        ("ingest b", "ingest b"),
        ("ingest b", "rebuild a"),
        ("rebuild b", "ingest a"),
    )
]


@pytest.mark.parametrize(("before", "first", "second"), PLANS)
def test_two_at_once_end_as_one_after_the_other(
    case: Case, tmp_path: Path, before: tuple[str, ...], first: str, second: str
) -> None:
    allowed = {case.after(*before, first, second), case.after(*before, second, first)}
    for _ in range(TIMES // len(PLANS)):
        path = case.copy(tmp_path / "c.db", *before)
        start = CONTEXT.Barrier(2)
        plans = [step.split() for step in (first, second)]
        workers = [Worker(action, case.trees[tree], path, start) for action, tree in plans]
        outcomes = [worker.end() for worker in workers]
        assert all("runs inserted" in outcome for outcome in outcomes), outcomes
        assert content(path) in allowed
        assert_sound(path)
        assert [p.name for p in tmp_path.iterdir()] == ["c.db"], "the log is folded into the file"


@pytest.mark.parametrize(
    ("action", "before"), [("ingest", ("ingest a",)), ("ingest", ()), ("rebuild", ("ingest a", "ingest b"))]
)
def test_a_kill_at_any_moment_leaves_the_old_content_or_the_new(
    case: Case, tmp_path: Path, action: str, before: tuple[str, ...]
) -> None:
    old = case.after(*before) if before else ""
    new = case.after(*before, f"{action} b")
    seconds = case.measured(action, case.copy(tmp_path / "c.db", *before))
    draw = random.Random(action)
    aims = [phase for phase in PHASES[action][1:-1] for _ in range(TIMES // 4)]
    met: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for aim in aims:
        path = case.copy(tmp_path / "c.db", *before)
        worker = Worker(action, case.trees["b"], path)
        # Squared: early in the phase rather than after it, for word of it takes its time to come here.
        met[worker.kill(aim, draw.random() ** 2 * seconds[aim])] += 1
        left = content(path) if path.exists() else ""
        if "alembic_version" in left or before:
            assert_sound(path)
            assert left in (old, new)
            found["old" if left == old else "new"] += 1
        else:
            found["nothing yet"] += 1
        (ingest if action == "ingest" else rebuild)(case.trees["b"], path)
        assert content(path) == new, "nothing is lost and nothing doubled"
        assert [p.name for p in tmp_path.iterdir()] == ["c.db"], "nothing is left beside the database"
    print(f"{action} after {before}: kills met {dict(met)}, left {dict(found)}, undisturbed {seconds}")
    assert len(aims) == TIMES
    assert met["transaction"] and TIMES - met["done"] >= TIMES // 2, f"too few kills met it at work: {met}"


def test_a_reader_sees_the_old_content_or_the_new(case: Case, tmp_path: Path) -> None:
    path = case.copy(tmp_path / "c.db", "ingest a")
    allowed = [case.after("ingest a"), case.after("ingest a", "ingest b"), case.after("ingest a")]
    seen = []
    for action, tree in (("ingest", "b"), ("rebuild", "a")):
        worker = Worker(action, case.trees[tree], path)
        working = True
        while working:
            working = worker.process.is_alive()
            seen.append(content(path))
        assert "runs inserted" in worker.end()
    assert set(seen) <= set(allowed)
    order = [now for now, last in zip(seen, ["", *seen], strict=False) if now != last]
    assert order == allowed, "first the old, then the new, and never back"
    assert len(seen) > 4, "read while they worked, not only after"


def test_a_transaction_of_a_reader_keeps_its_content_while_the_database_is_replaced(case: Case, tmp_path: Path) -> None:
    path = case.copy(tmp_path / "c.db", "ingest a")
    count = text("SELECT count(*), max(run_id) FROM metric")
    with open_session(path) as reader:
        before = reader.execute(count).one()
        rebuild(case.trees["b"], path)
        assert reader.execute(count).one() == before
    with open_session(path) as reader:
        assert reader.execute(count).one() != before
    assert content(path) == case.after("ingest b")


def _limited(action: str, root: Path, path: Path, limit: int, reports: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        (ingest if action == "ingest" else rebuild)(root, path)
        reports.send("done")
    except DatabaseError as error:
        reports.send(str(error))


@pytest.mark.parametrize("action", ["ingest", "rebuild"])
def test_no_room_to_write_keeps_the_old_content(case: Case, tmp_path: Path, action: str) -> None:
    path = case.copy(tmp_path / "c.db", "ingest a")
    limit = path.stat().st_size // 2  # the log may grow to half of what is needed
    reports, far_end = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_limited, args=(action, case.trees["b"], path, limit, far_end))
    process.start()
    assert reports.poll(60)
    words = reports.recv()
    process.join(60)
    assert "expected a working disk" in words and "free space" in words, words
    assert content(path) == case.after("ingest a")
    assert_sound(path)
    (ingest if action == "ingest" else rebuild)(case.trees["b"], path)
    assert content(path) == case.after("ingest a", f"{action} b")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB; mounting one needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("action", ["ingest", "rebuild"])
def test_a_full_disk_is_named_and_keeps_the_old_content(case: Case, disk: Path, action: str) -> None:
    work = ingest if action == "ingest" else rebuild
    path = case.copy(disk / "c.db", "ingest a")
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="space"):
        while True:
            file.write(b"x" * 4096)
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - 300_000)  # enough to begin with
    with pytest.raises(DatabaseError, match="full") as refused:
        work(case.trees["b"], path)
    assert "free some space" in refused.value.do
    assert content(path) == case.after("ingest a")
    filler.unlink()
    small = case.trees["a"]
    assert work(small, path).unchanged + work(small, path).inserted >= 3
    assert content(path) == case.after("ingest a")
    assert_sound(path)
