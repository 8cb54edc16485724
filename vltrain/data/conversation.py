"""The one form every data format is read into: turns of text and pictures."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class TextPart:
    """Text between pictures, byte for byte as the record has it."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """Where a picture is: a path as the record gives it, without the blanks around it."""

    source: str


Part = TextPart | ImagePart


@dataclass(frozen=True)
class Turn:
    """What one side says, in order."""

    role: Role
    parts: tuple[Part, ...]
    position: int | None = field(default=None, compare=False)  # in the record's list, from 0
    learn: bool = True  # may an assistant's words be learned? False: they are only shown

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"`{self.role}`" if self.position is None else f"turn {self.position} ({self.role})"

    @cached_property
    def text(self) -> str:
        """The turn's text alone, its pictures left out; every check asks for it."""
        return "".join([part.text for part in self.parts if isinstance(part, TextPart)])

    @property
    def is_blank(self) -> bool:
        """Is there neither a word nor a picture?"""
        return not self.text.strip() and all(isinstance(part, TextPart) for part in self.parts)

    @property
    def written(self) -> str:
        """The turn as the Qwen-VL list has it, its pictures as `<img>path</img>`."""
        return "".join(
            part.text if isinstance(part, TextPart) else f"<img>{part.source}</img>"
            for part in self.parts
        )


@dataclass(frozen=True)
class Conversation:
    """One record: at most one system turn, which is the first, then what is said."""

    turns: tuple[Turn, ...]
    id: str | None = None

    @property
    def image_sources(self) -> tuple[str, ...]:
        """Where the pictures of all turns are, in order."""
        return tuple(
            part.source for turn in self.turns for part in turn.parts if isinstance(part, ImagePart)
        )
