"""How many of each file's samples an epoch shows, and which.

A file's samples are dealt from packs: a pack is all of them once, shuffled, and the next is
opened when one is used up. An epoch takes from where the one before stopped, so a file of which
an epoch shows a quarter has been shown whole after four. Which samples an epoch shows is a
function of seed and epoch alone.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vltrain.config import DataConfig
from vltrain.data.ordering import chance_of
from vltrain.errors import VltrainError


@dataclass(frozen=True)
class Portion:
    """What an epoch shows of one file."""

    file: Path
    numbers: NDArray[np.integer]  # of the file's samples
    shown: int  # samples of an epoch; more than there are: some come more than once

    def dealt(self, seed: int, stream: int, epoch: int) -> NDArray[np.integer]:
        """The numbers that one epoch shows, in the order in which they are dealt.

        Args:
            seed: of the packs.
            stream: tells this file's packs from those of the others.
            epoch: from 0.
        """
        size = len(self.numbers)
        begin, end = epoch * self.shown, (epoch + 1) * self.shown
        packs = range(begin // size, -(-end // size)) if self.shown else range(0)
        dealt = [self.numbers[chance_of(seed, stream, pack).permutation(size)] for pack in packs]
        if not dealt:
            return self.numbers[:0]
        skipped = begin - packs.start * size
        return np.concatenate(dealt)[skipped : skipped + self.shown]

    def __str__(self) -> str:
        """As the plan of a run has it: "250 of 1,000 of b.json"."""
        passes, rest = divmod(self.shown, max(1, len(self.numbers)))
        parts = [f"{passes} x {len(self.numbers):,}"] if passes else []
        parts += [f"{rest:,} of {len(self.numbers):,}"] if rest or not passes else []
        return f"{' + '.join(parts)} of {self.file.name}"


@dataclass(frozen=True)
class Mix:
    """What an epoch shows of all files."""

    portions: tuple[Portion, ...]

    def __len__(self) -> int:
        """Samples of an epoch."""
        return sum(portion.shown for portion in self.portions)

    def numbers(self, *, seed: int, epoch: int) -> NDArray[np.integer]:
        """The numbers of the samples that one epoch shows, file by file."""
        dealt = [portion.dealt(seed, stream, epoch) for stream, portion in enumerate(self.portions)]
        return np.concatenate(dealt)

    def __str__(self) -> str:
        """As the plan has it: "2 x 1,000 of a.json, 250 of 1,000 of b.json: 2,250 samples"."""
        return f"{', '.join(map(str, self.portions))}: {len(self):,} samples"


def mix_of(data: DataConfig, sources: NDArray[np.integer]) -> Mix | None:
    """What a recipe's epochs show; None where that is every sample once.

    Args:
        data: the recipe's section.
        sources: the place in `data.files` of what each sample is from.

    Raises:
        VltrainError: an epoch would show nothing, or samples of a file that has none.
    """
    if not data.mix:
        return None
    entries = {entry.file: entry for entry in data.mix}
    portions: list[Portion] = []
    for place, file in enumerate(data.files):
        numbers = np.flatnonzero(sources == place)
        entry = entries.get(file)
        shown = len(numbers) if entry is None else entry.shown(len(numbers))
        if shown and not len(numbers):
            raise VltrainError.at(
                "data.mix",
                what=f"an epoch shows {shown:,} samples of {file}, and no sample of it is kept",
                fix="take the file out, or raise data.max_length",
            )
        portions.append(Portion(file, numbers, shown))
    mix = Mix(tuple(portions))
    if not len(mix):
        what = f"an epoch shows no sample: {mix}"
        raise VltrainError.at("data.mix", what=what, fix="raise a weight, or state `samples`")
    return mix
