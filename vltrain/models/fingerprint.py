"""The hash of a checkpoint's weights: what tells an adapter its base from another."""

import hashlib
import mmap
from collections.abc import Iterator
from pathlib import Path

from vltrain.errors import VltrainError

SAFETENSORS, BIN = "*.safetensors", "pytorch_model*.bin"


def weights_hash(folder: Path) -> str:
    """sha256 over the weight files of a checkpoint, by name, size and bytes.

    Files are mapped, not read into memory. A copy of the folder has the same hash; another
    dtype, another sharding or another format of the same weights has not.

    Raises:
        VltrainError: the folder holds no weights.
    """
    digest = hashlib.sha256()
    found = False
    for file in weight_files(folder):
        found = True
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        if not size:  # a download that broke off; nothing can be mapped
            continue
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as m:
            digest.update(m)
    if not found:
        raise VltrainError.at(
            str(folder),
            what=f"holds no weights ({SAFETENSORS} or {BIN})",
            fix="give the folder of a whole checkpoint",
        )
    return f"sha256:{digest.hexdigest()}"


def weight_files(folder: Path) -> Iterator[Path]:
    """The files that `load_model` reads: safetensors, or .bin where there are none."""
    safetensors = sorted(folder.glob(SAFETENSORS))
    yield from safetensors or sorted(folder.glob(BIN))
