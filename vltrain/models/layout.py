"""What stands beside a checkpoint's weights, in one of the forms that other programs read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Layout:
    """The files of a layout that are other than those of the folder that is exported."""

    texts: Mapping[str, str | None]  # by name; None: the layout has no such file
    remarks: tuple[str, ...] = ()  # what the user is to know of it


LayoutOf = Callable[[Path, torch.dtype], Layout]
"""A layout of a checkpoint's folder, whose weights have a dtype."""
