"""Datasets of the `datasets` library -> records, memory-mapped."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vltrain.data.arrow_rows import batch_rows, first_line, records_of_batch
from vltrain.data.faults import Fault
from vltrain.data.records import Record, Unreadable
from vltrain.data.splits import chosen_split

if TYPE_CHECKING:
    from datasets import Dataset

_SPLITS_FILE = "dataset_dict.json"  # of a DatasetDict: {"splits": [...]}
_STATE_FILE = "state.json"  # of a Dataset


def is_saved_dataset(folder: Path) -> bool:
    """Did `save_to_disk` write the folder?"""
    return (folder / _SPLITS_FILE).is_file() or (folder / _STATE_FILE).is_file()


def scan_saved_dataset(
    folder: Path, split: str | None, file: Path
) -> Iterator[Record | Unreadable]:
    """The rows of a dataset, or of one split of several, that `save_to_disk` wrote.

    Args:
        folder: for which `is_saved_dataset` is true.
        split: which to read; None: `train`, or the only one.
        file: what the records say they are from: the folder as its user names it.
    """
    yield from scan_dataset(_saved_dataset(folder, split), file)


def _saved_dataset(folder: Path, split: str | None) -> "Dataset | Fault":
    from datasets import load_from_disk
    from pyarrow import ArrowException

    try:
        splits: list[str] = []
        if (folder / _SPLITS_FILE).is_file():
            splits = json.loads((folder / _SPLITS_FILE).read_text(encoding="utf-8"))["splits"]
        elif split is None:
            return load_from_disk(folder)
        chosen = chosen_split(splits, split, str(folder))
        return chosen if isinstance(chosen, Fault) else load_from_disk(folder / chosen)
    except (OSError, ArrowException, ValueError, LookupError, TypeError, AttributeError) as error:
        # What reading JSON of any shape and Arrow of any bytes can raise.
        message = f"the saved dataset is broken ({first_line(error)})"
        return Fault("broken_dataset", message, "save it anew, or copy all of its files again")


def scan_dataset(dataset: "Dataset | Fault", file: Path) -> Iterator[Record | Unreadable]:
    """The rows of a dataset as records of `file`; or why there are none."""
    if isinstance(dataset, Fault):
        yield Unreadable(file, None, dataset)
        return
    rows = batch_rows(dataset.data.num_rows, dataset.data.nbytes)
    index = 0
    for table in dataset.with_format("arrow").iter(batch_size=rows):
        for batch in table.to_batches():
            yield from records_of_batch(batch, file, index)
            index += batch.num_rows
