"""What a model will see of data files, as one page: `vltrain preview`."""

import base64
import io
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from rich.console import Console

from vltrain.config import DataConfig
from vltrain.data.checks import Finding, check_files
from vltrain.data.conversation import Conversation, ImagePart
from vltrain.data.encoding import LabelPolicy, Processor, Sample, encode_conversation
from vltrain.data.findings import Report
from vltrain.data.formats import Format, conversation_from_record, record_id
from vltrain.data.grounding import Region, parse_regions
from vltrain.data.images import shown
from vltrain.data.pictures import LOCAL_PICTURES, Pictures
from vltrain.data.pieces import Piece, pieces_of
from vltrain.data.records import Record, Unreadable
from vltrain.data.sources import scan_records
from vltrain.data.statistics import collect, summarise
from vltrain.errors import VltrainError
from vltrain.models.loading import load_processor
from vltrain.training.files import write_whole
from vltrain.workflows.preview_page import PICTURE_SIDE, PageHead, PictureView, SampleView, page

_RAW_CHARACTERS = 4000  # shown of a record that cannot be laid out


class ReadableProcessor(Processor, Protocol):
    """A processor whose ids can be turned back into text."""

    tokenizer: Any
    """`decode(ids)` and `all_special_ids`, as transformers' tokenizers have them."""


@dataclass(frozen=True)
class ViewContext:
    """What the samples of a page are made with."""

    processor: ReadableProcessor
    format: Format
    labels: LabelPolicy
    pictures: Pictures
    findings: dict[tuple[str, int | None], list[Finding]]  # of file and record


def preview(
    files: Sequence[Path],
    output: Path,
    *,
    model: str,
    samples: int = 20,
    seed: int = 0,
    format: Format = "auto",
    labels: LabelPolicy = "assistant",
    pictures: Pictures = LOCAL_PICTURES,
    max_length: int | None = None,
) -> None:
    """Write a page that shows samples as the model gets them; say on stdout where it is.

    The page needs nothing beside it: no script, no network, its pictures are inside. All
    records are read and checked, `samples` of them are shown.

    Args:
        files: data files, folders or names, as `sources.scan_records` takes them.
        output: the HTML file to write; an older one is replaced.
        model: a folder or a name on the hub, whose tokenizer is used; no weights are loaded.
        samples: how many to show, drawn at random and kept in the order of the files.
        seed: decides which; the same seed shows the same samples.
        format: how records are read; "auto" tells by the content of each.
        labels: what a run learns of them, as `encode` has it.
        pictures: where pictures are looked up.
        max_length: tokens, image tokens included; longer samples are marked.

    Raises:
        VltrainError: the page would replace a data file or a folder; there is no such model; or
            the files hold no record.
    """
    _refuse_place(output, files)
    processor = load_processor(model)
    report = check_files(
        files,
        processor=processor,
        format=format,
        labels=labels,
        pictures=pictures,
        max_length=max_length,
    )
    _refuse_empty(report, files)
    context = ViewContext(processor, format, labels, pictures, _by_record(report.findings))
    collected = collect(files, processor, format=format, labels=labels, pictures=pictures)
    views = [_sample_view(entry, context) for entry in chosen_entries(files, samples, seed)]
    head = PageHead(
        files=tuple(str(file) for file in files),
        model=model,
        max_length=max_length,
        summary=summarise(collected, max_length or DataConfig(files=()).max_length),
        findings=report.findings,
    )
    write_page(output, page(head, views))
    size = output.stat().st_size / 1e6
    Console(highlight=False).print(
        f"done: {len(views)} of {report.records:,} records in {output} ({size:.1f} MB)",
        soft_wrap=True,
        markup=False,
    )


def _refuse_empty(report: Report, files: Sequence[Path]) -> None:
    if not report.records:
        raise VltrainError.at(
            ", ".join(str(file) for file in files),
            what="there is no record to show",
            fix="`vltrain check` says what is wrong",
        )


def chosen_entries(files: Iterable[Path], count: int, seed: int) -> list[Record | Unreadable]:
    """Some records of files in their order, each with the same chance; one pass, few in memory."""
    draw = random.Random(seed)
    kept: list[tuple[int, Record | Unreadable]] = []
    for number, entry in enumerate(_entries(files)):
        if len(kept) < count:
            kept.append((number, entry))
        elif (place := draw.randrange(number + 1)) < count:
            kept[place] = (number, entry)
    return [entry for _, entry in sorted(kept, key=lambda numbered: numbered[0])]


