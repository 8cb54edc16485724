"""Questions of a file -> answers of a model: `vltrain chat MODEL --input --output`.

Answers are collected in OUTPUT.partial, which says in its first line what they answer, and get
their name when all are there. A run that was cut off goes on behind its last answer.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vltrain.data.checks import check_files
from vltrain.data.conversation import Turn
from vltrain.data.encoding import Processor
from vltrain.data.formats import Format, conversation_from_record, read_turns
from vltrain.data.pictures import LOCAL_PICTURES, Pictures
from vltrain.data.records import Record
from vltrain.data.sources import read_records
from vltrain.errors import VltrainError
from vltrain.evaluation.generation import Decoding, Prompt, answer_batches
from vltrain.models.hub import resolve_model
from vltrain.training.files import write_whole
from vltrain.workflows.answering import load_for_answers
from vltrain.workflows.bars import counting_bar
from vltrain.workflows.dialogue import chat_prompt, refuse_foreign_ids
from vltrain.workflows.inspect import print_report, refuse_errors
from vltrain.workflows.quiet import hide_weight_bars
from vltrain.workflows.talk import SURROGATES

GREEDY = Decoding()  # the likeliest token each time


@dataclass(frozen=True)
class Question:
    """An assistant's turn that a model is to say, and all that was said before it."""

    record: Record
    turn: int  # among the record's turns as they stand, from 0
    expected: str  # what the file has there
    before: tuple[Turn, ...]

    def answered(self, answer: str, asked: Path) -> dict[str, Any]:
        """The line of the output file; it names the file where `asked` is a folder of them."""
        shard = {} if self.record.file == asked else {"file": str(self.record.file)}
        return {
            **shard,
            "record": self.record.index,
            "turn": self.turn,
            "id": self.record.value.get("id"),
            "answer": answer,
            "expected": self.expected,
        }


def answer_file(
    model: str,
    questions_file: Path,
    output: Path,
    *,
    adapter: Path | None = None,
    batch_size: int = 32,
    decoding: Decoding = GREEDY,
    seed: int = 0,
    format: Format = "auto",
    pictures: Pictures = LOCAL_PICTURES,
    console: Console | None = None,
) -> None:
    """Answer every assistant turn of a data file and write one JSON object for each.

    Earlier turns are shown as the file has them, not as the model answered them.

    Args:
        model: a folder of a base, a merged model or an adapter, or a name on the hub.
        questions_file: conversations, as `sources.scan_records` takes them; what an assistant
            says in them may be empty where nothing is expected.
        output: JSONL to write; an older file of that name is replaced once all is answered.
        adapter: the folder of an adapter to put beside the model.
        batch_size: questions answered side by side.
        decoding: how tokens are chosen and how many there may be.
        seed: of what is drawn. The answers of a run that was cut off and goes on are other ones
            than those of one that was not, where they are drawn.
        format: how records are read; "auto" tells by the content of each.
        pictures: where pictures are looked up.
        console: where progress is shown; default stderr.

    Raises:
        VltrainError: all faults of the file and its pictures, before the model is loaded.
    """
    console = console or Console(stderr=True)
    hide_weight_bars()
    questions = read_questions(questions_file, pictures, console, format=format)
    folder = resolve_model(model).path
    task = task_of(questions, format, pictures, adapter or folder, decoding, seed)
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = output.with_name(f"{output.name}.partial")
    kept = kept_answers(draft, task, questions)
    if kept:
        console.print(f"going on behind {len(kept)} answers of {draft}", soft_wrap=True)
    network, processor = load_for_answers(folder, adapter)
    prompts = [prompt_of(q, processor, pictures) for q in questions[len(kept) :]]
    for prompt, question in zip(prompts, questions[len(kept) :], strict=True):
        refuse_foreign_ids(prompt, network, question.record.name)
    answers = answer_batches(network, processor, prompts, batch_size=batch_size, decoding=decoding)
    begin_draft(draft, task, kept)
    torch.manual_seed(seed)
    answered = (
        question.answered(answer, questions_file)
        for question, answer in zip(questions[len(kept) :], answers, strict=True)
    )
    append_answers(draft, answered, console, done=len(kept), total=len(questions))
    write_without_first_line(draft, output)
    console.print(f"done: {len(questions)} answers in {output}", soft_wrap=True)


def task_of(
    questions: Sequence[Question],
    format: Format,
    pictures: Pictures,
    model: Path,
    decoding: Decoding,
    seed: int,
) -> dict[str, Any]:
    """All that answers follow from: where one thing is another, a run begins anew."""
    return {
        "questions": content_hash(question.record for question in questions),
        "format": format,
        "image_root": None if pictures.image_root is None else str(pictures.image_root),
        "model": fingerprint(model),
        "decoding": asdict(decoding) | {"seed": seed},
    }


