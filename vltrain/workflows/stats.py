"""Data files in figures: `vltrain stats`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from vltrain.config import DataConfig
from vltrain.data.encoding import LabelPolicy
from vltrain.data.formats import Format
from vltrain.data.pictures import LOCAL_PICTURES, Pictures
from vltrain.data.statistics import PictureCounts, Spread, Summary, collect, summarise
from vltrain.errors import VltrainError
from vltrain.models.loading import load_processor

_BAR = 40  # characters of the longest bar


def stats(
    files: Sequence[Path],
    *,
    model: str,
    format: Format = "auto",
    labels: LabelPolicy = "assistant",
    pictures: Pictures = LOCAL_PICTURES,
    max_length: int | None = None,
    as_json: bool = False,
) -> None:
    """Print the figures of data files to stdout.

    Args:
        files: data files, folders or names, as `sources.scan_records` takes them.
        model: a folder or a name on the hub, whose tokenizer counts; no weights are loaded.
        format: how records are read; "auto" tells by the content of each.
        labels: what a run learns of them, as `encode` has it.
        pictures: where pictures are looked up.
        max_length: tokens; of a packed row, and a limit to count longer samples for. None: what
            a recipe has that does not say.
        as_json: print one JSON object instead of text.

    Raises:
        VltrainError: no record of the files can be read.
    """
    processor = load_processor(model)
    collected = collect(files, processor, format=format, labels=labels, pictures=pictures)
    if not collected.lengths:
        raise VltrainError.at(
            ", ".join(str(file) for file in files),
            what="no record can be read",
            fix="`vltrain check` says what is wrong",
        )
    summary = summarise(collected, max_length or DataConfig(files=()).max_length)
    if as_json:
        print(json.dumps(asdict(summary)))
    else:
        print_summary(summary, Console(highlight=False))


def print_summary(summary: Summary, console: Console) -> None:
    """The figures as text, a paragraph for each subject."""
    for title, lines in (
        ("records", _record_lines(summary)),
        ("tokens per sample", _length_lines(summary)),
        ("pictures", _picture_lines(summary.pictures)),
        ("boxes", _box_lines(summary)),
        ("script", _script_lines(summary)),
        ("longer than", _limit_lines(summary)),
        ("packing", _packing_lines(summary)),
    ):
        console.print(Text(title, "bold"))
        for line in lines:
            console.print(Text(f"  {line}"), soft_wrap=True)


def _record_lines(summary: Summary) -> list[str]:
    lines = [
        f"{summary.records:,} read, of {summary.tokens:,} tokens",
        f"{summary.learned_tokens:,} of the tokens are learned ({summary.learned_share:.1%})",
    ]
    if summary.refused:
        lines.append(f"{summary.refused:,} left out here: `vltrain check` says what is wrong")
    return lines


def _length_lines(summary: Summary) -> list[str]:
    """The spread of the lengths, then a bar for each bin of the histogram."""
    tallest = max(found.samples for found in summary.histogram)
    wide = len(f"{summary.histogram[-1].last:,}")
    bars = [
        f"{found.first:>{wide},} - {found.last:>{wide},}  {_bar(found.samples, tallest)}"
        for found in summary.histogram
    ]
    return [_spread(summary.lengths), *bars]


def _picture_lines(pictures: PictureCounts) -> list[str]:
    lines = [f"{pictures.total:,} in all, {pictures.files:,} different files"]
    tallest = max(pictures.per_sample.values())
    for count, samples in pictures.per_sample.items():
        lines.append(f"{count:>3} in a sample  {_bar(samples, tallest)}")
    if pictures.width and pictures.height:
        lines.append(f"width in pixels: {_spread(pictures.width)}")
        lines.append(f"height in pixels: {_spread(pictures.height)}")
    if pictures.unreadable:
        lines.append(f"{pictures.unreadable:,} missing or unreadable")
    return lines


def _box_lines(summary: Summary) -> list[str]:
    with_boxes = f"{summary.samples_with_boxes:,} of {summary.records - summary.refused:,} samples"
    return [f"{summary.boxes:,} in {with_boxes}"]


def _script_lines(summary: Summary) -> list[str]:
    total = sum(summary.scripts.values())
    return [
        f"{script:<10}  {samples:>9,} of {total:,} samples ({samples / total:.1%})"
        for script, samples in summary.scripts.items()
    ]


def _limit_lines(summary: Summary) -> list[str]:
    """What each max_length would drop."""
    total = summary.records - summary.refused
    return [
        f"max_length {limit:>6,}: {longer:>9,} of {total:,} samples ({longer / total:.1%})"
        for limit, longer in summary.over_limit.items()
    ]


def _packing_lines(summary: Summary) -> list[str]:
    packing = summary.packing
    if not packing.rows:
        return [f"no sample fits a row of {packing.max_length:,} tokens"]
    return [
        f"samples that fit {packing.max_length:,} tokens: {packing.samples:,}",
        f"rows that they fill: {packing.rows:,}, {packing.efficiency:.1%} full "
        f"({packing.efficiency * packing.rows / packing.samples:.1%} with one sample a row)",
    ]


def _spread(found: Spread | None) -> str:
    assert found is not None, "figures of at least one sample are printed"
    return (
        f"{found.least:,} to {found.most:,}, median {found.median:,}, mean {found.mean:,.1f}, "
        f"95 of 100 at most {found.p95:,}"
    )


def _bar(samples: int, tallest: int) -> str:
    """A bar and its number; whatever is there at all is seen."""
    length = max(1, round(_BAR * samples / tallest)) if samples else 0
    return f"{'█' * length} {samples:,}" if length else f"{samples:,}"
