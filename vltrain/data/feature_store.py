"""What a frozen vision tower makes of pictures, kept on disk: a file for each picture.

    CACHE/features/KEY/pictures/3f/3f9c…   the values, under the hash of the picture's bytes
    CACHE/features/KEY/files/a0/a04b…      links to them, under the path, size and time of a file

`KEY` stands for all else that the values depend on. A file is written beside its place and renamed,
so it is there whole or not at all, and processes that write the same one do no harm. A picture's
file is not read to find its values; one that has changed has another size or time, and no link.
"""

import hashlib
import mmap
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from vltrain.data.cache import CacheEntry, unwritable
from vltrain.data.file_states import state_of
from vltrain.data.images import Place
from vltrain.errors import VltrainError

if TYPE_CHECKING:
    from torch import Tensor

FEATURES_FOLDER = "features"  # of the cache
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_PART = ".part"  # the ending of what is not whole yet
_ABANDONED_SECONDS = 3600  # a part as old as this is nobody's: one takes a moment to write


@dataclass(frozen=True)
class FeatureStore:
    """The features of pictures under one key. Small; can be sent to any worker."""

    folder: Path  # CACHE/features/KEY
    input_name: str  # what the model's forward calls them
    shape: tuple[int, ...]  # of one picture's
    dtype: str  # torch's name of it

    @property
    def bytes_each(self) -> int:
        """Of one picture's features."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    def place_of(self, picture: Place) -> Path | None:
        """Where a picture's features are looked for; None where its file is not there."""
        if isinstance(picture, bytes):
            return self.place_of_content(picture_hash(picture))
        state = state_of(picture)
        if state is None:
            return None
        text = f"{state.path}\0{state.size}\0{state.time}".encode("utf-8", "surrogateescape")
        return self._place("files", hashlib.sha256(text).hexdigest())

    def place_of_content(self, digest: str) -> Path:
        """Where the features of a picture of that hash are."""
        return self._place("pictures", digest)

    def _place(self, kind: str, digest: str) -> Path:
        return self.folder / kind / digest[:2] / digest

    def holds(self, place: Path) -> bool:
        """Whether features are there, whole."""
        try:
            return os.stat(place).st_size == self.bytes_each
        except OSError:
            return False

    def find(self, picture: Place) -> "Tensor | None":
        """A picture's features, mapped from the disk; None where it has none.

        Returns:
            of `shape` and `dtype`; writing to it changes no file.
        """
        place = self.place_of(picture)
        return None if place is None else self.read(place)

    def read(self, place: Path) -> "Tensor | None":
        """The features in a place, as `find` gives them."""
        import torch

        try:
            with open(place, "rb") as file:
                if os.fstat(file.fileno()).st_size != self.bytes_each:
                    return None
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError:
            return None
        return torch.frombuffer(mapped, dtype=getattr(torch, self.dtype)).view(self.shape)

    def keep(self, digest: str, features: "Tensor") -> None:
        """Write the features of the picture of a hash.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        import torch

        assert tuple(features.shape) == self.shape
        assert str(features.dtype) == f"torch.{self.dtype}"
        values = features.contiguous().cpu().flatten().view(torch.uint8).numpy()
        place = self.place_of_content(digest)
        part = self._part_of(place)
        try:
            with open(part, "wb") as file:
                file.write(values.data)
                file.flush()
                os.fsync(file.fileno())  # a machine that goes down leaves no whole name on half
            os.replace(part, place)
        finally:
            part.unlink(missing_ok=True)

    def link(self, place: Path, digest: str) -> None:
        """Let what `place_of` gave for a file lead to the features of the picture in it."""
        target = self.place_of_content(digest)
        if place == target:
            return
        part = self._part_of(place)
        try:
            os.symlink(os.path.relpath(target, place.parent), part)
            os.replace(part, place)
        finally:
            part.unlink(missing_ok=True)

    def _part_of(self, place: Path) -> Path:
        place.parent.mkdir(parents=True, exist_ok=True)
        return place.with_name(f"{place.name}.{os.getpid()}{_PART}")

    def open(self) -> None:
        """Make the folder, note that it is in use, and clear away what nobody has use for.

        Features of keys that have not been used for a month are removed, and so are the halves
        that a process left which was killed.

        Raises:
            VltrainError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self.folder.glob(f"*/*/*{_PART}"):
                if time.time() - part.lstat().st_mtime > _ABANDONED_SECONDS:
                    part.unlink(missing_ok=True)
            CacheEntry(self.folder.parent, self.folder.name).touch()
        except OSError as error:
            raise unwritable(self.folder.parent, error) from error

    def room(self, most_bytes: int) -> int:
        """How many more pictures' features may be kept.

        Args:
            most_bytes: that the features of all keys may take.
        """
        used = sum(
            entry.stat().st_size
            for folder in self.folder.parent.glob("*/pictures/*/")
            for entry in os.scandir(folder)
            if not entry.name.endswith(_PART)  # another process is about to rename it
        )
        return max(0, most_bytes - used) // self.bytes_each

    def disk_room(self, spare_bytes: int) -> int:
        """How many more pictures' features the disk takes and keeps so many bytes free."""
        free = shutil.disk_usage(self.folder).free
        return max(0, free - spare_bytes) // self.bytes_each


def feature_key(parts: Sequence[str]) -> str:
    """A name for all that features depend on beside the picture's bytes."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def picture_hash(content: bytes) -> str:
    """The hash that a picture's features are kept under."""
    return hashlib.sha256(content).hexdigest()


def no_room(folder: Path, needed_bytes: int, free_bytes: int) -> VltrainError:
    """The refusal of features that the disk has no room for."""
    return VltrainError.at(
        str(folder),
        what=f"the features of all pictures take {needed_bytes / 2**30:,.2f} GiB more, and "
        f"{free_bytes / 2**30:,.2f} GiB are free",
        fix="make room, set data.cache_dir to a larger disk, lower data.features_max_gib, or set "
        "data.cache_features: auto, which keeps none where not all fit",
    )
