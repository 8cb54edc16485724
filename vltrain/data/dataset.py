"""Rows of a table -> samples with their pictures."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from vltrain.data.encoding import LabelPolicy, Processor, Sample, encode
from vltrain.data.faults import Fault, error_of
from vltrain.data.feature_store import FeatureStore
from vltrain.data.formats import Format, read_conversation
from vltrain.data.images import Place, open_image
from vltrain.data.pictures import LOCAL_PICTURES, BadPictures, Pictures
from vltrain.data.records import Record
from vltrain.data.sample_table import SampleTable, rows_of
from vltrain.errors import VltrainError

FEATURES = "features"
"""Key of a sample's pictures as a store has them: the model's name of such an input, and for each
picture its features, or None where `pixel_values` has its pixels."""
DROPPED = "dropped"
"""Key of what stands for a sample that cannot be shown: why not; of a batch: all such reasons."""


def split_numbers(
    count: int, share: float, seed: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Numbers of samples to learn from and of samples to evaluate on, each ascending.

    Args:
        count: samples, at least two of them unless `share` is 0.
        share: of the samples that are held out, in [0, 1); at least one where it is not 0.
        seed: decides which; the same seed gives the same split.

    Raises:
        VltrainError: nothing would be left to learn from.
    """
    held_out = 0 if share == 0 else max(1, round(share * count))
    if not 0 <= share < 1 or held_out >= max(1, count):
        what = f"{share} of {count} samples leaves none to learn from"
        raise VltrainError.at("data.eval_share", what=what, fix="set a share such as 0.05, or 0")
    chosen = np.zeros(count, dtype=bool)
    chosen[random.Random(seed).sample(range(count), held_out)] = True
    return np.flatnonzero(~chosen).astype(np.int32), np.flatnonzero(chosen).astype(np.int32)


@dataclass(frozen=True)
class RecordReader:
    """What makes samples of records: the settings of a run, small enough for any worker."""

    processor: Processor
    labels: LabelPolicy = "assistant"
    pictures: Pictures = LOCAL_PICTURES
    format: Format = "auto"
    bad_pictures: BadPictures = "error"
    features: FeatureStore | None = None  # what is kept there of a picture is not computed again

    def encode(self, record: Record) -> Sample:
        """A record as ids and labels; raises VltrainError as `encoding.encode` does."""
        return encode(
            record.value,
            self.processor,
            self.labels,
            where=record.name,
            format=self.format,
            image_size=self.pictures.measure(record.file),
        )

    def item(self, record: Record) -> dict[str, Any]:
        """A record as a DataLoader's worker gives it: see `opened`.

        Raises:
            VltrainError: as for `encode` and `opened`.
        """
        return self.opened(self.encode(record), record)

    def opened(self, sample: Sample, record: Record) -> dict[str, Any]:
        """The sample of a record with its pictures.

        Returns:
            `input_ids`, `labels` (lists of int), `record` (its name) and, where it has pictures,
            `pixel_values`: float [pictures, 3, S, S]; with a store, `FEATURES`, and pixels only
            of pictures that it lacks. Under `bad_pictures="drop"`, where a picture is missing or
            broken, nothing but `DROPPED`: the reason, which names the record and the path.

        Raises:
            VltrainError: this reason, under `bad_pictures="error"`.
        """
        item: dict[str, Any] = {
            "input_ids": sample.input_ids,
            "labels": sample.labels,
            "record": record.name,
        }
        if sample.images:
            try:
                item |= self.shown(sample.images, record)
            except VltrainError as error:
                if self.bad_pictures == "error":
                    raise
                return {DROPPED: str(error)}
        return item

    def shown(self, sources: Sequence[str], record: Record) -> dict[str, Any]:
        """The pictures of a record: what `opened` adds for them.

        Raises:
            VltrainError: one is missing or broken.
        """
        if self.features is None:
            return {"pixel_values": self._pixels([self._open(s, record) for s in sources])}
        places = [self.locate(source, record) for source in sources]
        kept = [self.features.find(place) for place in places]
        lacking = [
            self._open(source, record)
            for source, features in zip(sources, kept, strict=True)
            if features is None
        ]
        given: dict[str, Any] = {FEATURES: (self.features.input_name, kept)}
        return given | ({"pixel_values": self._pixels(lacking)} if lacking else {})

    def sources(self, record: Record) -> tuple[str, ...]:
        """What the pictures of a record are named by, in order; no text is encoded."""
        return tuple(read_conversation(record.value, format=self.format)[0].image_sources)

    def locate(self, source: str, record: Record) -> Place:
        """Where a picture of a record is; raises VltrainError where it is not."""
        place = self.pictures.locate(source, record.file)
        if isinstance(place, Fault):
            raise error_of([place], record.name)
        return place

    def pixels(self, picture: Place) -> Any:
        """A picture as the model takes it, float [3, S, S]; raises VltrainError if it is broken."""
        return self._pixels([open_image(picture, side=self.processor.picture_side)])[0]

    def _pixels(self, pictures: Sequence[Image]) -> Any:
        return self.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]

    def _open(self, source: str, record: Record) -> Image:
        side = self.processor.picture_side
        return self.pictures.open(source, record.file, where=record.name, side=side)


class SampleDataset:
    """Samples with their pixels, by number: a map-style dataset for a DataLoader.

    `ds[i]` reads a record from the table, encodes it, and opens and preprocesses its pictures,
    in the worker that asks for it. How long the samples are, and the like, is known beforehand.
    """

    def __init__(
        self,
        table: SampleTable,
        reader: RecordReader,
        numbers: NDArray[np.integer] | None = None,
    ) -> None:
        """Samples of a table.

        Args:
            table: its records, checked under the reader's settings.
            reader: makes samples of them.
            numbers: the table's rows that are samples here; None: all of them.
        """
        self.table = table
        self.reader = reader
        self._numbers = np.arange(len(table), dtype=np.int32) if numbers is None else numbers
        column = {
            name: values if numbers is None else values[numbers]
            for name, values in table.numbers.items()
        }
        # int32, one of each sample
        self.sources = column["source"]  # the place of what it is from, among what a run reads
        self.lengths = column["tokens"]  # image tokens included
        self.learned_tokens = column["learned_tokens"]
        self.image_counts = column["image_count"]
        self.largest_ids = column["largest_id"]

    @classmethod
    def of_records(
        cls, records: Sequence[Record], processor: Processor, **settings: Any
    ) -> "SampleDataset":
        """A few records that are in memory, encoded at once.

        Args:
            records: of one or several files.
            processor, settings: as for `RecordReader`.

        Raises:
            VltrainError: faulty records, all of them in one message.
        """
        reader = RecordReader(processor, **settings)
        kept: list[tuple[Record, Sample]] = []
        errors: list[str] = []
        for record in records:
            try:
                kept.append((record, reader.encode(record)))
            except VltrainError as error:
                errors.append(str(error))
        if errors:
            raise VltrainError("\n".join(errors))
        return cls(SampleTable.in_memory(rows_of(kept)), reader)

    @property
    def processor(self) -> Processor:
        """The model's side of it."""
        return self.reader.processor

    def __len__(self) -> int:
        return len(self._numbers)

    def name(self, number: int) -> str:
        """What errors call a sample."""
        return self.table.name(self._numbers[number])

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One sample: see `RecordReader.item`."""
        return self.reader.item(self.record(number))

    def record(self, number: int) -> Record:
        """What a sample is made of."""
        return self.table.record(self._numbers[number])
