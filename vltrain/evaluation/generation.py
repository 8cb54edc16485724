"""Prompts to answers: many, in left-padded batches of similar length, or one as it is said.

Dimension letters: `B` prompts of a batch, `L` tokens, `N` pictures of a batch, `S` pixels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from vltrain.errors import VltrainError
from vltrain.evaluation.compiled import CompiledSteps
from vltrain.evaluation.spoken import SpokenText

WINDOW_BATCHES = 8  # answered before the first of their answers is given: sorting needs a choice


class Decoder(Protocol):
    """What turns ids into text."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, keep_markup: bool) -> str:
        """The text of ids without control tokens, with the tags of boxes."""
        ...


class Speaker(Protocol):
    """What answering needs of a model's processor."""

    tokenizer: Decoder
    turn_start_id: int  # of the next turn, which is not the model's to say
    turn_end_id: int
    pad_id: int  # also what a model says after all there is to say
    image_pad_id: int  # the place of an image token, which nobody can say


@dataclass(frozen=True)
class Prompt:
    """What a model is to go on from."""

    input_ids: Sequence[int]  # with the image tokens of its pictures
    load_pixels: Callable[[], Tensor] | None = None  # float [pictures, 3, S, S]; None: no picture


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen, and how many there may be."""

    max_new_tokens: int = 512
    temperature: float = 0.0  # 0: the likeliest token each time; above, the logits' divisor
    top_p: float = 1.0  # the likeliest tokens that together have this probability are drawn from

    def __post_init__(self) -> None:
        """Raise VltrainError for numbers that mean nothing."""
        faults = []
        if self.max_new_tokens < 1:
            faults.append(f"max_new_tokens is {self.max_new_tokens}, it is at least 1")
        if not 0 <= self.temperature < math.inf:
            faults.append(f"temperature is {self.temperature}, it is 0 or above")
        if not 0 < self.top_p <= 1:
            faults.append(f"top_p is {self.top_p}, it is above 0 and at most 1")
        if self.top_p < 1 and self.temperature == 0:
            faults.append("top_p means nothing at temperature 0, which draws nothing")
        if faults:
            raise VltrainError.at(
                "generation", what="; ".join(faults), fix="write other numbers, or leave them out"
            )


def answer_batches(
    model: PreTrainedModel,
    processor: Speaker,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    decoding: Decoding,
) -> Iterator[str]:
    """The answers, one for each prompt and in their order.

    An answer goes on until the model ends its turn or has said `decoding.max_new_tokens`.
    Pictures are opened batch by batch. Prompts of similar length share a batch, so answers come
    in bursts of `WINDOW_BATCHES` batches.

    Args:
        model: put into eval mode and left there; answers are made where its weights are.
        processor: the model's own.
        prompts: of any lengths.
        batch_size: prompts answered side by side.
        decoding: of each answer. What is drawn follows torch's random state.

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
            texts = _answer(model, processor, batch, decoding)
            answers.update(zip(places, texts, strict=True))
        yield from (answers[place] for place in range(len(part)))


@torch.inference_mode()
def _answer(
    model: PreTrainedModel, processor: Speaker, batch: Sequence[Prompt], decoding: Decoding
) -> list[str]:
    """The answers to one batch."""
    input_ids, attention_mask = left_padded([p.input_ids for p in batch], processor.pad_id)
    pixels = [prompt.load_pixels() for prompt in batch if prompt.load_pixels is not None]
    pictures = {"pixel_values": torch.cat(pixels).to(model.device)} if pixels else {}
    said = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=settings(processor, decoding, turn_ends(processor)),
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


def turn_ends(processor: Speaker) -> tuple[int, ...]:
    """The ids that end an answer: the end of the turn or of all, or the head of another turn."""
    return (processor.turn_end_id, processor.turn_start_id, processor.pad_id)


def settings(processor: Speaker, decoding: Decoding, ends: Sequence[int]) -> GenerationConfig:
    """What `generate` goes by.

    What stands here wins over the checkpoint's own generation settings; for the rest, neutral
    values are named so that theirs do not slip in.
    """
    draws = decoding.temperature > 0
    return GenerationConfig(
        do_sample=draws,
        num_beams=1,
        temperature=decoding.temperature if draws else 1.0,
        top_p=decoding.top_p,
        top_k=0 if draws else 50,  # 50 is what transformers calls unset when nothing is drawn
        repetition_penalty=1.0,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=list(ends),
        pad_token_id=processor.pad_id,
        suppress_tokens=[processor.image_pad_id],
    )


def answer_text(ids: Sequence[int], processor: Speaker, ends: Sequence[int] | None = None) -> str:
    """What was said up to the first of `ends`, by default that of the turn."""
    ends = turn_ends(processor) if ends is None else ends
    length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return said_text(ids[:length], processor)


def said_text(ids: Sequence[int], processor: Speaker) -> str:
    """Ids as the text of an assistant's turn: tags of boxes kept, control tokens left out."""
    return processor.tokenizer.decode(list(ids), skip_special_tokens=True, keep_markup=True)


@torch.no_grad()
def say(
    model: PreTrainedModel,
    processor: Speaker,
    prompt: Prompt,
    decoding: Decoding,
    *,
    ends: Sequence[int] | None = None,
    listener: Callable[[str], None] | None = None,
    steps: CompiledSteps | None = None,
) -> str:
    """The answer to one prompt, piece by piece to a listener and whole at the end.

    Args:
        model: put into eval mode and left there; the answer is made where its weights are.
        processor: the model's own.
        prompt: what the model goes on from.
        decoding: what is drawn follows torch's random state.
        ends: the ids that end it; default `turn_ends`.
        listener: gets each piece of text as soon as its characters are whole; joined, they are
            the answer.
        steps: of this model, where its step of decoding is to be compiled.
    """
    model.eval()
    ends = turn_ends(processor) if ends is None else ends
    ids = torch.tensor([list(prompt.input_ids)], device=model.device)
    pictures = {}
    if prompt.load_pixels is not None:
        pictures["pixel_values"] = prompt.load_pixels().to(model.device)
    streamer = None
    if listener is not None:
        streamer = SpokenText(lambda said: answer_text(said, processor, ends), listener)
    how = settings(processor, decoding, ends)
    cache = {} if steps is None else steps.prepared(how, ids.size(1))
    said = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=how,
        streamer=streamer,
        **cache,
        **pictures,
    )
    return answer_text(said[0, ids.size(1) :].tolist(), processor, ends)
