"""What differs between model families, as one frozen value."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from vltrain.models.layout import LayoutOf
from vltrain.models.sizes import ModelSizes

Part = Literal["vision", "projector", "language"]


@dataclass(frozen=True)
class Parts:
    """Where the parts of a model lie: prefixes of parameter names. The longest match wins."""

    vision: tuple[str, ...]
    projector: tuple[str, ...]
    language: tuple[str, ...]

    def of(self, parameter: str) -> Part:
        """The part a parameter belongs to.

        Raises:
            KeyError: no prefix fits; the family's value is wrong.
        """
        sizes: dict[Part, int] = {}
        for part in ("vision", "projector", "language"):
            fitting = [p for p in getattr(self, part) if has_prefix(parameter, p)]
            if fitting:
                sizes[part] = max(map(len, fitting))
        if not sizes:
            raise KeyError(parameter)
        return max(sizes, key=lambda part: sizes[part])


def has_prefix(name: str, prefix: str) -> bool:
    """Whether a dotted name is `prefix` or lies below it."""
    return name == prefix or name.startswith(prefix + ".")


@dataclass(frozen=True)
class FeatureStage:
    """A point on the way from pixels to image tokens whose values can be kept of a picture."""

    input_name: str  # what the model's forward calls them
    fed_by: tuple[Part, ...]  # the parts whose weights the values follow from
    shape: Callable[[Any], tuple[int, ...]]  # of one picture's values, by the config
    # The values of pictures: float [N, 3, S, S] -> [N, *shape], on the model's device.
    compute: Callable[[PreTrainedModel, Tensor], Tensor]


@dataclass(frozen=True)
class ExamplePicture:
    """How one picture stands in a made-up sample: for what is to be measured without a tokenizer.

    In the place of a processor it reads pictures for the model.
    """

    input_ids: tuple[int, ...]  # marks and image tokens
    image_processor: Callable[..., Any]
    picture_side: int | None  # as for `data.encoding.Processor`


@dataclass(frozen=True)
class Family:
    """One model family: how it is told, read, adapted and laid out."""

    name: str
    model_types: tuple[str, ...]  # of config.json
    accepts: Callable[[Mapping[str, Any]], bool]  # a config.json of such a type, read
    read_config: Callable[[dict[str, Any]], PreTrainedConfig]
    model_class: type[PreTrainedModel]
    read_processor: Callable[[Path], Any]
    parts: Parts
    # What of the projector learns when a recipe does not say.
    default_projector: tuple[str, ...]
    lora_targets: tuple[str, ...]
    embeddings: tuple[str, ...]  # modules that learn beside LoRA when the base is not chat-tuned
    constants: tuple[str, ...]  # parameters that are stored but learn only where a run says so
    # Lets the vision side run in batches without pictures too, for processes that wait for it.
    see_always: Callable[[PreTrainedModel], None]
    # Shapes that memory is computed from; it takes what `read_config` gives.
    read_sizes: Callable[[Any], ModelSizes]
    example_picture: Callable[[Any], ExamplePicture]  # by the config
    feature_stages: tuple[FeatureStage, ...]  # the last on the way first
    decoder: str  # the list of its layers, each a function of what the one before it gives
    last_norm: str  # between the last of them and the head
    layouts: Mapping[str, LayoutOf]  # that `vltrain export` writes, by their names

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layer classes that the model is a stack of."""
        return tuple(self.model_class._no_split_modules)
