"""A conversation as it goes: what was said, the pictures that wait, and how it becomes data."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedModel

from vltrain.data.checks import Checker
from vltrain.data.conversation import ImagePart, Turn
from vltrain.data.faults import Fault, error_of
from vltrain.data.grounding import draw_boxes, parse_regions
from vltrain.data.markup import parts_of
from vltrain.data.pictures import Pictures
from vltrain.data.records import Record
from vltrain.errors import VltrainError
from vltrain.evaluation.compiled import CompiledSteps
from vltrain.evaluation.generation import Decoding, Prompt, say
from vltrain.training.files import write_whole
from vltrain.workflows.dialogue import (
    Exchange,
    Listener,
    answer_turn,
    chat_prompt,
    picture_sources,
    plain_prompt,
    refuse_foreign_ids,
    system_turn,
    with_pictures,
    within_window,
)

SURROGATES = "backslashreplace"
"""Half of a surrogate pair, which JSON can hold and UTF-8 cannot, goes back to its escape."""


@dataclass(frozen=True)
class Manner:
    """How a model is asked."""

    decoding: Decoding
    system: str | None  # None: the model's own
    max_window_size: int  # tokens of the system turn and the exchanges before the question
    completes: bool  # goes on with each text, without turns and without what was said before


@dataclass(frozen=True)
class Asked:
    """A question that is ready to be answered."""

    turn: Turn
    prompt: Prompt
    left_out: int  # exchanges, of the first ones, that the window has no room for


def question_turn(
    text: str, sources: Sequence[str], pictures: Pictures, *, first: int | None
) -> Turn:
    """A question behind its pictures, all of which can be shown.

    Args:
        text: may have pictures of its own, as `<img>path</img>`.
        sources: of the pictures that come before it.
        pictures: where they are looked up.
        first: number of the first of them; None: they are shown without numbers.

    Raises:
        VltrainError: tags that do not pair up, and pictures that are missing or broken, all of
            them.
    """
    marks = "".join(f"<img>{source}</img>" for source in sources)
    written = marks + text if first is None else with_pictures(text, sources, first=first)
    parts, faults = parts_of(written, "it")
    for source in picture_sources(parts):
        faults += pictures.faults(source)
    refused = [fault for fault in faults if fault.grade != "warning"]
    if refused:
        raise error_of(refused, "question")
    return Turn("user", parts)


class Talk:
    """A conversation with one model. A question that fails or is stopped leaves no trace."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        manner: Manner,
        pictures: Pictures,
        steps: CompiledSteps | None = None,
    ) -> None:
        self._model = model
        self._processor = processor
        self._manner = manner
        self._pictures = pictures
        self._steps = steps
        self.exchanges: list[Exchange] = []
        self.waiting: list[str] = []  # sources of pictures that come before the next question

    @property
    def is_compiled(self) -> bool:
        """Whether answers come from a compiled step."""
        return self._steps is not None

    def show(self, source: str) -> None:
        """Put a picture before the next question.

        Raises:
            VltrainError: it is missing or broken.
        """
        faults: list[Fault] = self._pictures.faults(source)
        refused = [fault for fault in faults if fault.grade != "warning"]
        if refused:
            raise error_of(refused, "picture")
        self.waiting.append(source)

    def prepare(self, text: str) -> Asked:
        """A question behind the pictures that wait, as a prompt.

        Raises:
            VltrainError: it cannot be shown, or is longer than the window by itself.
        """
        completes = self._manner.completes
        first = None if completes else 1 + len(self._sources())
        turn = question_turn(text, self.waiting, self._pictures, first=first)
        if completes:
            prompt, left_out = plain_prompt(turn.parts, self._processor, self._pictures), 0
        else:
            prompt, left_out = self._chat_prompt(turn)
        refuse_foreign_ids(prompt, self._model, "question")
        return Asked(turn, prompt, left_out)

    def _chat_prompt(self, turn: Turn) -> tuple[Prompt, int]:
        """A question behind what was said, and how many exchanges have no room."""
        system, window = self._manner.system, self._manner.max_window_size
        alone = chat_prompt([*system_turn(system), turn], self._processor, self._pictures)
        if len(alone.input_ids) >= window:
            shown = len(picture_sources(turn.parts))
            raise VltrainError.at(
                "question",
                what=f"it has {len(alone.input_ids)} tokens with its {shown} pictures and the "
                f"system turn, and the window is {window}",
                fix="ask less at once, or start with a larger --max-window-size",
            )
        kept = within_window(self.exchanges, self._processor, system, window)
        before = [part for exchange in kept for part in exchange]
        turns = [*system_turn(system), *before, turn]
        prompt = chat_prompt(turns, self._processor, self._pictures)
        return prompt, len(self.exchanges) - len(kept)

    def answer(self, asked: Asked, listener: Listener | None = None) -> str:
        """The model's answer, which is then part of the conversation."""
        completes = self._manner.completes
        ends = (self._processor.pad_id,) if completes else None
        decoding = self._manner.decoding
        said = say(
            self._model,
            self._processor,
            asked.prompt,
            decoding,
            ends=ends,
            listener=listener,
            steps=self._steps,
        )
        if completes:
            self.exchanges.clear()
        self.exchanges.append((asked.turn, answer_turn(said)))
        self.waiting.clear()
        return said

    def reset(self) -> None:
        """Forget all."""
        self.exchanges.clear()
        self.waiting.clear()

    def boxes(self) -> Image.Image:
        """The last picture, with the boxes of the last answer drawn on it.

        Raises:
            VltrainError: there is no answer, no box in it, or no picture.
        """
        fix = "ask where something is in a picture"
        if not self.exchanges:
            raise VltrainError.at("/box", what="nothing has been answered yet", fix=fix)
        text = self.exchanges[-1][1].text
        regions, reasons = parse_regions(text)
        if not regions:
            unread = f" that can be read ({'; '.join(reasons)})" if reasons else ""
            raise VltrainError.at("/box", what=f"the last answer has no box{unread}", fix=fix)
        sources = self._sources()
        if not sources:
            raise VltrainError.at("/box", what="no picture has been shown", fix=fix)
        return draw_boxes(self._pictures.open(sources[-1]), text)

    def save(self, file: Path, identity: str) -> tuple[int, str | None]:
        """Add the conversation to a training file, in which `vltrain check` then finds no error.

        A record with the same id is replaced. The record ends before the first exchange that
        `check` would refuse.

        Returns:
            How many exchanges were written, and what is wrong with the next; None: all were.

        Raises:
            VltrainError: there is nothing to write, or the file is no JSON list.
        """
        if self._manner.completes or not self.exchanges:
            raise VltrainError.at(
                "/save", what="there is no conversation", fix="ask something first, in a chat"
            )
        records = _records_of(file)
        checker = Checker(pictures=self._pictures)
        turns = [_saved(turn, file, self._pictures) for turn in system_turn(self._manner.system)]
        written, fault = 0, None
        for exchange in self.exchanges:
            longer = turns + [_saved(turn, file, self._pictures) for turn in exchange]
            record = {"id": identity, "conversations": longer}
            found = checker.examine(Record(file, len(records), record)).findings
            fault = next((f.message for f in found if f.severity == "error"), None)
            if fault is not None:
                break
            turns, written = longer, written + 1
        if not written:
            raise VltrainError.at("/save", what=str(fault), fix="ask in another way; see /reset")
        kept = [r for r in records if not isinstance(r, dict) or r.get("id") != identity]
        kept.append({"id": identity, "conversations": turns})
        text = json.dumps(kept, ensure_ascii=False, indent=1) + "\n"
        write_whole(file, text, errors=SURROGATES)
        return written, fault

    def _sources(self) -> list[str]:
        """The pictures of the whole conversation, in order."""
        return [s for asked, _ in self.exchanges for s in picture_sources(asked.parts)]


