"""Data files in figures: how long, how many pictures and boxes, what is learned, in what script.

`collect` reads, `summarise` counts; nothing of a picture but its header is read.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vltrain.data.conversation import Conversation
from vltrain.data.encoding import LabelPolicy, Processor, Sample, encode_conversation
from vltrain.data.faults import Fault
from vltrain.data.formats import Format, conversation_from_record
from vltrain.data.grounding import parse_boxes
from vltrain.data.images import picture_size
from vltrain.data.packing import pack
from vltrain.data.pictures import LOCAL_PICTURES, Pictures
from vltrain.data.records import Record
from vltrain.data.scripts import script_of
from vltrain.data.sources import scan_records
from vltrain.errors import VltrainError

LIMITS = (512, 1024, 2048, 4096, 8192)  # tokens; values of max_length that people choose
_MOST_BINS = 12  # of a histogram: what a terminal shows without scrolling


@dataclass
class Collected:
    """What was read from data files: a number for each sample, in the order of the files."""

    records: int = 0  # those that cannot be laid out included
    refused: int = 0  # cannot be laid out; `vltrain check` says why
    lengths: list[int] = field(default_factory=list)  # tokens, image tokens included
    learned_tokens: list[int] = field(default_factory=list)
    image_counts: list[int] = field(default_factory=list)
    box_counts: list[int] = field(default_factory=list)
    scripts: Counter[str] = field(default_factory=Counter)  # samples of each
    # Width and height in pixels of every file, and of bytes in memory by their SHA-256; None
    # where it is no picture.
    image_sizes: dict[Path | bytes, tuple[int, int] | None] = field(default_factory=dict)
    missing_images: int = 0  # pictures that no file was found for


@dataclass(frozen=True)
class Spread:
    """How numbers are spread; each but the mean is one of them."""

    least: int
    median: int
    mean: float
    p95: int  # 95 of 100 are at most this
    most: int


@dataclass(frozen=True)
class Bin:
    """A bar of a histogram: how many samples have from `first` to `last` tokens."""

    first: int
    last: int
    samples: int


@dataclass(frozen=True)
class PictureCounts:
    """The pictures of data files."""

    total: int  # a file that several samples show counts for each
    per_sample: dict[int, int]  # samples with so many pictures
    files: int  # different ones that could be read
    unreadable: int  # missing ones, and files that are no picture
    width: Spread | None  # pixels, of the files
    height: Spread | None


@dataclass(frozen=True)
class Packing:
    """What packing samples into rows of one length can be expected to give."""

    max_length: int  # tokens of a row
    samples: int  # that fit a row; longer ones are left out
    rows: int
    efficiency: float  # share of the rows' tokens that are samples'


@dataclass(frozen=True)
class Summary:
    """Data files in figures."""

    records: int
    refused: int
    tokens: int
    learned_tokens: int
    learned_share: float
    lengths: Spread | None  # None: no record could be laid out
    histogram: tuple[Bin, ...]
    pictures: PictureCounts
    boxes: int
    samples_with_boxes: int
    scripts: dict[str, int]  # samples of each, most frequent first
    over_limit: dict[int, int]  # max_length -> samples that are longer
    packing: Packing


def collect(
    files: Iterable[Path],
    processor: Processor,
    *,
    format: Format = "auto",
    labels: LabelPolicy = "assistant",
    pictures: Pictures = LOCAL_PICTURES,
) -> Collected:
    """Read data files once; records that cannot be laid out are counted and left out."""
    collected = Collected()
    for file in files:
        for entry in scan_records(file):
            if not isinstance(entry, Record):
                collected.records += entry.index is not None
                collected.refused += entry.index is not None
                continue
            collected.records += 1
            try:
                conversation = conversation_from_record(
                    entry.value,
                    lenient=labels == "reference",
                    where=entry.name,
                    format=format,
                    image_size=pictures.measure(entry.file),
                )
            except VltrainError:
                collected.refused += 1
                continue
            sample = encode_conversation(conversation, processor, labels)
            _count_sample(collected, conversation, sample)
            _count_pictures(collected, conversation, entry, pictures)
    return collected


def summarise(collected: Collected, max_length: int) -> Summary:
    """The figures of what was read.

    Args:
        collected: what `collect` gave.
        max_length: tokens of a packed row, and one more limit to count longer samples for.
    """
    tokens, learned = sum(collected.lengths), sum(collected.learned_tokens)
    return Summary(
        records=collected.records,
        refused=collected.refused,
        tokens=tokens,
        learned_tokens=learned,
        learned_share=learned / tokens if tokens else 0.0,
        lengths=spread(collected.lengths),
        histogram=histogram(collected.lengths),
        pictures=_pictures(collected),
        boxes=sum(collected.box_counts),
        samples_with_boxes=sum(count > 0 for count in collected.box_counts),
        scripts=dict(collected.scripts.most_common()),
        over_limit={
            limit: sum(length > limit for length in collected.lengths)
            for limit in sorted({*LIMITS, max_length})
        },
        packing=expected_packing(collected.lengths, max_length),
    )


def spread(values: Sequence[int]) -> Spread | None:
    """How numbers are spread, None where there are none; percentiles are by nearest rank."""
    if not values:
        return None
    ordered = sorted(values)

    def rank(share: float) -> int:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    mean = sum(ordered) / len(ordered)
    return Spread(ordered[0], rank(0.5), mean, rank(0.95), ordered[-1])


def histogram(lengths: Sequence[int]) -> tuple[Bin, ...]:
    """At most a dozen bars of one width, a round number, from the shortest to the longest."""
    if not lengths:
        return ()
    shortest, longest = min(lengths), max(lengths)
    widths = (digit * 10**power for power in range(20) for digit in (1, 2, 5))
    width = next(w for w in widths if longest // w - shortest // w < _MOST_BINS)
    counts = Counter(length // width for length in lengths)
    return tuple(
        Bin(number * width, (number + 1) * width - 1, counts[number])
        for number in range(shortest // width, longest // width + 1)
    )


def expected_packing(lengths: Iterable[int], max_length: int) -> Packing:
    """How full the rows of `data.packing` would be: packed as a run of these samples packs them."""
    fitting = [length for length in lengths if length <= max_length]
    rows = len(pack(fitting, max_length, seed=0, epoch=0))
    efficiency = sum(fitting) / (rows * max_length) if rows else 0.0
    return Packing(max_length, len(fitting), rows, efficiency)


def _count_sample(collected: Collected, conversation: Conversation, sample: Sample) -> None:
    spoken = [turn.text for turn in conversation.turns if turn.role != "system"]
    collected.lengths.append(len(sample.input_ids))
    collected.learned_tokens.append(sample.learned_tokens)
    collected.image_counts.append(len(sample.images))
    collected.box_counts.append(sum(len(parse_boxes(text)[0]) for text in spoken))
    collected.scripts[script_of("\n".join(spoken))] += 1


def _count_pictures(
    collected: Collected, conversation: Conversation, record: Record, pictures: Pictures
) -> None:
    for source in conversation.image_sources:
        place = pictures.locate(source, record.file)
        if isinstance(place, Fault):
            collected.missing_images += 1
            continue
        key = place if isinstance(place, Path) else hashlib.sha256(place).digest()
        if key not in collected.image_sizes:
            size = picture_size(place)
            collected.image_sizes[key] = None if isinstance(size, Fault) else size


def _pictures(collected: Collected) -> PictureCounts:
    sizes = [size for size in collected.image_sizes.values() if size is not None]
    broken = len(collected.image_sizes) - len(sizes)
    return PictureCounts(
        total=sum(collected.image_counts),
        per_sample=dict(sorted(Counter(collected.image_counts).items())),
        files=len(sizes),
        unreadable=collected.missing_images + broken,
        width=spread([width for width, _ in sizes]),
        height=spread([height for _, height in sizes]),
    )
