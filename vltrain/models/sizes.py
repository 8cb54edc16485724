"""How large a model is, as plain numbers: all that its memory is computed from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Place = Literal["vision", "projector", "embeddings", "layers", "head", "adapter"]
"""The parts of a model, the language model in three: what it reads with, its stack, its head."""

HEAD_PIECE = 8192
"""Rows of a learned head's matrix that are computed with at a time, in a process by itself."""


@dataclass(frozen=True)
class DecoderSizes:
    """The language model: a stack of equal layers with a gated MLP in each."""

    layers: int
    width: int  # of the hidden states
    heads: int
    attention_width: int  # heads x width of a head
    mlp_width: int  # of each of the two halves of the gated MLP
    vocabulary: int  # rows of the embedding matrix


@dataclass(frozen=True)
class TowerSizes:
    """The vision tower and what it makes of a picture."""

    layers: int
    width: int
    heads: int
    mlp_width: int
    patches: int  # of a picture
    image_tokens: int  # that a picture becomes
    marks: int  # tokens around them, such as `<img>` and `</img>`


@dataclass(frozen=True)
class ModelSizes:
    """A model's shape, as its family reads it from a config."""

    decoder: DecoderSizes
    tower: TowerSizes
    # Rows of logits that the loss widens to float32 at a time; None: all, and every place's.
    loss_rows: int | None


@dataclass(frozen=True)
class PlaceWeights:
    """Parameters in one place of a model that is about to learn."""

    total: int = 0
    learned: int = 0
    learned_matrices: int = 0  # of the learned ones, those with two dimensions or more
    total_bytes: int = 0
    learned_bytes: int = 0

    def __add__(self, other: "PlaceWeights") -> "PlaceWeights":
        return PlaceWeights(
            self.total + other.total,
            self.learned + other.learned,
            self.learned_matrices + other.learned_matrices,
            self.total_bytes + other.total_bytes,
            self.learned_bytes + other.learned_bytes,
        )


@dataclass(frozen=True)
class AdapterSizes:
    """Low-rank adapters, summed over all adapted layers."""

    inputs: int = 0  # width of what they read
    ranks: int = 0
    outputs: int = 0  # width of what they add to
    dropout: bool = False


@dataclass(frozen=True)
class Census:
    """Where a model's parameters lie, and which of them learn."""

    places: Mapping[Place, PlaceWeights]
    adapters: AdapterSizes

    def at(self, place: Place) -> PlaceWeights:
        """What lies in a place; nothing where the model has no such place."""
        return self.places.get(place, PlaceWeights())

    @property
    def all(self) -> PlaceWeights:
        """Everything together."""
        return sum(self.places.values(), PlaceWeights())

    def rounded(self, width: int) -> "Census":
        """The same where learned weights take no more than `width` bytes each."""
        return replace(
            self,
            places={
                place: replace(
                    weights,
                    total_bytes=weights.total_bytes
                    - weights.learned_bytes
                    + min(weights.learned_bytes, weights.learned * width),
                    learned_bytes=min(weights.learned_bytes, weights.learned * width),
                )
                for place, weights in self.places.items()
            },
        )
