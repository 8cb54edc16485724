"""The tensors of weight files one by one: no more of them in memory than is asked for."""

import json
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vltrain.errors import VltrainError


class TensorFiles:
    """Tensors by name, of safetensors or `.bin` files, read when they are asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Read the names.

        Raises:
            VltrainError: a file is cut short or of another kind.
        """
        self._bin: tuple[Path, dict[str, Tensor]] | None = None
        self._files: dict[str, Path] = {}
        for file in files:
            self._files |= dict.fromkeys(self._names(file), file)

    @property
    def names(self) -> list[str]:
        """All names, in the order of the files."""
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, of safetensors without reading it."""
        file = self._files[name]
        if file.suffix != ".safetensors":
            return tuple(self.read(name).shape)
        with safe_open(file, framework="pt") as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor as its file has it; it is mapped, and gone from memory with its last use."""
        file = self._files[name]
        if file.suffix != ".safetensors":
            return self._open_bin(file)[name]
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(name)

    def _names(self, file: Path) -> list[str]:
        try:
            if file.suffix != ".safetensors":
                return list(self._open_bin(file))
            with safe_open(file, framework="pt") as tensors:
                return list(tensors.keys())
        except (OSError, RuntimeError, SafetensorError, UnpicklingError, EOFError) as error:
            raise VltrainError.at(
                str(file), what=f"the weights cannot be read ({error})", fix="download it again"
            ) from error

    def _open_bin(self, file: Path) -> dict[str, Tensor]:
        """A file of pickled tensors, mapped where it is of torch's newer form; the last one stays
        open."""
        if self._bin is None or self._bin[0] != file:
            self._bin = None
            try:
                tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError:  # the form of before torch 1.6 cannot be mapped
                tensors = torch.load(file, map_location="cpu", weights_only=True)
            self._bin = (file, tensors)
        return self._bin[1]


def header_bytes(file: Path) -> int:
    """How many bytes a safetensors file has by its own header.

    Raises:
        ValueError: the header is cut short or no JSON.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError("the header is cut short")
        header = json.loads(stream.read(length))
    ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    return 8 + length + max(ends, default=0)
