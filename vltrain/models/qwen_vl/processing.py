"""What turns text and pictures into Qwen-VL's inputs: ids of text and pictures, pixels.

Dimension letters: `N` pictures, `S` the side of a preprocessed picture in pixels.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature, ProcessorMixin

from vltrain.errors import VltrainError
from vltrain.models.hub import resolve_model
from vltrain.models.qwen_vl.tokenization import (
    END_OF_TEXT,
    IMAGE_END,
    IMAGE_PAD,
    IMAGE_START,
    TURN_END,
    TURN_START,
    VOCAB_FILE,
    QwenVLTokenizer,
)

# Of the pictures that CLIP was trained on, as every published Qwen-VL has them.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

PUBLISHED_IMAGE_TOKENS = 256  # a published config.json does not name the number
DEFAULT_SYSTEM = "You are a helpful assistant."

_PICTURE = re.compile(f"{IMAGE_START}(.*?){IMAGE_END}", re.DOTALL)

CHAT_TEMPLATE = """\
{%- set pictures = namespace(count=0) -%}
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
<|im_start|>system
SYSTEM<|im_end|>
{% endif -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set pictures.count = pictures.count + 1 -%}
Picture {{ pictures.count }}: <img></img>
{% elif part['type'] == 'text' -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}""".replace("SYSTEM", DEFAULT_SYSTEM)
"""ChatML with numbered pictures, as the model was trained."""


class QwenVLImageProcessor(BaseImageProcessor):
    """Pictures to pixels: RGB, stretched to a square (bicubic), scaled, normalised.

    The proportions of a picture are not kept and its EXIF orientation is not applied: that is
    how the published weights were trained.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (the base class's form)

    def __init__(
        self,
        image_size: int = 448,
        image_mean: Sequence[float] = IMAGE_MEAN,
        image_std: Sequence[float] = IMAGE_STD,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size  # pixels
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def preprocess(
        self,
        images: Image.Image | Sequence[Image.Image],
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Pixels of one or more pictures.

        Returns:
            `pixel_values`, float32 [N, 3, S, S], S = `image_size`.
        """
        pictures = [images] if isinstance(images, Image.Image) else images
        pixel_values = torch.stack([self._pixels(picture) for picture in pictures])
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    def _pixels(self, picture: Image.Image) -> Tensor:
        """float32 [3, S, S] of one picture."""
        side = (self.image_size, self.image_size)
        square = picture.convert("RGB").resize(side, Image.Resampling.BICUBIC)
        channels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
        mean = torch.tensor(self.image_mean).view(3, 1, 1)
        std = torch.tensor(self.image_std).view(3, 1, 1)
        return (channels - mean) / std


class QwenVLProcessor(ProcessorMixin):
    """Tokenizer, image processor and the layout's constants of one Qwen-VL checkpoint."""

    def __init__(
        self,
        tokenizer: QwenVLTokenizer,
        image_processor: QwenVLImageProcessor,
        n_queries: int = PUBLISHED_IMAGE_TOKENS,
        default_system: str | None = DEFAULT_SYSTEM,
    ) -> None:
        """Put the two together.

        Args:
            tokenizer: of the checkpoint.
            image_processor: of the checkpoint.
            n_queries: image tokens that a picture becomes.
            default_system: what a conversation without a system turn begins with.
        """
        super().__init__(tokenizer, image_processor, chat_template=CHAT_TEMPLATE)
        self.n_queries = n_queries
        self.default_system = default_system

    def __call__(
        self,
        images: Image.Image | Sequence[Any] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str | None = None,
        padding: bool | str = False,
        **others: Any,
    ) -> BatchFeature:
        """Inputs of the model for texts that the caller trusts: their control tokens are read.

        What users wrote goes through `vltrain.chat` instead, where no text opens a turn.

        Args:
            images: the pictures of all texts in order, or a list of them for each text; opened
                ones, paths or URLs.
            text: one or more; each picture has its place as `<img></img>`, and what stands
                between the tags does not count.
            return_tensors: "pt", or None for lists.
            padding: as tokenizers take it.
            others: must be empty; a text is never cut, for a cut could go through a picture.

        Returns:
            `input_ids` and `attention_mask`, int64 [B, L], and with pictures `pixel_values`,
            float32 [N, 3, S, S].

        Raises:
            TypeError: a keyword that has no meaning here.
            ValueError: no text and no pictures, or texts have not as many places as there are
                pictures.
        """
        if unknown := sorted(key for key, value in others.items() if value is not None):
            raise TypeError(f"{type(self).__name__} takes no {', '.join(unknown)}")
        pictures = _flat(images)
        values: dict[str, Any] = {}
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            places = sum(len(_PICTURE.findall(one)) for one in texts)
            if places != len(pictures):
                raise ValueError(f"text has {places} <img></img>, images has {len(pictures)}")
            rows = {"input_ids": [self._trusted_ids(one) for one in texts]}
            values |= self.tokenizer.pad(rows, padding=padding, return_attention_mask=True)
        elif not pictures:
            raise ValueError("give text, images or both")
        if pictures:
            opened = self.image_processor.fetch_images(pictures)
            values |= self.image_processor(images=opened, return_tensors="pt")
        return BatchFeature(values, tensor_type=return_tensors)

    def _trusted_ids(self, text: str) -> list[int]:
        """The ids of a text of which every special token is read, its pictures laid out."""
        ids: list[int] = []
        for number, piece in enumerate(_PICTURE.split(text)):  # by turns text and path
            if number % 2:
                ids += self.image_ids(piece)
            else:
                ids += self.tokenizer.text_ids(piece, split_special_tokens=False)
        return ids

    @property
    def model_input_names(self) -> list[str]:
        """What `__call__` gives."""
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **options: Any
    ) -> "QwenVLProcessor":
        """The processor of a folder, or of a name on the hub; what `AutoProcessor` calls.

        Args:
            pretrained_model_name_or_path: in the published layout, or in that of `transformers`.
            options: `revision` is the hub's; others have no meaning here.

        Raises:
            VltrainError: as `resolve_model` and `processor_from_folder`.
        """
        name, revision = str(pretrained_model_name_or_path), options.get("revision")
        if revision is not None and not Path(name).is_dir():
            name = f"{name}@{revision}"
        return processor_from_folder(resolve_model(name, weights=False).path)

    @property
    def picture_side(self) -> int:
        """Pixels a side that every picture is stretched to."""
        return self.image_processor.image_size

    @property
    def turn_start_id(self) -> int:
        """The id of `<|im_start|>`."""
        return self.tokenizer.convert_tokens_to_ids(TURN_START)

    @property
    def turn_end_id(self) -> int:
        """The id of `<|im_end|>`, with which an answer ends."""
        return self.tokenizer.convert_tokens_to_ids(TURN_END)

    @property
    def newline_id(self) -> int:
        """The id of a line end."""
        return self.tokenizer.convert_tokens_to_ids("\n")

    @property
    def pad_id(self) -> int:
        """The id of `<|endoftext|>`, which fills up a batch."""
        return self.tokenizer.convert_tokens_to_ids(END_OF_TEXT)

    @property
    def image_pad_id(self) -> int:
        """The id of `<imgpad>`, whose place an image token takes."""
        return self.tokenizer.convert_tokens_to_ids(IMAGE_PAD)

    @property
    def fingerprint(self) -> str:
        """Of the vocabulary and of the layout; whoever has the same gets the same ids."""
        layout = (self.n_queries, self.default_system)
        return f"qwen_vl {self.tokenizer.vocabulary_hash} {layout}"

    @property
    def pixels_fingerprint(self) -> str:
        """Of the image processor; whoever has the same gets the same pixels."""
        processor = self.image_processor
        values = (processor.image_size, processor.image_mean, processor.image_std)
        return f"qwen_vl bicubic {values}"

    def text_ids(self, text: str) -> list[int]:
        """The ids of what somebody wrote.

        NFC-normalised; of the special tokens only the tags of boxes and `</img>` are read,
        all others stay text, so that no text can open or close a turn.
        """
        return self.tokenizer.text_ids(text)

    def image_ids(self, source: str) -> list[int]:
        """`<img>`, one `<imgpad>` per image token, `</img>`; the file is not read."""
        marks = (IMAGE_START, IMAGE_PAD, IMAGE_END)
        start, pad, end = self.tokenizer.convert_tokens_to_ids(list(marks))
        return [start, *[pad] * self.n_queries, end]

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write vocabulary, tokenizer and image processor; the rest stands in the config.json of
        the model, which its own `save_pretrained` writes."""
        self.tokenizer.save_pretrained(save_directory)
        self.image_processor.save_pretrained(save_directory)


def _flat(images: Any) -> list[Any]:
    """One picture, a list of them, or lists of them for each text, as one list."""
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return [picture for one in images for picture in _flat(one)]
    return [images]


def processor_from_folder(folder: Path) -> QwenVLProcessor:
    """The processor of a checkpoint in the published layout, or in that of `transformers`.

    `config.json` is read as plain JSON: its `auto_map` would make the Auto classes ask
    whether to run the folder's own code.

    Raises:
        VltrainError: `config.json` or `qwen.tiktoken` is missing or not readable, or the
            config has no `visual` section (a text-only Qwen).
    """
    vision = _vision_section(folder / "config.json")
    return QwenVLProcessor(
        tokenizer=QwenVLTokenizer(folder / VOCAB_FILE),
        image_processor=QwenVLImageProcessor(image_size=vision.get("image_size", 448)),
        n_queries=vision.get("n_queries", PUBLISHED_IMAGE_TOKENS),
    )


def _vision_section(config_file: Path) -> dict[str, Any]:
    fix = "name a folder with a published Qwen-VL, or one that vltrain wrote"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = "there is no config.json"
        raise VltrainError.at(str(config_file.parent), what=what, fix=fix) from error
    except ValueError as error:
        raise VltrainError.at(str(config_file), what=f"is not JSON: {error}", fix=fix) from error
    vision = config.get("visual") if isinstance(config, dict) else None
    if not isinstance(vision, dict):
        what = "has no `visual` section, so this is no Qwen-VL"
        raise VltrainError.at(str(config_file), what=what, fix=fix)
    return vision
