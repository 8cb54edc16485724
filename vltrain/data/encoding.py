"""Conversation x Processor -> segments, learned or not -> Sample.

Layout of a turn (ChatML): `<|im_start|>` role "\\n" text and pictures `<|im_end|>` "\\n", every
part tokenised by itself. Which of it is learned is decided while it is laid out.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from vltrain.data.conversation import Conversation, ImagePart, Part, TextPart, Turn
from vltrain.data.formats import Format, conversation_from_record, record_name
from vltrain.data.swift import ImageSize
from vltrain.errors import VltrainError

IGNORE_INDEX = -100  # the default of torch.nn.functional.cross_entropy
LabelPolicy = Literal["assistant", "reference"]
TooLong = Literal["error", "drop"]


class Processor(Protocol):
    """What data needs of a model: how text and pictures become ids and pixels."""

    image_processor: Callable[..., Any]
    """`image_processor(images=[picture, …], return_tensors="pt")["pixel_values"]`:
    float [n, 3, S, S]."""
    picture_side: int | None
    """Pixels a side that every picture is stretched to; None: that depends on the picture."""
    default_system: str | None
    """What the system turn says where a record has none; None: no system turn then."""
    turn_start_id: int
    turn_end_id: int
    newline_id: int
    pad_id: int
    fingerprint: str
    """Another one where any text or picture has other ids."""
    pixels_fingerprint: str
    """Another one where any picture has other pixels."""

    def text_ids(self, text: str) -> list[int]:
        """Ids of text: its grounding markup is parsed, control tokens stay plain text."""
        ...

    def image_ids(self, source: str) -> list[int]:
        """Ids of one picture: its start, its image tokens, its end."""
        ...


@dataclass(frozen=True)
class Segment:
    """A run of tokens with one answer to: does the model learn to say this?"""

    token_ids: tuple[int, ...]
    learn: bool


@dataclass(frozen=True)
class Sample:
    """One conversation as ids. Labels are unshifted, -100 where not learned."""

    input_ids: list[int]
    labels: list[int]
    images: list[str]  # where the pictures are, in order

    @property
    def learned_tokens(self) -> int:
        """How many tokens have a label; the first position has nothing before it to learn from."""
        return len(self.labels[1:]) - self.labels[1:].count(IGNORE_INDEX)


def ids_and_labels(segments: Iterable[Segment]) -> tuple[list[int], list[int]]:
    """Flatten segments. Labels stay unshifted; the loss does the shift."""
    input_ids: list[int] = []
    labels: list[int] = []
    for segment in segments:
        hidden = [IGNORE_INDEX] * len(segment.token_ids)
        input_ids.extend(segment.token_ids)
        labels.extend(segment.token_ids if segment.learn else hidden)
    return input_ids, labels


def encode(
    record: Any,
    processor: Processor,
    labels: LabelPolicy = "assistant",
    max_length: int | None = None,
    *,
    where: str | None = None,
    format: Format = "auto",
    image_size: ImageSize | None = None,
) -> Sample:
    """One element of the training JSON as ids and labels. Decodes no picture.

    Args:
        record: `{"id": …, "conversations": [{"from": …, "value": …}, …]}`, or another of the
            forms in `formats`.
        processor: the model's side of it.
        labels: "assistant" learns what the assistant says and its `<|im_end|>`; "reference"
            what the original finetune.py learns: also `<|im_start|>`, `<|im_end|>` and the last
            "\\n" of every turn. It reads whatever the original reads, too. Of an assistant's
            turn with weight 0 neither learns anything.
        max_length: tokens, image tokens included; None: any length.
        where: what an error calls the record; without it, its id.
        format: how to read the record; "auto" tells by its content.
        image_size: measures pictures, which boxes in pixels need; None: those are refused.

    Raises:
        VltrainError: the record is faulty (all faults in one message), or longer than
            `max_length`: a sample is never cut.
    """
    if labels not in get_args(LabelPolicy):
        allowed = " or ".join(get_args(LabelPolicy))
        raise VltrainError.at("data.labels", what=f"{labels!r} is unknown", fix=f"write {allowed}")
    where = where or record_name(record)
    conversation = conversation_from_record(
        record,
        lenient=labels == "reference",
        where=where,
        format=format,
        image_size=image_size,
    )
    sample = encode_conversation(conversation, processor, labels)
    if max_length is not None and len(sample.input_ids) > max_length:
        raise too_long_error(sample, processor, max_length, where)
    return sample


def encode_conversation(
    conversation: Conversation, processor: Processor, labels: LabelPolicy = "assistant"
) -> Sample:
    """A conversation as ids and labels; its system turn is the processor's where it has none."""
    turns = _with_system(conversation.turns, processor)
    segments = (part for turn in turns for part in _turn_segments(turn, processor, labels))
    input_ids, label_ids = ids_and_labels(segments)
    return Sample(input_ids, label_ids, list(conversation.image_sources))


