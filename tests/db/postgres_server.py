"""A throwaway PostgreSQL server from Debian's packages, on a socket in a folder of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDERS = Path("/usr/lib/postgresql")
CLUSTERS = Path("/etc/postgresql-common/createcluster.conf")
SETTINGS = ("listen_addresses=", "fsync=off", "full_page_writes=off", "max_connections=20", "shared_buffers=32MB")


def find_programs() -> Path | None:
    """Return the folder of the newest server's programs; Debian keeps one for each version, outside of PATH."""
    found = [place for place in FOLDERS.glob("*/bin") if (place / "initdb").exists()]
    if found:
        return max(found, key=lambda place: [int(part) for part in place.parent.name.split(".")])
    program = shutil.which("initdb")
    return Path(program).resolve().parent if program else None


def install() -> str:
    """Install Debian's package where that was allowed; return in words why not, or nothing."""
    if os.environ.get("GRIT_TEST_INSTALL") != "1":
        return "GRIT_TEST_INSTALL=1 would install it"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "installing needs root and apt-get"
    if not CLUSTERS.exists():
        CLUSTERS.parent.mkdir(parents=True, exist_ok=True)
        CLUSTERS.write_text("create_main_cluster = false\n", encoding="utf-8")  # the package would start a server
    options = ["-y", "-qq", "--no-install-recommends", "-o", "Dpkg::Options::=--force-confold"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", *options, "postgresql"]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}"
    return ""


def _owner() -> pwd.struct_passwd | None:
    """PostgreSQL refuses to run as root; its own user, or nobody, runs it then."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise RuntimeError("expected a user postgres or nobody to run the server as, came neither")


@contextmanager
def run_server(programs: Path) -> Iterator[str]:
    """Make a cluster, start its server, and give its SQLAlchemy URL; all of it goes when the block ends."""
    owner = _owner()
    # Not pytest's folder: others may not enter it, and a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="grit-pg-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if owner is not None:
            os.chown(folder, owner.pw_uid, owner.pw_gid)

        def run(*command: str) -> None:
            # To files: a server that inherits a pipe would keep its reader waiting.
            with (folder / "out.log").open("ab") as log:
                done = subprocess.run(
                    command,
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    check=False,
                    timeout=120,
                    user=None if owner is None else owner.pw_uid,
                    group=None if owner is None else owner.pw_gid,
                    extra_groups=None if owner is None else [],
                    env={**os.environ, "HOME": name, "LC_ALL": "C.UTF-8"},
                )
            if done.returncode:
                words = (folder / "out.log").read_text(errors="replace") + _server_log(folder)
                raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{words[-2000:]}")

        data, control = str(folder / "data"), str(programs / "pg_ctl")
        run(str(programs / "initdb"), "-D", data, "-U", "grit", "-A", "trust", "-E", "UTF8", "--no-sync")
        options = " ".join(f"-c {setting}" for setting in (*SETTINGS, f"unix_socket_directories={name}"))
        run(control, "start", "-w", "-t", "60", "-D", data, "-l", str(folder / "server.log"), "-o", options)
        try:
            yield f"postgresql+psycopg://grit@/postgres?host={name}"
        finally:
            run(control, "stop", "-w", "-m", "immediate", "-D", data)


def _server_log(folder: Path) -> str:
    log = folder / "server.log"
    return log.read_text(errors="replace") if log.exists() else ""
