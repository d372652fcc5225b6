"""Data sets on the Hugging Face hub, and folders in its format; code that comes with them is never run."""

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from evaluation.sources.tables import SourceError, Table, raw_rows
from trainers.words import suggest

HUB = "hub:"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_FORBIDDEN = (errno.EACCES, errno.EPERM)  # of a hub data set: to write into the cache


@dataclass(frozen=True)
class DataSet:
    source: str  # as the user named it
    subset: str | None  # the configuration that was opened; None: it has only one
    splits: Mapping[str, Any]  # name → datasets.Dataset

    def table(self, split: str) -> Table:
        """All rows of a split; SourceError, with those that exist, where there is no such split."""
        if split not in self.splits:
            where = f" of subset {self.subset!r}" if self.subset else ""
            raise SourceError(self.source, [f"there is no split {split!r}{where}{suggest(split, self.splits)}."])
        return _table(self.splits[split])


def _table(data: Any) -> Table:
    labels = {name: list(kind.names) for name, kind in data.features.items() if getattr(kind, "names", None)}
    # datasets keeps what it downloaded in a folder named for the commit.
    files = [Path(file["filename"]).parent.name for file in data.cache_files]
    revision = files[0] if files and _COMMIT.fullmatch(files[0]) else None
    return Table(
        list(data.column_names),
        raw_rows(lambda start, end: data[start:end], data.num_rows),
        revision=revision,
        labels=labels,
    )


def read_split(source: str, split: str, subset: str | None) -> Table:
    """One split, or a part such as "train[:10%]", of `hub:org/name[@revision]` or a folder in its format."""
    with _opened(source, subset, None, split) as (data, _):
        return _table(data)


@contextmanager
def open_data_set(source: str, subset: str | None = None, usual: str | None = None) -> Iterator[DataSet]:
    """All splits, to be read inside the block; the subset `usual` if none is asked for and it is there; SourceError."""
    with _opened(source, subset, usual, None) as (data, opened):
        yield DataSet(source, opened, data)


@contextmanager
def _opened(source: str, subset: str | None, usual: str | None, split: str | None) -> Iterator[tuple[Any, str | None]]:
    """(what load_dataset returns, the subset opened)."""
    if source.startswith(HUB):
        name, revision = source.removeprefix(HUB), None
        if "@" in name and not Path(name).exists():
            name, revision = name.rsplit("@", 1)
        with _explained(source, name, subset, split, revision):
            if subset is None and usual is not None and usual in _subsets(name, revision):
                subset = usual
            data = _load(name, subset, split=split, revision=revision)
        yield data, subset
        return
    tries = _places(source, Path(source), subset, usual)
    # The library tells folders apart by times of files and would keep a copy of each for ever.
    with TemporaryDirectory(prefix="data-set-") as cache:
        for place, (folder, inner, shown) in enumerate(tries):
            opened = shown
            with _explained(source, str(folder), inner, split, None):
                try:
                    # A folder may hold a part of what its README counts.
                    data = _load(str(folder), inner, split=split, cache_dir=cache, verification_mode="no_checks")
                except FileNotFoundError:
                    if place + 1 < len(tries):
                        continue
                    raise
                break
        yield data, opened


def _load(name: str, subset: str | None, **options: Any) -> Any:
    import datasets

    return datasets.load_dataset(name, subset, **options)


def _subsets(name: str, revision: str | None) -> list[str]:
    from datasets import get_dataset_config_names

    return list(get_dataset_config_names(name, revision=revision))


_Place = tuple[Path, str | None, str | None]


