"""What is kept of the records of a file to compare them with each other: a few bytes of each.

A tally is made of each chunk of records, in the process that checks them, and added to that of
the whole file. What comes out does not depend on where the chunks end.
"""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from vltrain.data.conversation import Conversation, ImagePart
from vltrain.data.grounding import GRID, Box, Region

FOUND_TOO_LONG = 0  # in place of a length that has a finding already
NO_CONTENT = 0  # in place of the content of a record that could not be read
_MOST_BOXES = 64  # distinct ones, of a file; enough to tell chance from pixels
_CHANCE = 1e-4  # that boxes on the grid lie as boxes in pixels do
_LEAST_CHANCE = 0.05  # of one box: what is boxed in small pictures is alike, so no few are enough
_REACH = 0.5  # of a picture's sides: boxes in pixels go beyond that


@dataclass(frozen=True)
class Spot:
    """The far corner of a region, and the size in pixels of the picture it lies on."""

    right: int
    bottom: int
    width: int
    height: int


@dataclass(frozen=True)
class Traits:
    """What is kept of one record."""

    content: int  # see `content_of`
    length: int  # tokens, or characters; FOUND_TOO_LONG
    answers: tuple[str, ...]  # what is learned
    spots: tuple[Spot, ...] = ()  # of its regions, where its pictures have a size


@dataclass
class Majority:
    """The one text that can be more than half of many, found without keeping any other.

    A text that is a share p of them all is `text`, with a lead of at least (2p - 1) times the
    total (Boyer and Moore 1981; sums of such counts hold the same: Agarwal et al. 2013).
    """

    text: str = ""
    lead: int = 0
    total: int = 0

    def add(self, text: str, lead: int = 1, total: int = 1) -> None:
        """Count a text, or what another such count has come to."""
        self.total += total
        if text == self.text:
            self.lead += lead
        elif lead > self.lead:
            self.text, self.lead = text, lead - self.lead
        else:
            self.lead -= lead


@dataclass
class PixelScale:
    """Do a file's boxes lie on their pictures as boxes in pixels would?

    A number in pixels is at most its picture's side, whatever the picture. One on the grid of
    1000 keeps under that side by chance alone.
    """

    fits: bool = True  # all so far lie inside their pictures' sizes in pixels
    spots: dict[Spot, None] = field(default_factory=dict)  # the first distinct ones, in order

    def add(self, spots: Iterable[Spot]) -> None:
        """Count some more, as long as all fit."""
        for spot in spots if self.fits else ():
            self.fits = self.fits and spot.right <= spot.width and spot.bottom <= spot.height
            if len(self.spots) < _MOST_BOXES:
                self.spots[spot] = None

    @property
    def looks_like_pixels(self) -> bool:
        """Are the boxes inside, in the far half too, and too many for chance?"""
        if not self.fits or not self.spots:
            return False
        reaches = [(spot.right / spot.width, spot.bottom / spot.height) for spot in self.spots]
        far_half = all(max(axis) > _REACH for axis in zip(*reaches, strict=True))
        shares = (min(1, s.width / GRID) * min(1, s.height / GRID) for s in self.spots)
        chance = math.prod(max(_LEAST_CHANCE, share) for share in shares)
        return far_half and chance < _CHANCE


@dataclass
class FileTally:
    """What is kept of the records of one file, in their order: 12 bytes of each."""

    file: Path
    contents: "array[int]" = field(default_factory=lambda: array("Q"))
    lengths: "array[int]" = field(default_factory=lambda: array("I"))
    answers: Majority = field(default_factory=Majority)
    boxes: PixelScale = field(default_factory=PixelScale)

    def count(self, traits: Traits | None) -> None:
        """Add one record; None: it could not be read."""
        self.contents.append(traits.content if traits else NO_CONTENT)
        self.lengths.append(traits.length if traits else 0)
        if traits:
            for answer in traits.answers:
                self.answers.add(answer)
            self.boxes.add(traits.spots)

    def add(self, later: "FileTally") -> None:
        """Add the tally of the records that come next."""
        self.contents.extend(later.contents)
        self.lengths.extend(later.lengths)
        self.answers.add(later.answers.text, later.answers.lead, later.answers.total)
        self.boxes.fits = self.boxes.fits and later.boxes.fits
        self.boxes.add(later.boxes.spots)


def content_of(
    conversation: Conversation, places: Mapping[str, str | None], oddities: Iterable[str] = ()
) -> int:
    """64 bits that two records share if they say the same about the same pictures.

    Of a million different records, two share them with a chance of 3 in 100 million.

    Args:
        conversation: roles, texts, weights and pictures count; the id does not.
        places: the files of pictures, by their sources; None where it is no file.
        oddities: kinds of faults for which the conversation is not quite what the record says,
            such as a first turn that was dropped; they are told apart from records without.
    """
    said = sorted(oddities)
    for turn in conversation.turns:
        said.append(f"{turn.role} {turn.learn}")
        for part in turn.parts:
            if isinstance(part, ImagePart):
                path = places.get(part.source) or part.source
                said.append(f"picture {len(path)} {path}")
            else:
                said.append(f"text {len(part.text)} {part.text}")
    digest = blake2b("\n".join(said).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1  # 0 is NO_CONTENT


def learned_answers(conversation: Conversation) -> tuple[str, ...]:
    """What is learned of a conversation, turn by turn; silence is a fault of its own."""
    learned = [turn for turn in conversation.turns if turn.role == "assistant" and turn.learn]
    return tuple([turn.written for turn in learned if not turn.is_blank])


def characters(conversation: Conversation) -> int:
    """How long what is said is, pictures left out."""
    return sum(len(turn.text) for turn in conversation.turns)


def spots_of(regions: Sequence[Region], picture: tuple[int, int] | None) -> tuple[Spot, ...]:
    """The far corners of regions on a picture of that size in pixels; none without a size."""
    if picture is None:
        return ()
    return tuple(
        Spot(region.x2, region.y2, *picture)
        if isinstance(region, Box)
        else Spot(max(x for x, _ in region.corners), max(y for _, y in region.corners), *picture)
        for region in regions
    )
