"""One answer at a time: `vltrain.chat` and `vltrain.complete`, and what the terminal does with
them.

A conversation is a list of exchanges, each a user's turn and the assistant's. What a model said
is shown to it again as plain text: a picture's tag in an answer opens no file.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from vltrain.data.conversation import ImagePart, Part, TextPart, Turn
from vltrain.data.encoding import Processor, plain_ids, prompt_ids, turn_ids
from vltrain.data.faults import error_of
from vltrain.data.grounding import draw_boxes, parse_regions
from vltrain.data.markup import joined, parts_of
from vltrain.data.pictures import Pictures, pictures_at
from vltrain.errors import VltrainError
from vltrain.evaluation.compiled import CompiledSteps
from vltrain.evaluation.generation import Decoding, Prompt, say
from vltrain.models.loading import foreign_id_error

MAX_WINDOW_SIZE = 6144  # tokens; what a published generation_config.json says

Exchange = tuple[Turn, Turn]
Listener = Callable[[str], None]
Picture = str | Path | Image.Image


def chat(
    model: PreTrainedModel,
    processor: Any,
    query: str | Sequence[Mapping[str, Any]],
    history: Sequence[tuple[str, str]] | None = None,
    images: Sequence[Picture] = (),
    *,
    system: str | None = None,
    max_window_size: int = MAX_WINDOW_SIZE,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    listener: Listener | None = None,
    image_root: Path | None = None,
    allow_urls: bool = False,
    steps: CompiledSteps | None = None,
) -> tuple[str, list[tuple[str, str]]]:
    """A model's answer, and the history with it, as the original's `model.chat` gives them.

    Args:
        model, processor: of one checkpoint, as `load_model` and `load_processor` give them.
        query: what is asked: text with its pictures as `<img>path</img>`, or a list as
            `tokenizer.from_list_format` takes it. Control tokens in it are plain text.
        history: what was said, as earlier calls gave it back; None: nothing.
        images: more pictures, by path or as they are, each put before the query as
            `Picture N: <img>…</img>`; N counts the pictures of the whole conversation. One
            without a path stands in the history as a `data:` URI.
        system: what the system turn says; None: the model's own.
        max_window_size: tokens that the system turn and the history may take, less one. Older
            exchanges are left out, and their pictures with them.
        max_new_tokens: tokens after which the answer is cut; it ends by itself at `<|im_end|>`.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn by torch's
            random state.
        top_p: the likeliest tokens that together have this probability are drawn from.
        listener: gets the answer piece by piece while it is made.
        image_root: where relative paths are looked up before the working directory.
        allow_urls: whether pictures that are http(s) URLs are downloaded.
        steps: of this model and kept from call to call, where its step of decoding is to be
            compiled.

    Returns:
        The answer, boxes as the model wrote them, and a new history that ends with it.

    Raises:
        VltrainError: a picture is missing or broken, a tag of one is not closed, or a number
            means nothing.
    """
    decoding = Decoding(max_new_tokens, temperature, top_p)
    said = list(history or ())
    text = query if isinstance(query, str) else processor.tokenizer.from_list_format(query)
    exchanges = [(user_turn(asked), answer_turn(answer)) for asked, answer in said]
    shown = sum(len(picture_sources(asked.parts)) for asked, _ in exchanges)
    text = with_pictures(text, [source_of(image) for image in images], first=shown + 1)
    kept = within_window(exchanges, processor, system, max_window_size)
    turns = [*system_turn(system), *(turn for pair in kept for turn in pair), user_turn(text)]
    prompt = chat_prompt(turns, processor, pictures_at(image_root, allow_urls))
    refuse_foreign_ids(prompt, model)
    answer = say(model, processor, prompt, decoding, listener=listener, steps=steps)
    return answer, [*said, (text, answer)]


def complete(
    model: PreTrainedModel,
    processor: Any,
    text: str,
    images: Sequence[Picture] = (),
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    listener: Listener | None = None,
    image_root: Path | None = None,
    allow_urls: bool = False,
) -> str:
    """How a base that was not tuned to chat goes on with a text, up to `<|endoftext|>`.

    "Generate the caption in English with grounding:" behind a picture asks Qwen-VL for a caption
    with boxes.

    Args:
        text: what comes first, with its pictures as `<img>path</img>`.
        images: more pictures, by path or as they are, put before the text as `<img>…</img>`.
        model, processor, max_new_tokens, temperature, top_p, listener, image_root, allow_urls:
            as for `chat`.

    Raises:
        VltrainError: as for `chat`.
    """
    decoding = Decoding(max_new_tokens, temperature, top_p)
    marks = "".join(f"<img>{source_of(image)}</img>" for image in images)
    parts = user_turn(marks + text).parts
    if not parts:
        raise VltrainError.at("text", what="it is empty", fix="write what comes first")
    prompt = plain_prompt(parts, processor, pictures_at(image_root, allow_urls))
    refuse_foreign_ids(prompt, model)
    return say(model, processor, prompt, decoding, ends=(processor.pad_id,), listener=listener)


def draw_bbox_on_latest_picture(
    response: str,
    history: Sequence[tuple[str, str]],
    *,
    image_root: Path | None = None,
    allow_urls: bool = False,
) -> Image.Image | None:
    """The last picture of a conversation with the boxes of an answer on it, named; what the
    original's `tokenizer.draw_bbox_on_latest_picture` gives.

    Args:
        response: an answer, as `chat` gives it.
        history: what was said, as `chat` gives it; a picture that only an answer names is none.
        image_root, allow_urls: as for `chat`.

    Returns:
        A new picture, or None where nobody showed one or the answer has no box.

    Raises:
        VltrainError: the picture is missing or broken, or a tag of one is not closed.
    """
    source = latest_picture(history)
    if source is None or not parse_regions(response)[0]:
        return None
    return draw_boxes(pictures_at(image_root, allow_urls).open(source), response)


def latest_picture(history: Sequence[tuple[str, str]]) -> str | None:
    """The place of the picture that a user showed last; None where there is none."""
    shown = [source for query, _ in history for source in picture_sources(user_turn(query).parts)]
    return shown[-1] if shown else None


def user_turn(text: str) -> Turn:
    """What a user says, taken apart at its pictures.

    Raises:
        VltrainError: a picture's tag is not closed.
    """
    parts, faults = parts_of(text, "the query")
    unreadable = [fault for fault in faults if fault.refused(lenient=True)]
    if unreadable:
        raise error_of(unreadable, "query")
    return Turn("user", parts)


def answer_turn(text: str) -> Turn:
    """What an assistant said, as text alone."""
    return Turn("assistant", joined([TextPart(text)]))


def system_turn(system: str | None) -> tuple[Turn, ...]:
    """The system turn that somebody asks for; nothing where it is the model's own."""
    return () if system is None else (Turn("system", joined([TextPart(system)])),)


