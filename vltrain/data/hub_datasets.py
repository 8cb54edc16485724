"""A dataset's name on the Hugging Face hub -> its rows, brought down through `datasets`.

Names are `owner/name[@revision][:split]`, and `owner/name[@revision]:subset:split` where the
dataset has subsets. Scripts that some datasets have for making them are never run.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from vltrain.data.arrow_rows import first_line
from vltrain.data.faults import Fault
from vltrain.data.records import Record, Unreadable
from vltrain.data.saved_datasets import scan_dataset
from vltrain.data.splits import DEFAULT_SPLIT, chosen_split
from vltrain.hub_names import HUB_NAME

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

KIND = "hub_dataset"  # of faults about a dataset as a whole
_PARTS = r"(:(?P<subset>[^:/\\]+)(?=:))?(:(?P<split>[^:/\\]+))?"
_NAME = re.compile(HUB_NAME.pattern + _PARTS, re.ASCII)
_FILE_ENDINGS = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".txt")


@dataclass(frozen=True)
class HubDataset:
    """What a name says."""

    repo: str
    revision: str | None  # branch, tag or commit
    subset: str | None
    split: str | None

    @property
    def name(self) -> str:
        """The dataset as its user names it, without subset and split."""
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    @property
    def without_split(self) -> str:
        """What a split is written behind."""
        return self.name if self.subset is None else f"{self.name}:{self.subset}"


def hub_dataset(name: str) -> HubDataset | None:
    """What a name says; None where it cannot be one on the hub."""
    match = _NAME.fullmatch(name)
    if match is None or name.lower().endswith(_FILE_ENDINGS):
        return None
    return HubDataset(match["repo"], match["revision"], match["subset"], match["split"])


def scan_hub_dataset(named: HubDataset, file: Path) -> Iterator[Record | Unreadable]:
    """The rows of a dataset on the hub as records of `file`; the first time, it is brought down.

    Without a connection the copy in the cache is read, if it is of the revision that is named.
    """
    yield from scan_dataset(_brought_down(named), file)


def files_of_hub_dataset(named: HubDataset) -> list[Path]:
    """The files that a dataset is read from, in the library's cache; none where it is not read."""
    dataset = _brought_down(named)
    return [] if isinstance(dataset, Fault) else [Path(f["filename"]) for f in dataset.cache_files]


@lru_cache(maxsize=8)  # a command reads its data several times, and is to see one commit of it
def _brought_down(named: HubDataset) -> "Dataset | Fault":
    """The dataset from the cache, brought down first if need be; or why there is none."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError
    from pyarrow import ArrowException

    try:
        builder = _builder(named)
        if isinstance(builder, Fault):
            return builder
        split = chosen_split(_splits(builder), named.split, named.without_split)
        if isinstance(split, Fault):
            return split
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except (ArrowException, DatasetsError, HTTPError, OSError, ValueError, TypeError) as error:
        # What the library's readers of the many kinds of files raise.
        message = f"the dataset cannot be brought down or read ({first_line(error)})"
        return Fault(KIND, message, f"run the same command again; else {_by_hand(named)}")


def _builder(named: HubDataset) -> "DatasetBuilder | Fault":
    """What brings a dataset down, or why the hub does not give it."""
    from datasets import load_dataset_builder
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    try:
        builder = load_dataset_builder(named.repo, named.subset, revision=named.revision)
    except DatasetNotFoundError as error:
        return _not_given(named, error)
    except ConnectionError:
        return _not_reached(named, "does not have the dataset")
    except (DataFilesNotFoundError, EmptyDatasetError):
        message = "the dataset has no files of a kind that can be read"
        return Fault(KIND, message, f"see {_page(named)}")
    except RuntimeError:
        message = "the dataset is made by a script of its own, and those are not run"
        fix = "run the script yourself if you trust it, save what it gives with `save_to_disk`, "
        return Fault(KIND, message, fix + "and name that folder")
    except ValueError:
        fault = _subset_fault(named)
        if fault is None:
            raise
        return fault
    from_cache = builder.config.data_files is None
    if from_cache and named.revision not in (None, builder.hash):
        return _not_reached(named, f"has the dataset's commit {builder.hash} alone")
    return builder


def _splits(builder: "DatasetBuilder") -> list[str]:
    """The names of a dataset's splits; the hub knows them before anything is brought down."""
    return [str(name) for name in builder.info.splits or builder.config.data_files or ()]


def _subset_fault(named: HubDataset) -> Fault | None:
    """Why a dataset gives nothing under the subset that is named, or under none."""
    from datasets import get_dataset_config_names

    subsets = get_dataset_config_names(named.repo, revision=named.revision)
    if named.subset in subsets:
        return None
    listed = ", ".join(subsets)
    if named.subset is None:
        message = f"the dataset has the subsets {listed}, and none is named"
    else:
        message = f"the dataset has no subset {named.subset}; it has {listed}"
    return Fault(KIND, message, f"write {named.name}:{subsets[0]}:{named.split or DEFAULT_SPLIT}")


def _not_given(named: HubDataset, error: Exception) -> Fault:
    """Why the hub, which was reached, does not give a dataset."""
    from huggingface_hub.errors import RevisionNotFoundError

    if isinstance(error.__cause__, RevisionNotFoundError):
        message = f"the dataset has no revision {named.revision}"
        return Fault(KIND, message, f"name a branch, a tag or a commit of {_page(named)}")
    if "gated" in str(error):  # the library has one exception for all that is not given
        message = "this dataset is only given to those who accept its terms"
        return Fault(KIND, message, f"accept them at {_page(named)}, then run `hf auth login`")
    message = "there is no such file or folder, and no such dataset on the hub"
    fix = "check the spelling; a private dataset needs `hf auth login` first"
    return Fault(KIND, message, fix)


def _not_reached(named: HubDataset, cached: str) -> Fault:
    """Why there is no dataset without a connection; `cached` says what the cache has of it."""
    from datasets import config

    message = (
        "there is no such file or folder, the hub cannot be reached, and the cache "
        f"{config.HF_DATASETS_CACHE} {cached}"
    )
    return Fault(KIND, message, _by_hand(named))


def _by_hand(named: HubDataset) -> str:
    """How to get a dataset onto a machine that cannot reach the hub, or as files to look at."""
    at = f" --revision {named.revision}" if named.revision else ""
    return (
        f"where there is a connection, run `hf download {named.repo} --repo-type dataset{at} "
        "--local-dir FOLDER`, copy FOLDER here and name it, or the files in it, instead"
    )


def _page(named: HubDataset) -> str:
    """The address of a dataset's page."""
    from datasets import config

    return f"{config.HF_ENDPOINT}/datasets/{named.repo}"
