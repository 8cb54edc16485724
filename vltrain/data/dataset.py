"""Records -> samples with their pictures."""

import random
from collections.abc import Sequence
from typing import Any, Literal

from PIL.Image import Image

from vltrain.data.encoding import LabelPolicy, Processor, Sample, encode, too_long_error
from vltrain.data.formats import Format
from vltrain.data.pictures import LOCAL_PICTURES, BadPictures, Pictures
from vltrain.data.records import Record
from vltrain.errors import VltrainError

TooLong = Literal["error", "drop"]
DROPPED = "dropped"
"""Key of what stands for a sample that cannot be shown: why not; of a batch: all such reasons."""


def split_records(
    records: Sequence[Record], share: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """Records to learn from and records to evaluate on, each in their old order.

    Args:
        records: at least two of them, unless `share` is 0.
        share: of the records that are held out, in [0, 1); at least one where it is not 0.
        seed: decides which; the same seed gives the same split.

    Raises:
        VltrainError: nothing would be left to learn from.
    """
    held_out = 0 if share == 0 else max(1, round(share * len(records)))
    if not 0 <= share < 1 or held_out >= max(1, len(records)):
        what = f"{share} of {len(records)} records leaves none to learn from"
        raise VltrainError.at("data.eval_share", what=what, fix="set a share such as 0.05, or 0")
    chosen = set(random.Random(seed).sample(range(len(records)), held_out))
    train = [record for place, record in enumerate(records) if place not in chosen]
    return train, [records[place] for place in sorted(chosen)]


class SampleDataset:
    """Samples with their pixels, by number: a map-style dataset for a DataLoader.

    All records are encoded once when it is made (no picture is decoded), so that faults are
    found and lengths known before a run starts. `ds[i]` opens and preprocesses the pictures,
    in the worker that asks for it.
    """

    def __init__(
        self,
        records: Sequence[Record],
        processor: Processor,
        *,
        labels: LabelPolicy = "assistant",
        max_length: int | None = None,
        too_long: TooLong = "error",
        pictures: Pictures = LOCAL_PICTURES,
        format: Format = "auto",
        bad_pictures: BadPictures = "error",
    ) -> None:
        """Encode the records and keep those that fit.

        Args:
            records: of one or several files.
            processor: the model's side of it.
            labels: what is learned, as in `encode`.
            max_length: tokens, image tokens included; None: any length.
            too_long: refuse longer samples, or drop and count them.
            pictures: where pictures are looked up.
            format: how records are read; "auto" tells by the content of each.
            bad_pictures: what `ds[i]` does where a picture cannot be opened: raise, or give
                no sample but the reason.

        Raises:
            VltrainError: faulty or too long records, all of them in one message.
        """
        self.processor = processor
        self.labels = labels
        self.pictures = pictures
        self.format: Format = format
        self.bad_pictures: BadPictures = bad_pictures
        self.records: list[Record] = []
        self.lengths: list[int] = []  # tokens of each sample, image tokens included
        self.learned_tokens: list[int] = []  # of each sample
        self.image_counts: list[int] = []  # of each sample
        self.largest_ids: list[int] = []  # of each sample
        self.dropped = 0  # records longer than max_length that were left out
        errors: list[str] = []
        for record in records:
            try:
                sample = self._encode(record)
            except VltrainError as error:
                errors.append(str(error))
                continue
            if max_length is None or len(sample.input_ids) <= max_length:
                self._keep(record, sample)
            elif too_long == "drop":
                self.dropped += 1
            else:
                errors.append(str(too_long_error(sample, processor, max_length, record.name)))
        if errors:
            raise VltrainError("\n".join(errors))

    def _keep(self, record: Record, sample: Sample) -> None:
        self.records.append(record)
        self.lengths.append(len(sample.input_ids))
        self.learned_tokens.append(sample.learned_tokens)
        self.image_counts.append(len(sample.images))
        self.largest_ids.append(max(sample.input_ids))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One sample.

        Returns:
            `input_ids`, `labels` (lists of int), `record` (its name) and, where it has pictures,
            `pixel_values`: float [pictures, 3, S, S]. Under `bad_pictures="drop"`, where a
            picture is missing or broken, nothing but `DROPPED`: the reason, which names the
            record and the path.

        Raises:
            VltrainError: this reason, under `bad_pictures="error"`.
        """
        record = self.records[number]
        sample = self._encode(record)
        item: dict[str, Any] = {
            "input_ids": sample.input_ids,
            "labels": sample.labels,
            "record": record.name,
        }
        if sample.images:
            try:
                pictures = [self._open(source, record) for source in sample.images]
            except VltrainError as error:
                if self.bad_pictures == "error":
                    raise
                return {DROPPED: str(error)}
            processed = self.processor.image_processor(images=pictures, return_tensors="pt")
            item["pixel_values"] = processed["pixel_values"]
        return item

    def _open(self, source: str, record: Record) -> Image:
        side = self.processor.picture_side
        return self.pictures.open(source, record.file, where=record.name, side=side)

    def _encode(self, record: Record) -> Sample:
        return encode(
            record.value,
            self.processor,
            self.labels,
            where=record.name,
            format=self.format,
            image_size=self.pictures.measure(record.file),
        )