def _places(source: str, folder: Path, subset: str | None, usual: str | None) -> list[_Place]:
    """What to try one after the other: (folder to open, configuration to ask for, subset that this is).

    A data set with several subsets names them in its README, or has a folder for each. Where one alone was
    downloaded, the README names files that are not there.
    """
    from datasets.exceptions import DatasetsError

    try:
        names = _subsets(str(folder), None)
    except (DatasetsError, OSError, ValueError, RuntimeError, yaml.YAMLError):
        names = []  # opening the folder says why, if it comes to that
    found: list[_Place] = []
    for wanted in (subset, usual):
        if wanted is not None and not found:
            found = [(folder, wanted, wanted)] if wanted in names else []
            found += [(folder / wanted, None, wanted)] if (folder / wanted).is_dir() else []
    if subset is not None and not found:
        known = names if names not in ([], ["default"]) else sorted(f.name for f in folder.iterdir() if f.is_dir())
        # In data/ lie the files of a data set without subsets.
        known = [n for n in known if not n.startswith(".") and n != "data"]
        raise SourceError(source, [f"there is no subset {subset!r}{suggest(subset, known) if known else ''}."])
    return found or [(folder, None, None)]


@contextmanager
def _explained(source: str, name: str, subset: str | None, split: str | None, revision: str | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        problem = _explain(error, source, name, subset, split, revision)
        if problem is None:
            raise
        raise SourceError(source, [problem]) from error


def _explain(
    error: Exception, source: str, name: str, subset: str | None, split: str | None, revision: str | None
) -> str | None:
    """One sentence on why a data set could not be opened; None for what no user can mend."""
    import httpx
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError, DatasetsError

    text = " ".join(str(error).split())
    at = f" --revision {revision}" if revision else ""
    folder = f"inputs/{name.rsplit('/', 1)[-1]}"
    elsewhere = f"download it elsewhere with `hf download {name} --repo-type dataset{at} --local-dir {folder}` and set "
    elsewhere += "source to that folder, or save the data set as CSV or JSONL and set source to that path."
    login = "`hf auth login`, or set HF_TOKEN"
    local = not source.startswith(HUB)
    of = f" (split {split!r})" if split else ""
    match error:
        case EmptyDatasetError() | DataFilesNotFoundError():
            return (
                "there is no data file; expected the hub's format: Parquet, JSON or CSV files whose names have the "
                "split, e.g. train-00000-of-00001.parquet, and all that its README.md names."
            )
        case OSError() if error.errno in (_FULL if local else (*_FULL, *_FORBIDDEN)):
            return f"the data set could not be kept on the disk: {text}"
        case DatasetNotFoundError() | OSError() | httpx.HTTPError() if local:
            return (
                f"the folder could not be read ({type(error).__name__}: {text}); expected all files that its README.md "
                "names, and the right to read them."
            )
        case DatasetNotFoundError() if "gated" in text:
            return (
                f"the hub data set {name} is gated: ask for access on its page, https://huggingface.co/datasets/{name},"
                f" then log in with {login}; or {elsewhere}"
            )
        case DatasetNotFoundError() if text.startswith("Revision"):
            return f"the hub data set {name} has no revision {revision!r}; expected a branch, a tag or a commit."
        case DatasetNotFoundError():
            return (
                f"the hub has no data set {name}, or a private one: expected org/name as on its page; for one of your "
                f"own log in with {login}."
            )
        case RuntimeError() if "scripts are no longer supported" in text:
            return "its rows come from a script, which is not run; expected Parquet, JSON or CSV files."
        case DatasetsError():
            cause = f" ({type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ else ""
            hint = " The file named alone as source has its rows judged one by one." if local else ""
            return f"the data set{of} could not be read: {text}{cause}.{hint}"
        case ValueError() if "BuilderConfig" in text or "Config name is missing" in text:
            names = re.findall(r"'([^']*)'", text[text.find("[") :].partition("]")[0])
            got = f"there is no subset {subset!r}" if subset else "it has several subsets, of which one is to be named"
            return f"{got}{suggest(subset or '', names)}."
        case yaml.YAMLError():
            return f"its README.md begins with settings that are no YAML: {text}"
        case ValueError():
            return f"the {'folder' if local else 'hub data set'}{of} could not be opened: {text}"
        case OSError() | httpx.HTTPError():
            from huggingface_hub import constants

            offline = ", HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
            return f"the Hugging Face hub cannot be reached ({type(error).__name__}: {text}{offline}); {elsewhere}"
    return None