def write_page(output: Path, text: str) -> None:
    """Write a page as a whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, text, errors="replace")  # halves of surrogate pairs


def _by_record(findings: Iterable[Finding]) -> dict[tuple[str, int | None], list[Finding]]:
    """The findings of each file's records."""
    found: dict[tuple[str, int | None], list[Finding]] = defaultdict(list)
    for finding in findings:
        found[finding.file, finding.record].append(finding)
    return found


def _refuse_place(output: Path, files: Iterable[Path]) -> None:
    """Keep a slip of the hand from replacing what is no page."""
    what = "is a folder" if output.is_dir() else None
    if output.resolve() in {file.resolve() for file in files}:
        what = "is the data itself"
    if what is not None:
        raise VltrainError.at(str(output), what=what, fix="name another file for the page")


def _entries(files: Iterable[Path]) -> Iterator[Record | Unreadable]:
    """All records and the places that hold none; what is wrong with a whole file is no record."""
    for file in files:
        yield from (entry for entry in scan_records(file) if entry.index is not None)


def _sample_view(entry: Record | Unreadable, context: ViewContext) -> SampleView:
    """All that the page shows of one record."""
    findings = tuple(context.findings.get((str(entry.file), entry.index), ()))
    view = SampleView(name=entry.name, id=None, findings=findings)
    if isinstance(entry, Unreadable):
        return view
    view = replace(view, id=record_id(entry.value))
    try:
        conversation = conversation_from_record(
            entry.value,
            lenient=context.labels == "reference",
            where=entry.name,
            format=context.format,
            image_size=context.pictures.measure(entry.file),
        )
    except VltrainError:
        raw = json.dumps(_without_bytes(entry.value), ensure_ascii=False, indent=2)
        return replace(view, raw=raw[:_RAW_CHARACTERS])
    sample = encode_conversation(conversation, context.processor, context.labels)
    return replace(
        view,
        turns=turns_of(sample, context.processor),
        learned_tokens=sample.learned_tokens,
        pictures=tuple(_picture_views(conversation, entry, context.pictures)),
    )


def _without_bytes(value: Any) -> Any:
    """A record in which every `data:` URI is cut to its beginning."""
    if isinstance(value, dict):
        return {key: _without_bytes(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_bytes(entry) for entry in value]
    return shown(value) if isinstance(value, str) and value.startswith("data:") else value


def turns_of(sample: Sample, processor: ReadableProcessor) -> tuple[tuple[Piece, ...], ...]:
    """A sample's tokens in readable pieces, a turn at a time."""
    tokenizer = processor.tokenizer
    image_ids = {token for source in sample.images for token in processor.image_ids(source)[1:-1]}
    pieces = pieces_of(
        sample,
        tokenizer.decode,
        control_ids=set(tokenizer.all_special_ids) - image_ids,
        image_token_ids=image_ids,
    )
    turns: list[list[Piece]] = []
    for piece in pieces:
        if not turns or piece.token_ids == (processor.turn_start_id,):
            turns.append([])
        turns[-1].append(piece)
    return tuple(tuple(turn) for turn in turns)


def regions_of_pictures(conversation: Conversation) -> list[list[Region]]:
    """The boxes and quads to draw on each picture: each is on the last picture before it.

    What the text does not say is guessed: where there are several pictures, a box may mean an
    earlier one. Those before the first picture are on the first.
    """
    regions: list[list[Region]] = [[]]  # before the first picture, then of each
    for part in (part for turn in conversation.turns for part in turn.parts):
        if isinstance(part, ImagePart):
            regions.append([])
        else:
            regions[-1] += parse_regions(part.text)[0]
    early, *drawn = regions
    if drawn:
        drawn[0] = early + drawn[0]
    return drawn


def _picture_views(
    conversation: Conversation, record: Record, pictures: Pictures
) -> Iterator[PictureView]:
    drawn = regions_of_pictures(conversation)
    for source, regions in zip(conversation.image_sources, drawn, strict=True):
        view = PictureView(shown(source), regions=tuple(regions))
        try:
            image = pictures.open(source, record.file)
        except VltrainError:
            yield view
            continue
        yield replace(view, data_uri=_data_uri(image), size=image.size)


def _data_uri(image: Image.Image) -> str:
    """A picture as a part of the page: a JPEG of at most `PICTURE_SIDE` pixels a side."""
    small = image.copy()
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    written = io.BytesIO()
    small.save(written, "JPEG", quality=88, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode('ascii')}"
