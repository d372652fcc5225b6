"""What this machine has to give: RAM within the limits of its control groups, GPU memory, disk."""

import shutil
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Machine:
    """Bytes that are free now.

    Attributes:
        ram: For a new process.
        disk: In the project's folder.
        gpu: On the first GPU, beside CUDA's own context; None without one.
        gpu_name: Of that GPU.
        hub_disk: Where downloads from the hub go (HF_HOME), if that is another disk than the project's; else None.
    """

    ram: int
    disk: int
    gpu: int | None = None
    gpu_name: str | None = None
    hub_disk: int | None = None


def _number(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max": no limit


def _reclaimable(folder: Path) -> int:
    """Bytes of cached files that the kernel gives up when memory is short."""
    try:
        lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    pairs = dict(line.split(maxsplit=1) for line in lines if " " in line)
    return int(pairs.get("inactive_file", pairs.get("total_inactive_file", 0)))


def group_room(root: Path = CGROUPS, membership: Path = _MEMBERSHIP) -> int | None:
    """Bytes left below the tightest limit of this process's control groups, or None where there is no limit.

    Version 2: memory.max of the own group and of all above it. Version 1: memory.limit_in_bytes.

    Args:
        root: Where the groups are mounted.
        membership: /proc/self/cgroup.
    """
    try:
        rows = [line.split(":", 2) for line in membership.read_text(encoding="utf-8").splitlines()]
    except OSError:
        rows = []
    folders = {root, root / "memory"}
    for _, controllers, path in (row for row in rows if len(row) == 3):
        start = root / "memory" if "memory" in controllers.split(",") else root
        place = start / path.lstrip("/")
        folders |= {place, *(p for p in place.parents if p.is_relative_to(root))}
    rooms = []
    for folder in folders:
        for limit_file, use_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _number(folder / limit_file), _number(folder / use_file)
            if limit is not None and used is not None and limit < 2**60:  # version 1 writes no limit as a huge number
                rooms.append(max(0, limit - used + _reclaimable(folder)))
    return min(rooms) if rooms else None


def _device(folder: Path) -> int:
    return folder.stat().st_dev


def hub_disk(project: Path) -> int | None:
    """Bytes free on the disk where downloads from the hub go, or None where it is that of the project's folder."""
    from huggingface_hub.constants import HF_HUB_CACHE

    place = Path(HF_HUB_CACHE).expanduser().absolute()
    place = next(folder for folder in (place, *place.parents) if folder.exists())
    return None if _device(place) == _device(project) else shutil.disk_usage(place).free


def look(project: Path, *, gpu: bool) -> Machine:
    """This machine as it is now.

    Args:
        project: Folder whose disk counts.
        gpu: Whether to look for one.
    """
    import psutil

    free, room = int(psutil.virtual_memory().available), group_room()
    ram, disk = free if room is None else min(free, room), shutil.disk_usage(project).free
    hub = hub_disk(project)
    if gpu:
        import torch

        if torch.cuda.is_available():
            return Machine(ram, disk, int(torch.cuda.mem_get_info(0)[0]), torch.cuda.get_device_name(0), hub)
    return Machine(ram, disk, hub_disk=hub)
