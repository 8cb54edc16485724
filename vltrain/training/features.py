"""Features of a run's pictures, computed before its first step and kept on disk.

They are computed in batches of one size, filled up with blanks, so that those of a picture do not
depend on which others are computed with it.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments

from vltrain.data.dataset import RecordReader, SampleDataset
from vltrain.data.feature_store import FeatureStore, picture_hash
from vltrain.data.parallel import worker_count
from vltrain.data.records import Record
from vltrain.errors import VltrainError
from vltrain.training.files import is_disk_full
from vltrain.training.processes import local_share, wait_for_all
from vltrain.training.stopping import LeaveSignals

logger = logging.getLogger(__name__)

BATCH_ON_GPU = 8  # pictures: 8,192 patches, enough for kernels to be near their peak
REPORT_SECONDS = 60.0


@dataclass(frozen=True)
class Wanted:
    """A picture of a sample, by numbers: its own bytes may be large."""

    half: int
    sample: int
    source: int  # its place among the sample's pictures


Say = Callable[[str], None]
Compute = Callable[[Tensor], Tensor]  # pixels, float [N, 3, S, S] -> features, [N, …]


def look_through(
    store: FeatureStore, datasets: Sequence[SampleDataset]
) -> tuple[list[Wanted], int]:
    """The pictures whose features are lacking, each once, and how many pictures there are.

    A picture that is not there is passed over: it is told when its sample is shown.
    """
    known: set[str] = set()  # names of places, which are hashes
    lacking = []
    for half, dataset in enumerate(datasets):
        for number in range(len(dataset)):
            if not dataset.image_counts[number]:
                continue
            record = dataset.record(number)
            for source, name in enumerate(dataset.reader.sources(record)):
                place = _place_of(store, dataset.reader, name, record)
                if place is None or place.name in known:
                    continue
                known.add(place.name)
                if not store.holds(place):
                    lacking.append(Wanted(half, number, source))
    return lacking, len(known)


def _place_of(store: FeatureStore, reader: RecordReader, name: str, record: Record) -> Path | None:
    try:
        return store.place_of(reader.locate(name, record))
    except VltrainError:
        return None


@dataclass(frozen=True)
class Opened:
    """A picture that was read to compute its features."""

    place: Path | None  # where they are looked for; None: the picture is missing or broken
    digest: str = ""
    pixels: Tensor | None = None  # float [3, S, S]; None: the features are there already


class LackingPictures(Dataset[Opened]):
    """Pictures that features are lacking of, opened in the workers of a DataLoader."""

    def __init__(
        self, store: FeatureStore, datasets: Sequence[SampleDataset], wanted: Sequence[Wanted]
    ) -> None:
        """`wanted` counts `datasets`."""
        self.store, self.datasets, self.wanted = store, datasets, wanted

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, number: int) -> Opened:
        """A picture by its number; what is wrong with it is told when its sample is shown."""
        wanted = self.wanted[number]
        dataset = self.datasets[wanted.half]
        record, reader = dataset.record(wanted.sample), dataset.reader
        try:
            picture = reader.locate(reader.sources(record)[wanted.source], record)
            place = self.store.place_of(picture)  # before it is read: a later change is seen
            content = picture if isinstance(picture, bytes) else picture.read_bytes()
            digest = picture_hash(content)
            if self.store.holds(self.store.place_of_content(digest)):
                return Opened(place, digest)
            return Opened(place, digest, reader.pixels(content))
        except (VltrainError, OSError):
            return Opened(None)

    def is_kept(self, number: int) -> bool:
        """Whether a picture's features are there, or it is not."""
        wanted = self.wanted[number]
        dataset = self.datasets[wanted.half]
        record = dataset.record(wanted.sample)
        name = dataset.reader.sources(record)[wanted.source]
        place = _place_of(self.store, dataset.reader, name, record)
        return place is None or self.store.holds(place)


def fill(
    store: FeatureStore,
    datasets: Sequence[SampleDataset],
    lacking: Sequence[Wanted],
    compute: Compute,
    arguments: TrainingArguments,
    say: Say,
) -> None:
    """Compute and keep what is lacking, each process of a run its share; all leave together.

    Where machines have a disk each, every one of them keeps all.

    Args:
        compute: the features of as many pictures as a batch has, on the device of `arguments`.
        say: told in a line how far it is, once a minute.
    """
    whole = (arguments.process_index, arguments.world_size)
    for rank, processes in (whole, local_share()):
        pictures = LackingPictures(store, datasets, lacking)
        still = [lacking[n] for n in range(len(pictures)) if not pictures.is_kept(n)]
        wait_for_all()  # all have looked before any adds to it
        share = LackingPictures(store, datasets, still[rank::processes])
        try:
            _fill_share(share, compute, arguments, say)
        except OSError as error:
            if not is_disk_full(error):
                raise
            logger.warning("the disk is full: features that are not kept are computed each time")
        wait_for_all()


def _fill_share(
    share: LackingPictures, compute: Compute, arguments: TrainingArguments, say: Say
) -> None:
    began = told = time.perf_counter()
    done = 0
    for batch in _batches(share, arguments):
        _keep_batch(share.store, compute, batch, _batch_size(arguments))
        done += len(batch)
        now = time.perf_counter()
        if now - told > REPORT_SECONDS:
            told = now
            left = (now - began) / done * (len(share) - done)
            say(f"features: {done:,} of {len(share):,}, about {left / 60:,.0f} min left")


def _batch_size(arguments: TrainingArguments) -> int:
    return BATCH_ON_GPU if arguments.device.type == "cuda" else 1


def _batches(share: LackingPictures, arguments: TrainingArguments) -> Iterator[list[Opened]]:
    if not len(share):
        return
    on_gpu = arguments.device.type == "cuda"
    workers = worker_count() if on_gpu else arguments.dataloader_num_workers
    yield from DataLoader(
        share,
        batch_size=_batch_size(arguments),
        collate_fn=list,
        num_workers=min(workers, len(share)),
        worker_init_fn=LeaveSignals(None),
        generator=torch.Generator(),  # the run's own chance is not drawn on
    )


def _keep_batch(store: FeatureStore, compute: Compute, batch: Sequence[Opened], size: int) -> None:
    """Compute what is new in a batch of up to `size` pictures, and link all of them."""
    new = {one.digest: one.pixels for one in batch if one.pixels is not None}
    if new:
        pixels = torch.stack(list(new.values()))
        blanks = pixels.new_zeros(size - len(new), *pixels.shape[1:])
        computed = compute(torch.cat([pixels, blanks])).cpu()
        for digest, features in zip(new, computed, strict=False):
            store.keep(digest, features)
    for one in batch:
        if one.place is not None:
            store.link(one.place, one.digest)