def picture_sources(parts: Sequence[Part]) -> list[str]:
    """The places of the pictures among parts."""
    return [part.source for part in parts if isinstance(part, ImagePart)]


def with_pictures(text: str, sources: Sequence[str], *, first: int) -> str:
    """A query behind its pictures, each in a line of its own, numbered from `first`."""
    lines = (f"Picture {n}: <img>{source}</img>\n" for n, source in enumerate(sources, first))
    return "".join(lines) + text


def source_of(picture: Picture) -> str:
    """A picture's path, or what stands for one that has none: a `data:` URI of it as PNG."""
    if not isinstance(picture, Image.Image):
        return str(picture)
    file = io.BytesIO()
    picture.convert("RGB").save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def within_window(
    exchanges: Sequence[Exchange],
    processor: Processor,
    system: str | None,
    max_window_size: int,
) -> list[Exchange]:
    """The latest exchanges that have, with the system turn, fewer tokens than the window.

    Image tokens are counted; the query, and the line end behind the system turn, are not.
    """
    wanted = processor.default_system if system is None else system
    turns = [] if wanted is None else system_turn(wanted)
    size = sum(len(turn_ids(turn, processor)) - 1 for turn in turns)
    kept: list[Exchange] = []
    for exchange in reversed(exchanges):
        size += sum(len(turn_ids(turn, processor)) for turn in exchange)
        if size >= max_window_size:
            break
        kept.insert(0, exchange)
    return kept


def chat_prompt(
    turns: Sequence[Turn],
    processor: Any,
    pictures: Pictures,
    data_file: Path | None = None,
    where: str | None = None,
) -> Prompt:
    """Turns as ids that ask for the assistant's next; pixels are read when they are asked for."""
    sources = [source for turn in turns for source in picture_sources(turn.parts)]
    load = pixel_loader(sources, processor, pictures, data_file, where)
    return Prompt(prompt_ids(turns, processor), load)


def plain_prompt(parts: Sequence[Part], processor: Any, pictures: Pictures) -> Prompt:
    """Text and pictures as ids, without turns."""
    load = pixel_loader(picture_sources(parts), processor, pictures)
    return Prompt(plain_ids(parts, processor), load)


def pixel_loader(
    sources: Sequence[str],
    processor: Any,
    pictures: Pictures,
    data_file: Path | None = None,
    where: str | None = None,
) -> Callable[[], Tensor] | None:
    """What opens pictures and gives their pixels; None where there are none."""
    if not sources:
        return None

    def load_pixels() -> Tensor:
        side = processor.picture_side  # as in training, so that it sees what it learned from
        images = [pictures.open(s, data_file, where=where, side=side) for s in sources]
        return processor.image_processor(images=images, return_tensors="pt")["pixel_values"]

    return load_pixels


def refuse_foreign_ids(prompt: Prompt, model: PreTrainedModel, where: str = "query") -> None:
    """Raise VltrainError where a prompt has an id that the embedding matrix has no row for."""
    rows = model.get_input_embeddings().weight.size(0)
    largest = max(prompt.input_ids, default=0)
    if largest >= rows:
        raise foreign_id_error(where, largest, rows, Path(model.name_or_path))
