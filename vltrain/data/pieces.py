"""Token ids -> pieces that a person can read: what a model gets, token by token.

Most tokens are text by themselves. Some hold only a part of a character's bytes: such tokens
stand together in one piece. The image tokens of a picture are one piece as well.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Literal

from vltrain.data.encoding import IGNORE_INDEX, Sample

PieceKind = Literal["text", "control", "image"]

_UNREADABLE = "\ufffd"  # what bytes that are no whole character decode to
_LONGEST_GROUP = 8  # tokens; a character has at most 4 bytes, a token of them at least one


@dataclass(frozen=True)
class Piece:
    """One token, or a few that only make sense together."""

    kind: PieceKind
    text: str  # empty for image tokens
    token_ids: tuple[int, ...]
    learned: bool


def pieces_of(
    sample: Sample,
    decode: Callable[[list[int]], str],
    *,
    control_ids: Set[int],
    image_token_ids: Set[int],
) -> list[Piece]:
    """A sample's tokens in order, each in exactly one piece.

    Args:
        sample: its ids and labels.
        decode: ids to text; bytes that are no whole character become U+FFFD.
        control_ids: tokens with a meaning of their own, such as the start of a turn.
        image_token_ids: tokens whose place the features of a picture take.
    """
    apart = control_ids | image_token_ids
    pieces: list[Piece] = []
    start = 0
    while start < len(sample.input_ids):
        first = sample.input_ids[start]
        if first in image_token_ids:
            piece = Piece("image", "", _image_run(sample, start, image_token_ids), False)
        elif first in control_ids:
            piece = Piece("control", decode([first]), (first,), _is_learned(sample, start))
        else:
            piece = _text_piece(sample, start, decode, apart)
        pieces.append(piece)
        start += len(piece.token_ids)
    return pieces


def _is_learned(sample: Sample, place: int) -> bool:
    return sample.labels[place] != IGNORE_INDEX


def _image_run(sample: Sample, start: int, image_token_ids: Set[int]) -> tuple[int, ...]:
    """The image tokens that stand in a row from `start` on."""
    end = start
    while end < len(sample.input_ids) and sample.input_ids[end] in image_token_ids:
        end += 1
    return tuple(sample.input_ids[start:end])


def _text_piece(
    sample: Sample, start: int, decode: Callable[[list[int]], str], apart: Set[int]
) -> Piece:
    """The token at `start`, with those behind it that complete its last character."""
    learned = _is_learned(sample, start)
    for end in range(start + 1, min(start + _LONGEST_GROUP, len(sample.input_ids)) + 1):
        if sample.input_ids[end - 1] in apart or _is_learned(sample, end - 1) != learned:
            break
        text = decode(sample.input_ids[start:end])
        if _UNREADABLE not in text:
            return Piece("text", text, tuple(sample.input_ids[start:end]), learned)
    alone = sample.input_ids[start]
    return Piece("text", decode([alone]), (alone,), learned)
