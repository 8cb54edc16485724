"""Prompts to answers: greedy, in left-padded batches of similar length.

Dimension letters: `B` prompts of a batch, `L` tokens, `N` pictures of a batch, `S` pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

WINDOW_BATCHES = 8  # answered before the first of their answers is given: sorting needs a choice


class Decoder(Protocol):
    """What turns ids into text."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, keep_markup: bool) -> str:
        """The text of ids without control tokens, with the tags of boxes."""
        ...


class Speaker(Protocol):
    """What answering needs of a model's processor."""

    tokenizer: Decoder
    turn_end_id: int
    pad_id: int  # also what a model says after all there is to say
    image_pad_id: int  # the place of an image token, which nobody can say


@dataclass(frozen=True)
class Prompt:
    """What a model is to go on from."""

    input_ids: Sequence[int]  # with the image tokens of its pictures
    load_pixels: Callable[[], Tensor] | None = None  # float [pictures, 3, S, S]; None: no picture


def answer_batches(
    model: PreTrainedModel,
    processor: Speaker,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> Iterator[str]:
    """The answers, one for each prompt and in their order.

    Each token is the likeliest one, until the model ends its turn or has said
    `max_new_tokens`. Pictures are opened batch by batch. Prompts of similar length share a
    batch, so answers come in bursts of `WINDOW_BATCHES` batches.

    Args:
        model: put into eval mode and left there; answers are made where its weights are.
        processor: the model's own.
        prompts: of any lengths.
        batch_size: prompts answered side by side.
        max_new_tokens: of each answer.

    Yields:
        The text an assistant's turn would have: tags of boxes kept, control tokens left out.
    """
    model.eval()
    window = batch_size * WINDOW_BATCHES
    for start in range(0, len(prompts), window):
        part = prompts[start : start + window]
        by_length = sorted(range(len(part)), key=lambda place: len(part[place].input_ids))
        answers: dict[int, str] = {}
        for first in range(0, len(part), batch_size):
            places = by_length[first : first + batch_size]
            batch = [part[place] for place in places]
            texts = _answer(model, processor, batch, max_new_tokens)
            answers.update(zip(places, texts, strict=True))
        yield from (answers[place] for place in range(len(part)))


@torch.inference_mode()
def _answer(
    model: PreTrainedModel, processor: Speaker, batch: Sequence[Prompt], max_new_tokens: int
) -> list[str]:
    """The answers to one batch."""
    input_ids, attention_mask = left_padded([p.input_ids for p in batch], processor.pad_id)
    pixels = [prompt.load_pixels() for prompt in batch if prompt.load_pixels is not None]
    pictures = {"pixel_values": torch.cat(pixels).to(model.device)} if pixels else {}
    said = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=greedy(processor, max_new_tokens),
        **pictures,
    )
    return [answer_text(row, processor) for row in said[:, input_ids.size(1) :].tolist()]


def left_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of ids with their ends in one column, where the model goes on.

    Returns:
        `input_ids` and `attention_mask`, int64 [B, L], L the longest row's length.
    """
    longest = max(map(len, rows))
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def greedy(processor: Speaker, max_new_tokens: int) -> GenerationConfig:
    """The likeliest token each time.

    What stands here wins over the checkpoint's own generation settings; for the rest, neutral
    values are named so that theirs do not slip in.
    """
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=[processor.turn_end_id, processor.pad_id],
        pad_token_id=processor.pad_id,
        suppress_tokens=[processor.image_pad_id],
    )


def answer_text(ids: Sequence[int], processor: Speaker) -> str:
    """What was said up to the end of the turn."""
    ends = (processor.turn_end_id, processor.pad_id)
    length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return processor.tokenizer.decode(
        list(ids[:length]), skip_special_tokens=True, keep_markup=True
    )