def prompt_ids(turns: Sequence[Turn], processor: Processor) -> list[int]:
    """The ids that ask for the next assistant turn: `turns`, then the head of the answer."""
    laid_out = _with_system(tuple(turns), processor)
    input_ids = [token for turn in laid_out for token in turn_ids(turn, processor)]
    head = [processor.turn_start_id, *processor.text_ids("assistant"), processor.newline_id]
    return input_ids + head


def turn_ids(turn: Turn, processor: Processor) -> list[int]:
    """The ids of one turn, its marks and the line end behind it included."""
    return ids_and_labels(_turn_segments(turn, processor, "assistant"))[0]


def plain_ids(parts: Iterable[Part], processor: Processor) -> list[int]:
    """The ids of text and pictures that no turn is made of, as a base was pretrained on them."""
    return [token for part in parts for token in _part_ids(part, processor)]


def _part_ids(part: Part, processor: Processor) -> list[int]:
    if isinstance(part, ImagePart):
        return processor.image_ids(part.source)
    return processor.text_ids(part.text)


def too_long_error(
    sample: Sample, processor: Processor, max_length: int, where: str
) -> VltrainError:
    """The refusal of a sample that has more tokens than `max_length`."""
    message = too_long_message(sample, processor, max_length)
    fix = f"raise data.max_length to {len(sample.input_ids)} or more, or set data.too_long: drop"
    return VltrainError.at(where, what=message, fix=fix)


def too_long_message(sample: Sample, processor: Processor, max_length: int) -> str:
    """How long a sample is, what its pictures take of it, and what the limit is."""
    image_tokens = sum(len(processor.image_ids(source)) for source in sample.images)
    pictures = f"{len(sample.images)} image{'s' if len(sample.images) > 1 else ''}"
    share = f" ({pictures} of them take {image_tokens})" if sample.images else ""
    return f"{len(sample.input_ids)} tokens{share}, data.max_length is {max_length}"


def _with_system(turns: tuple[Turn, ...], processor: Processor) -> tuple[Turn, ...]:
    if (turns[:1] and turns[0].role == "system") or processor.default_system is None:
        return turns
    return (Turn("system", (TextPart(processor.default_system),)), *turns)


def _turn_segments(turn: Turn, processor: Processor, labels: LabelPolicy) -> Iterator[Segment]:
    """Lay out one turn.

    Under "reference" the turn's frame is learned for every role, and so are an assistant's
    `<img>` and `</img>`; the image tokens between them never are. A turn with weight 0 is
    shown only: neither policy learns any of it, its frame included.
    """
    answers = turn.role == "assistant" and turn.learn
    frame = labels == "reference" and turn.learn
    yield Segment((processor.turn_start_id,), learn=frame)
    yield Segment((*processor.text_ids(turn.role), processor.newline_id), learn=False)
    for part in turn.parts:
        if isinstance(part, ImagePart):
            start, *image_tokens, end = processor.image_ids(part.source)
            yield Segment((start,), learn=answers and frame)
            yield Segment(tuple(image_tokens), learn=False)
            yield Segment((end,), learn=answers and frame)
        else:
            yield Segment(tuple(processor.text_ids(part.text)), learn=answers)
    yield Segment((processor.turn_end_id,), learn=answers or frame)
    yield Segment((processor.newline_id,), learn=frame)
