"""Which part of a dataset is read, where it has several."""

from collections.abc import Sequence

from vltrain.data.faults import Fault

DEFAULT_SPLIT = "train"


def chosen_split(splits: Sequence[str], asked: str | None, name: str) -> str | Fault:
    """The split to read: the one that is asked for, else `train`, else the only one.

    Args:
        splits: all that there are.
        asked: what follows the name; None: nothing does.
        name: of the dataset, as its user writes it without a split.
    """
    if asked is not None and asked in splits:
        return asked
    if asked is None and DEFAULT_SPLIT in splits:
        return DEFAULT_SPLIT
    if asked is None and len(splits) == 1:
        return splits[0]
    if not splits:
        message = f"the dataset has no splits, and {asked} is asked for"
        return Fault("unknown_split", message, f"write {name}")
    listed = ", ".join(splits)
    if asked is None:
        message = f"the dataset has the splits {listed}, none is named and none is {DEFAULT_SPLIT}"
    else:
        message = f"the dataset has no split {asked}; it has {listed}"
    return Fault("unknown_split", message, f"write {name}:{splits[0]}")
