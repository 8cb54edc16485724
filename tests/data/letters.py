"""A processor small enough to reckon with by hand."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

START, END, NEWLINE, PAD = 1, 2, 10, 0
IMG, IMGPAD, IMG_END = 901, 902, 903
PICTURE = [IMG, IMGPAD, IMGPAD, IMG_END]


def mean_colours(images: list[Image.Image], return_tensors: str) -> dict[str, Any]:
    """Each picture's mean red, green and blue, as float [n, 3, 1, 1]."""
    assert return_tensors == "pt"
    means = [np.asarray(image, dtype=np.float32).mean(axis=(0, 1)) for image in images]
    return {"pixel_values": torch.tensor(np.stack(means))[:, :, None, None]}


@dataclass(frozen=True)
class LetterProcessor:
    """A letter's id is its code point; a picture is two image tokens; "S" is the system."""

    default_system: str | None = "S"
    picture_side: int | None = None
    turn_start_id: int = START
    turn_end_id: int = END
    newline_id: int = NEWLINE
    pad_id: int = PAD
    fingerprint: str = "letters"
    pixels_fingerprint: str = "mean colours"

    def image_processor(self, images: list[Image.Image], return_tensors: str) -> dict[str, Any]:
        return mean_colours(images, return_tensors)

    def text_ids(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def image_ids(self, source: str) -> list[int]:
        return list(PICTURE)


def letters(text: str) -> list[int]:
    """The ids of a text."""
    return [ord(letter) for letter in text]


def record(*values: str, **keys: Any) -> dict[str, Any]:
    """A record whose turns are from user and assistant by turns."""
    turns = [
        {"from": "assistant" if place % 2 else "user", "value": value}
        for place, value in enumerate(values)
    ]
    return {"conversations": turns, **keys}
