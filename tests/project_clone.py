"""A working copy of this project in a temporary folder, for tests that run its commands."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


class Clone:
    """A working copy; the interpreter that runs the tests, its packages, and no Ollama server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.env = {**os.environ, "PATH": path, "OLLAMA_HOST": "127.0.0.1:9", "COLUMNS": "200"}

    def run(self, *command: str, ok: bool = True) -> str:
        """Output of a command, which must end well, or with ok=False must not."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=1800, check=False
        )
        output = done.stdout + done.stderr
        assert (done.returncode == 0) is ok, f"{command} exit {done.returncode}\n{output[-6000:]}"
        return output

    def change(self, section: str, **values: object) -> None:
        """Change a section of params.yaml."""
        file = self.folder / "params.yaml"
        params = yaml.safe_load(file.read_text())
        params[section].update(values)
        file.write_text(yaml.safe_dump(params, sort_keys=False))

    def facts(self) -> dict[str, dict[str, object]]:
        """outputs/metrics.json: arm → its numbers."""
        return json.loads((self.folder / "outputs/metrics.json").read_text())

    def query(self, sql: str) -> list[tuple]:
        """Rows of the database."""
        with sqlite3.connect(f"file:{self.folder / 'outputs/centralized.db'}?mode=ro", uri=True) as connection:
            return connection.execute(sql).fetchall()

    def dump(self) -> dict[str, list[tuple]]:
        """All rows of all tables."""
        tables = [n for (n,) in self.query("select name from sqlite_master where type = 'table' order by name")]
        return {t: self.query(f"select * from {t}") for t in tables}


def make_clone(folder: Path) -> Clone:
    """The working tree as it is, uncommitted changes included, as a repository of its own without results."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "dvc.lock").unlink(missing_ok=True)
    clone = Clone(folder)
    clone.run("git", "init", "--quiet")
    clone.run("git", "add", "--all")
    clone.run("git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", "clone")
    return clone