def append_answers(
    draft: Path, answered: Iterable[dict[str, Any]], console: Console, *, done: int, total: int
) -> None:
    """Write answers behind those that are there, each as soon as it is made.

    Args:
        done, total: answers that are there, and that will be.
    """
    opened = draft.open("a", encoding="utf-8", errors=SURROGATES)
    with opened as file, counting_bar(console) as bar:
        shown = bar.add_task("answering", total=total, completed=done)
        for answer in answered:
            file.write(_line(answer))
            file.flush()
            bar.advance(shown)


def read_questions(
    file: Path, pictures: Pictures, console: Console, *, format: Format = "auto"
) -> list[Question]:
    """Every assistant turn of a file, in its order.

    An assistant turn that opens a record is asked for too, behind nothing but the system turn;
    to the turns after it it is not shown, as it is not in training.

    Raises:
        VltrainError: something keeps records from being read, missing and broken pictures
            included (`console` is told all of it); or there is nothing to answer.
    """
    report = check_files([file], pictures=pictures, labels="reference", format=format, decode=False)
    if report.errors:
        print_report(replace(report, findings=report.errors), console)
    refuse_errors(report, [file], undone="asked")
    questions = []
    for record in read_records(file):
        questions += _questions_of(record, pictures, format)
    if not questions:
        raise VltrainError.at(
            str(file),
            what="no assistant turn is in it, so there is nothing to answer",
            fix='add {"from": "assistant", "value": ""} where an answer is wanted',
        )
    return questions


def _questions_of(record: Record, pictures: Pictures, format: Format) -> list[Question]:
    """The assistant turns of one record, the first of all included."""
    measure = pictures.measure(record.file)
    conversation = conversation_from_record(
        record.value, lenient=True, where=record.name, format=format, image_size=measure
    )
    turns, _ = read_turns(record.value, format=format, image_size=measure)
    questions = []
    for turn in turns:
        if turn.role == "assistant":
            before = tuple(t for t in conversation.turns if _position(t) < _position(turn))
            questions.append(Question(record, _position(turn), turn.written, before))
    return questions


def _position(turn: Turn) -> int:
    """A turn's place in the record's list; a system text beside the list comes first."""
    return -1 if turn.position is None else turn.position


def prompt_of(question: Question, processor: Processor, pictures: Pictures) -> Prompt:
    """A question as ids; its pictures are opened when their pixels are asked for."""
    record = question.record
    return chat_prompt(question.before, processor, pictures, record.file, record.name)


def content_hash(records: Iterable[Record]) -> str:
    """What tells one set of records from another, in whatever files they are."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(f"{record.index} {json.dumps(record.value)}\n".encode())
    return digest.hexdigest()


def fingerprint(folder: Path) -> dict[str, Any]:
    """What tells one set of weights from another without reading them."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    stats = {file.name: file.stat() for file in sorted(files)}
    return {
        "folder": str(folder.resolve()),
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }


def kept_answers(
    draft: Path, task: dict[str, Any], questions: Sequence[Question]
) -> list[dict[str, Any]]:
    """The answers that a run of the same task left behind, in the order of the questions.

    A last line that was cut off is dropped. A draft of another task counts for nothing.
    """
    if not draft.is_file():
        return []
    lines = draft.read_text(encoding="utf-8").split("\n")[:-1]  # a whole line ends with a newline
    if not lines or lines[0] != _line({"task": task}).rstrip("\n"):
        return []
    answers = [json.loads(line) for line in lines[1:]]
    asked = [(question.record.index, question.turn) for question in questions]
    assert [(row["record"], row["turn"]) for row in answers] == asked[: len(answers)]
    return answers


def begin_draft(draft: Path, task: dict[str, Any], kept: Sequence[dict[str, Any]]) -> None:
    """Write the draft's first line and what is kept, beside and renamed: no answer is lost."""
    text = "".join(_line(row) for row in ({"task": task}, *kept))
    write_whole(draft, text, errors=SURROGATES)


def write_without_first_line(draft: Path, output: Path) -> None:
    """Give the answers their name, without the line about the task."""
    answers = draft.read_text(encoding="utf-8").partition("\n")[2]
    whole = output.with_name(f"{output.name}.whole")
    whole.write_text(answers, encoding="utf-8")
    os.replace(whole, output)
    draft.unlink()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
