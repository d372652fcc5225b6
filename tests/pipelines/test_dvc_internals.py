"""The parts of DVC that are not its commands. When an upgrade breaks the pipeline's scheduler, these fail first."""

import contextlib
import inspect
import subprocess
import sys

import pytest
import yaml

from pipelines import dvc_internals
from pipelines.params import PipelineError

STAGES = {
    "first": {"cmd": "echo first > one", "deps": ["code"], "outs": ["one"]},
    "second": {"cmd": "cat one > two", "deps": ["one"], "outs": ["two"]},
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
    (tmp_path / "code").write_text("1")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet", "--no-scm"], check=True)
    return tmp_path


def test_the_names_that_are_used_exist_with_their_parameters():
    from dvc.dvcfile import modify_yaml
    from dvc.fs import HTTPFileSystem, generic
    from dvc.logger import set_loggers_level
    from dvc.repo import Repo, lock_repo
    from dvc.repo.reproduce import get_active_graph, plan_repro
    from dvc.stage import Stage
    from dvc.stage.cache import RunCacheNotFoundError, StageCache, _get_stage_hash
    from dvc.stage.run import StageCmdFailedError, _run
    from dvc.utils.serialize import dumps_yaml, load_yaml

    def parameters(function):
        return [*inspect.signature(function).parameters]

    assert parameters(_run) == ["executable", "cmd", "kwargs"]
    assert parameters(modify_yaml) == ["path", "fs"]
    assert parameters(_get_stage_hash) == ["stage"]
    assert {"stage", "pull"} <= {*parameters(StageCache.restore)}
    assert parameters(StageCmdFailedError)[:2] == ["cmd", "status"]
    names = (HTTPFileSystem, generic.copy, set_loggers_level, Repo.config, lock_repo, get_active_graph, plan_repro,
             Stage.save_deps, RunCacheNotFoundError, dumps_yaml, load_yaml)  # fmt: skip
    assert all(names)


def test_stages_are_stale_with_what_depends_on_them_until_they_have_run(project):
    with dvc_internals.open_repo() as repo:
        assert dvc_internals.stale(repo) == {"first": set(), "second": {"first"}}
        repo.reproduce()
        assert dvc_internals.stale(repo) == {}
    (project / "two").write_text("changed")
    with dvc_internals.open_repo() as repo:
        assert dvc_internals.stale(repo) == {"second": set()}


def test_commands_are_started_by_the_given_function_which_may_fail(project):
    commands = []

    def start(cmd, **kwargs):
        commands.append((cmd, kwargs["env"]["DVC_STAGE"], kwargs["cwd"]))
        return subprocess.Popen(["/bin/sh", "-c", cmd], **kwargs)

    with dvc_internals.open_repo() as repo, dvc_internals.commands_started_by(start) as seconds:
        repo.reproduce("second")
    assert commands == [(stage["cmd"], name, str(project)) for name, stage in STAGES.items()] and len(seconds) == 2
    (project / "code").write_text("2")
    with (
        pytest.raises(SystemExit),
        dvc_internals.short_errors(),
        dvc_internals.open_repo() as repo,
        dvc_internals.commands_started_by(lambda cmd, **_: subprocess.Popen(["false"])),
    ):
        repo.reproduce("first")


def test_dvc_lock_is_the_text_that_dvc_would_write(project):
    texts = []
    for changed_only in (contextlib.nullcontext, dvc_internals.changed_entries_only):
        (project / "dvc.lock").unlink(missing_ok=True)
        for content in "12":  # an entry is added, then changed
            (project / "code").write_text(content)
            with changed_only(), dvc_internals.open_repo() as repo:
                repo.reproduce()
            texts.append((project / "dvc.lock").read_text())
    assert texts[:2] == texts[2:] and texts[0] != texts[1]


def test_outputs_and_run_cache_travel_through_a_remote(project, tmp_path_factory):
    remote = str(tmp_path_factory.mktemp("remote") / "new")
    with dvc_internals.open_repo(remote) as repo:
        dvc_internals.check_remote(repo)
        for name, before in (("first", []), ("second", ["first"])):
            dvc_internals.reproduce_through_remote(repo, name, before)
    lock = dvc_internals.read_lock()
    assert dvc_internals.lock_text(lock) == (project / "dvc.lock").read_text()
    for name in ("one", "two", "dvc.lock"):
        (project / name).unlink()
    subprocess.run(["rm", "-rf", ".dvc/cache"], check=True)
    commands = dvc_internals.commands_started_by(lambda cmd, **_: pytest.fail(f"{cmd} ran again"))
    with dvc_internals.open_repo(remote) as repo, commands:
        dvc_internals.reproduce_through_remote(repo, "first", [])
        dvc_internals.reproduce_through_remote(repo, "second", ["first"])
    assert dvc_internals.read_lock() == lock and (project / "two").read_text() == "first\n"


def test_a_remote_that_does_not_answer_is_an_error(project):
    with dvc_internals.open_repo("/proc/nowhere") as repo, pytest.raises(PipelineError, match="/proc/nowhere"):
        dvc_internals.check_remote(repo)