def _records_of(file: Path) -> list[Any]:
    """The records of a training file; none where it is not there."""
    fix = "name a file that ends with .json: a new one, or one with a JSON list of records"
    if file.suffix != ".json":
        raise VltrainError.at(str(file), what="is no name of a JSON file", fix=fix)
    if not file.parent.is_dir():
        raise VltrainError.at(str(file), what="its folder is not there", fix="make it first")
    if not file.exists():
        return []
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VltrainError.at(str(file), what=f"cannot be read ({error})", fix=fix) from error
    if not isinstance(records, list):
        raise VltrainError.at(str(file), what="holds no list of records", fix=fix)
    return records


def _saved(turn: Turn, file: Path, pictures: Pictures) -> dict[str, str]:
    """A turn of the training JSON, its pictures found from wherever that is read."""
    parts = tuple(
        replace(part, source=_lasting(part.source, file, pictures))
        if isinstance(part, ImagePart)
        else part
        for part in turn.parts
    )
    return {"from": turn.role, "value": replace(turn, parts=parts).written}


def _lasting(source: str, file: Path, pictures: Pictures) -> str:
    """A picture's path, from the training file where it lies below that, else from the root."""
    place = pictures.locate(source)
    if not isinstance(place, Path) or re.match(r"https?://", source, re.IGNORECASE):
        return source
    whole, folder = place.resolve(), file.parent.resolve()
    return whole.relative_to(folder).as_posix() if whole.is_relative_to(folder) else str(whole)
