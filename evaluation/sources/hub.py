"""Data sets on the Hugging Face hub, and folders in its format; code that comes with them is never run."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from evaluation import EvaluationError
from evaluation.sources.tabular import Table, raw_rows
from trainers.words import suggest

HUB = "hub:"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class DataSet:
    subset: str | None  # the configuration that was opened; None: it has only one
    splits: Mapping[str, Any]  # name → datasets.Dataset

    def table(self, split: str) -> Table:
        """All rows of a split; EvaluationError, with the existing ones, if there is no such split."""
        if split not in self.splits:
            where = f" of subset {self.subset!r}" if self.subset else ""
            raise EvaluationError(f"there is no split {split!r}{where}{suggest(split, self.splits)}.")
        data = self.splits[split]
        labels = {name: list(kind.names) for name, kind in data.features.items() if getattr(kind, "names", None)}
        # datasets caches downloads in a folder named after the commit.
        folders = [Path(file["filename"]).parent.name for file in data.cache_files]
        revision = folders[0] if folders and _COMMIT.fullmatch(folders[0]) else None
        kinds = {name: getattr(kind, "dtype", None) for name, kind in data.features.items()}
        short = {name: kind for name, kind in kinds.items() if kind in ("float16", "float32")}
        rows = raw_rows(lambda start, end: data[start:end], data.num_rows, short)
        return Table(list(data.column_names), rows, revision=revision, labels=labels)


@contextmanager
def open_data_set(
    source: str, subset: str | None = None, *, usual: str | None = None, split: str | None = None
) -> Iterator[DataSet]:
    """The splits of `hub:org/name[@revision]` or a folder in its format, to be read inside the block.

    Without `subset`, `usual` is opened if it exists. With `split`, which may be a part such as "train[:10%]",
    nothing else is loaded.
    """
    import datasets

    if source.startswith(HUB):
        name, revision = source.removeprefix(HUB), None
        if "@" in name and not Path(name).exists():
            name, revision = name.rsplit("@", 1)
        with _explained(source, name, subset, split, revision):
            if subset is None and usual is not None and usual in _subsets(name, revision):
                subset = usual
            data = datasets.load_dataset(name, subset, split=split, revision=revision)
        yield DataSet(subset, {split: data} if split else data)
        return
    # The library tells folders apart by file times and would keep a copy of each forever.
    with TemporaryDirectory(prefix="data-set-") as cache:
        folder, configuration, opened = _place(Path(source), subset, usual)
        with _explained(source, str(folder), configuration, split, None):
            # no_checks, because a folder may have only some of the files that its README counts.
            data = datasets.load_dataset(
                str(folder), configuration, split=split, cache_dir=cache, verification_mode="no_checks"
            )
        yield DataSet(opened, {split: data} if split else data)


def _subsets(name: str, revision: str | None) -> list[str]:
    from datasets import get_dataset_config_names

    return list(get_dataset_config_names(name, revision=revision))


def _place(folder: Path, subset: str | None, usual: str | None) -> tuple[Path, str | None, str | None]:
    """(folder to open, configuration to ask for, subset that this is).

    A data set with several subsets names them in its README, or has a folder for each.
    """
    from datasets.exceptions import DatasetsError

    try:
        names = _subsets(str(folder), None)
    except (DatasetsError, OSError, ValueError, RuntimeError, yaml.YAMLError):
        names = []  # opening the folder will explain why
    for wanted in filter(None, (subset, usual)):
        if wanted in names:
            return folder, wanted, wanted
        if (folder / wanted).is_dir():
            return folder / wanted, None, wanted
    if subset is not None:
        known = names if names not in ([], ["default"]) else sorted(f.name for f in folder.iterdir() if f.is_dir())
        # data/ has the files of a data set without subsets.
        known = [n for n in known if not n.startswith(".") and n != "data"]
        raise EvaluationError(f"there is no subset {subset!r}{suggest(subset, known) if known else ''}.")
    return folder, None, None


@contextmanager
def _explained(source: str, name: str, subset: str | None, split: str | None, revision: str | None) -> Iterator[None]:
    """Turns what a user can fix into one sentence; a bug of ours keeps its traceback."""
    import httpx
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, OSError, ValueError, RuntimeError, httpx.HTTPError, yaml.YAMLError) as error:
        of_split = f" (split {split!r})" if split else ""
        local = not source.startswith(HUB)
        raise EvaluationError(_explain(error, local, name, subset, of_split, revision)) from error


def _explain(error: Exception, local: bool, name: str, subset: str | None, of_split: str, revision: str | None) -> str:
    import httpx
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub import constants

    text = " ".join(f"{error}: {error.__cause__}".split() if error.__cause__ else str(error).split())
    login = "log in with `hf auth login`, or set HF_TOKEN"
    at, folder = f" --revision {revision}" if revision else "", f"inputs/{name.rsplit('/', 1)[-1]}"
    elsewhere = (
        f"download it elsewhere with `hf download {name} --repo-type dataset{at} --local-dir {folder}` and set source "
        "to that folder, or save the data set as CSV or JSONL and set source to that path."
    )
    match error:
        case EmptyDatasetError() | DataFilesNotFoundError():
            return (
                "there is no data file; expected the hub's format: Parquet, JSON or CSV files with the split in their "
                "names, e.g. train-00000-of-00001.parquet, and everything that its README.md names."
            )
        case RuntimeError() if "scripts are no longer supported" in text:
            return "its rows come from a script, which is not run; expected Parquet, JSON or CSV files."
        case ValueError() if "BuilderConfig" in text or "Config name is missing" in text:
            names = re.findall(r"'([^']*)'", text[text.find("[") :].partition("]")[0])
            got = f"there is no subset {subset!r}" if subset else "it has several subsets; name one of them"
            return f"{got}{suggest(subset or '', names)}."
        case DatasetNotFoundError() if not local and "gated" in text:
            page = f"https://huggingface.co/datasets/{name}"
            return f"the hub data set {name} is gated: ask for access on {page}, then {login}; or {elsewhere}"
        case DatasetNotFoundError() if not local and text.startswith("Revision"):
            return f"the hub data set {name} has no revision {revision!r}; expected a branch, a tag or a commit."
        case DatasetNotFoundError() if not local:
            return f"the hub has no data set {name}, or it is private: expected org/name; for one of your own {login}."
        case ConnectionError() | httpx.HTTPError() if not local:
            offline = ", HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
            return f"the Hugging Face hub cannot be reached ({type(error).__name__}: {text}{offline}); {elsewhere}"
    kind, hint = "hub data set", ""
    if local:
        kind, hint = "folder", " With the file itself as source, its rows are judged one by one."
    return f"the {kind}{of_split} could not be read ({type(error).__name__}: {text}).{hint}"
