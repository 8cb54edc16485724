"""The sizes of a Qwen-VL v1 model, under the names of the published `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from vltrain.errors import VltrainError
from vltrain.models.loss import ROWS
from vltrain.models.sizes import DecoderSizes, ModelSizes, TowerSizes

# What a published config.json says that would lead the Auto classes to remote code.
FOREIGN_KEYS = ("auto_map", "architectures", "model_type")


@dataclass(frozen=True)
class VisionSizes:
    """The `visual` section: the ViT, the resampler and the ids that mark a picture's place."""

    image_size: int  # pixels, the picture is a square
    patch_size: int  # pixels
    width: int  # of the ViT
    layers: int
    heads: int
    mlp_ratio: float
    output_dim: int  # width of the language model
    image_start_id: int  # <img>; </img> is the next id, <imgpad> the one after
    n_queries: int = 256  # image tokens a picture becomes

    @property
    def mlp_width(self) -> int:
        """Width of the hidden layer of the ViT's MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def patches(self) -> int:
        """Of a picture."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def image_end_id(self) -> int:
        return self.image_start_id + 1

    @property
    def image_pad_id(self) -> int:
        return self.image_start_id + 2


def _published_vision() -> dict[str, Any]:
    return {
        "image_size": 448,
        "patch_size": 14,
        "width": 1664,
        "layers": 48,
        "heads": 16,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "image_start_id": 151857,
        "n_queries": 256,
    }


class QwenVLConfig(PreTrainedConfig):
    """Sizes of the decoder and, in `visual`, of the ViT and the resampler.

    Defaults are those of Qwen/Qwen-VL-Chat. `intermediate_size` counts both halves of the
    gated MLP: each of `w1` and `w2` is half as wide. `seq_length` is the length the model was
    trained at; past it, in eval mode, positions and queries are rescaled.
    """

    model_type = "qwen_vl"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]  # the Trainer adds to it

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128  # width of a head
    max_position_embeddings: int = 8192
    seq_length: int = 2048  # tokens
    layer_norm_epsilon: float = 1e-6
    initializer_range: float = 0.02
    rotary_emb_base: float = 10000.0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    visual: dict[str, Any] = field(default_factory=_published_vision)

    @property
    def vision(self) -> VisionSizes:
        """The `visual` section, typed."""
        known = VisionSizes.__dataclass_fields__
        return VisionSizes(**{k: v for k, v in self.visual.items() if k in known})

    @property
    def head_dim(self) -> int:
        return self.kv_channels

    def model_sizes(self) -> ModelSizes:
        """The shapes that memory is computed from."""
        vision = self.vision
        return ModelSizes(
            decoder=DecoderSizes(
                layers=self.num_hidden_layers,
                width=self.hidden_size,
                heads=self.num_attention_heads,
                attention_width=self.num_attention_heads * self.kv_channels,
                mlp_width=self.intermediate_size // 2,
                vocabulary=self.vocab_size,
            ),
            tower=TowerSizes(
                layers=vision.layers,
                width=vision.width,
                heads=vision.heads,
                mlp_width=vision.mlp_width,
                patches=vision.patches,
                image_tokens=vision.n_queries,
                marks=2,
            ),
            loss_rows=ROWS,
        )

    @classmethod
    def from_published(cls, values: dict[str, Any]) -> "QwenVLConfig":
        """A config from what a published `config.json` holds, without the way to remote code.

        Raises:
            VltrainError: a size is no number, or one of the `visual` section is missing.
        """
        known = vars(cls())
        sizes = _published_vision()
        vision = values.get("visual", sizes)
        if not isinstance(vision, dict):
            vision = {}
        faults = [
            *_wrong_values(values, {k: v for k, v in known.items() if k in cls.__annotations__}),
            *_wrong_values(vision, sizes),
            *(f"`visual` lacks {key}" for key in sizes if key not in vision | {"n_queries": 256}),
        ]
        if faults:
            raise VltrainError.at(
                "config.json",
                what=f"does not describe a Qwen-VL: {', '.join(faults)}",
                fix="use the config.json that was published with the weights",
            )
        return cls(**{k: v for k, v in values.items() if k not in FOREIGN_KEYS})


def _wrong_values(values: Mapping[str, Any], examples: Mapping[str, Any]) -> list[str]:
    """What is not of the kind of its example (a truth value, or a number above zero), in words."""
    return [
        f"{key} is {values[key]!r}"
        for key, example in examples.items()
        if key in values and isinstance(example, int | float) and not _is_like(values[key], example)
    ]


def _is_like(value: Any, example: bool | int | float) -> bool:
    if isinstance(example, bool) or isinstance(value, bool):
        return isinstance(example, bool) and isinstance(value, bool)
    return isinstance(value, int if isinstance(example, int) else int | float) and value > 0
