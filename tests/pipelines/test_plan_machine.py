"""What the plan takes this machine to have: control groups, disk, DVC's cache."""

import shutil

import pytest
from huggingface_hub import constants

from pipelines.planning import machine, needs
from pipelines.planning.machine import group_room, hub_disk, look


def group(root, path, **files):
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_the_tightest_group_limits(tmp_path):
    root, mine = tmp_path / "cgroup", tmp_path / "membership"
    mine.write_text("0::/outer/inner\n")
    group(root, "outer", memory__max=1000, memory__current=300)
    group(root, "outer/inner", memory__max="max", memory__current=200)
    assert group_room(root, mine) == 700
    group(root, "outer/inner", memory__max=500, memory__current=450, memory__stat="anon 1\ninactive_file 100")
    assert group_room(root, mine) == 150
    group(root, "", memory__max=120, memory__current=20)  # in a container: the own group is mounted as the root
    assert group_room(root, mine) == 100


def test_groups_of_version_1_and_none_at_all(tmp_path):
    root, mine = tmp_path / "cgroup", tmp_path / "membership"
    assert group_room(root, mine) is None
    mine.write_text("5:memory:/docker/a\n")
    group(root, "memory/docker/a", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=5)
    assert group_room(root, mine) is None
    group(root, "memory/docker/a", memory__limit_in_bytes=800, memory__usage_in_bytes=500)
    assert group_room(root, mine) == 300


def test_this_machine_has_memory_and_disk(tmp_path):
    import psutil

    found = look(tmp_path, gpu=False)
    assert 0 < found.ram <= psutil.virtual_memory().total
    assert 0 < found.disk <= psutil.disk_usage(str(tmp_path)).total


def test_a_cache_that_links_holds_no_copies(tmp_path):
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[cache]\n    type = hardlink,copy\n")
    assert not needs.copies_in_cache(tmp_path)
    (tmp_path / ".dvc" / "config.local").write_text("[cache]\n    type = copy\n")  # it goes before config
    assert needs.copies_in_cache(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / ".dvc"]


def test_downloads_go_to_the_projects_disk_or_to_one_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "made" / "yet"))
    assert hub_disk(tmp_path) is None and look(tmp_path, gpu=False).hub_disk is None
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(elsewhere / "hub"))
    monkeypatch.setattr(machine, "_device", lambda folder: int(folder == elsewhere))
    assert hub_disk(tmp_path) == pytest.approx(shutil.disk_usage(elsewhere).free, rel=0.01)
    assert look(tmp_path, gpu=False).hub_disk is not None
