"""A throwaway PostgreSQL server from the system's packages, on a socket in a folder of its own."""

import os
import pwd
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

SETTINGS = ("listen_addresses=", "fsync=off", "full_page_writes=off", "max_connections=20", "shared_buffers=32MB")


def find_programs():
    """Return the folder of the newest server's programs; Debian keeps one for each version, outside of PATH."""
    found = [place for place in Path("/usr/lib/postgresql").glob("*/bin") if (place / "initdb").exists()]
    if found:
        return max(found, key=lambda place: float(place.parent.name))
    program = shutil.which("initdb")
    return Path(program).resolve().parent if program else None


def _other_user():
    """PostgreSQL refuses to run as root; its own user, or nobody, runs it then. Arguments of subprocess.run."""
    if os.geteuid() != 0:
        return {}
    users = {user.pw_name: user for user in pwd.getpwall()}
    owner = users.get("postgres") or users["nobody"]
    return {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}


@contextmanager
def run_server(programs):
    """Make a cluster, start its server, and give its SQLAlchemy URL; all of it goes when the block ends."""
    owner = _other_user()
    # Not pytest's folder: others may not enter it, and a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="grit-pg-", ignore_cleanup_errors=True) as name:
        if owner:
            os.chown(name, owner["user"], owner["group"])
        data, log = f"{name}/data", Path(name, "out.log")

        def run(program, *options):
            command = [str(programs / program), *options, "-D", data]
            environment = {**os.environ, "HOME": name, "LC_ALL": "C.UTF-8"}
            with log.open("ab") as out:  # a server that inherits a pipe would keep its reader waiting
                done = subprocess.run(
                    command, cwd=name, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=120, env=environment,
                    check=False, **owner,
                )  # fmt: skip
            if done.returncode:
                words = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{words}")

        run("initdb", "-U", "grit", "-A", "trust", "-E", "UTF8", "--no-sync")
        options = " ".join(f"-c {setting}" for setting in (*SETTINGS, f"unix_socket_directories={name}"))
        run("pg_ctl", "start", "-w", "-t", "60", "-o", options)
        try:
            yield f"postgresql+psycopg://grit@/postgres?host={name}"
        finally:
            run("pg_ctl", "stop", "-w", "-m", "immediate")
