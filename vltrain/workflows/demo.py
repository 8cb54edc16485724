"""The demo: write its model and data, and score what base and merged model answer.

What `make demo` does between the two is what a user does with a model and data of their own.
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import vltrain.demo
from vltrain.data.grounding import draw_boxes, parse_boxes
from vltrain.data.images import open_image
from vltrain.data.records import Record
from vltrain.data.sources import read_records
from vltrain.demo.questions import KINDS, Kind, kinds_of
from vltrain.demo.splits import Split, make_splits
from vltrain.errors import VltrainError
from vltrain.evaluation.metrics import box_overlaps, is_exact

BASE = Path(vltrain.demo.__file__).parent / "base"

MODEL, IMAGES = "model", "images"
TRAIN, HELD_OUT = "train.json", "heldout.json"
RUN, MERGED = "run", "merged"
BASE_ANSWERS, MERGED_ANSWERS = "base_answers.jsonl", "merged_answers.jsonl"
BOXES = "boxes.png"
CHAT_BOXES = "answer.png"  # which the conversation at the end of `make demo` saves
OWN_NAMES = {
    *(MODEL, IMAGES, TRAIN, HELD_OUT, RUN, MERGED, BASE_ANSWERS, MERGED_ANSWERS, BOXES, CHAT_BOXES),
    *(f"{name}.partial" for name in (TRAIN, BASE_ANSWERS, MERGED_ANSWERS)),
}
"""All that a demo's folder ever holds; anything else in it is somebody's own."""

SHEET_COLUMNS, SHEET_ROWS = 3, 2
SHEET_TILE = 336  # pixels


@dataclass(frozen=True)
class Scored:
    """A held-out question, what base and merged model answered, and how right they were."""

    kind: Kind
    record: Record
    turn: int
    expected: str
    before: str
    after: str

    @property
    def question(self) -> str:
        """What was asked, without the lines that bring pictures."""
        lines = self.record.value["conversations"][self.turn - 1]["value"].split("\n")
        return lines[-1]

    def score(self, answer: str) -> float:
        """IoU for a box, else 1 for the expected words and 0 for others."""
        overlaps = box_overlaps(answer, self.expected)
        return fmean(overlaps) if overlaps else float(is_exact(answer, self.expected))


def write_demo(folder: Path, console: Console | None = None) -> None:
    """Write the tiny base, and pictures and questions to train and to ask.

    The same files every time. A folder that already holds them is left as it is; one in which
    writing was cut off is completed.

    Args:
        folder: gets model/, train.json, heldout.json and images/.
        console: where it says what it did; default stdout.

    Raises:
        VltrainError: the folder holds something that is no part of a demo.
    """
    console = console or Console()
    if (folder / TRAIN).is_file():
        console.print(f"the demo is in {folder} already")
        return
    foreign = sorted(path.name for path in folder.glob("*") if path.name not in OWN_NAMES)
    if foreign or folder.is_file():
        what = f"holds {foreign[0]}, which is no part of a demo" if foreign else "is a file"
        raise VltrainError.at(str(folder), what=what, fix="name a folder that is new or empty")
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    shutil.copytree(BASE, folder / MODEL, dirs_exist_ok=True)
    train, held_out = make_splits()
    for split in (train, held_out):
        _write_pictures(split, folder)
    _write_json(folder / HELD_OUT, held_out)
    draft = folder / f"{TRAIN}.partial"
    _write_json(draft, train)
    draft.rename(folder / TRAIN)  # last: where train.json is, everything is
    console.print(
        f"{folder}: a base in {MODEL}/, {len(train.records)} conversations to train on, "
        f"{len(held_out.records)} held out"
    )


def _write_pictures(split: Split, folder: Path) -> None:
    for pictures in split.pictures.values():
        for picture in pictures:
            picture.scene.image.save(folder / picture.file, compress_level=1)


def _write_json(path: Path, split: Split) -> None:
    path.write_text(json.dumps(split.records, ensure_ascii=False, indent=1), encoding="utf-8")


def score_demo(folder: Path, console: Console | None = None) -> None:
    """Show a few answers and the scores before and after training; draw answered boxes.

    Args:
        folder: a demo's, with base_answers.jsonl and merged_answers.jsonl as `vltrain chat`
            writes them about heldout.json; gets boxes.png.
        console: where tables go; default stdout.

    Raises:
        VltrainError: the answers are missing, or are not those to heldout.json.
    """
    console = console or Console()
    scored = read_scored(folder)
    console.print(example_table(scored))
    console.print(score_table(scored))
    texts = [item for item in scored if item.kind != "point"]
    wrong_before = sum(1 - item.score(item.before) for item in texts)
    wrong_after = sum(1 - item.score(item.after) for item in texts)
    console.print(
        f"{wrong_before:.0f} of {len(texts)} texts were wrong before, {wrong_after:.0f} are after: "
        f"{1 - wrong_after / max(1, wrong_before):.0%} fewer"
    )
    box_sheet(scored).save(folder / BOXES)
    console.print(f"boxes that the merged model answered: {folder / BOXES}")


def read_scored(folder: Path) -> list[Scored]:
    """Every held-out question with both models' answers, in the file's order."""
    records = read_records(folder / HELD_OUT)
    before, after = (_read_answers(folder / name) for name in (BASE_ANSWERS, MERGED_ANSWERS))
    scored = []
    for record in records:
        turns = record.value["conversations"]
        for number, kind in enumerate(kinds_of(record.value["id"])):
            turn = 2 * number + 1
            key = (record.index, turn)
            if key not in before or key not in after:
                raise VltrainError.at(
                    str(folder),
                    what=f"the answers to {HELD_OUT}#{record.index} are missing",
                    fix=f"ask both models again: vltrain chat MODEL --input {folder / HELD_OUT}",
                )
            expected = turns[turn]["value"]
            scored.append(Scored(kind, record, turn, expected, before[key], after[key]))
    return scored


def _read_answers(path: Path) -> dict[tuple[int, int], str]:
    """The answers of a JSONL file by record and turn."""
    if not path.is_file():
        raise VltrainError.at(
            str(path),
            what="the file with a model's answers is missing",
            fix=f"vltrain chat MODEL --input {path.parent / HELD_OUT} --output {path}",
        )
    # Not splitlines(): an answer may hold a line separator that JSON leaves as it is.
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    return {(row["record"], row["turn"]): row["answer"] for row in rows}


def example_table(scored: Sequence[Scored]) -> Table:
    """One question of each kind that training turned from wrong to right, where there is one."""
    table = Table(title="a few answers to pictures never seen")
    for column in ("question", "right", "base", "merged"):
        table.add_column(column, overflow="fold")
    for kind in KINDS:
        of_kind = [item for item in scored if item.kind == kind]
        if of_kind:
            item = max(of_kind, key=lambda item: item.score(item.after) - item.score(item.before))
            cells = (item.question, item.expected, item.before, item.after)
            table.add_row(*(escape(cell) for cell in cells))
    return table


def score_table(scored: Sequence[Scored]) -> Table:
    """Scores of each kind of question before and after training."""
    table = Table(title="scores on pictures never seen")
    for column in ("question", "measure", "asked", "before", "after"):
        left = column in ("question", "measure")
        table.add_column(column, justify="left" if left else "right")
    for kind in KINDS:
        of_kind = [item for item in scored if item.kind == kind]
        before = fmean(item.score(item.before) for item in of_kind) if of_kind else 0.0
        after = fmean(item.score(item.after) for item in of_kind) if of_kind else 0.0
        if kind == "point":
            cells = ("mean IoU", str(len(of_kind)), f"{before:.2f}", f"{after:.2f}")
        else:
            cells = ("exact", str(len(of_kind)), f"{before:.1%}", f"{after:.1%}")
        table.add_row(kind, *cells)
    return table


def box_sheet(scored: Sequence[Scored]) -> Image.Image:
    """Held-out pictures side by side, with the boxes drawn that the merged model answered.

    Pictures with the most signs come first: there the box shows which one was found.
    """
    pointed = [item for item in scored if item.kind == "point" and parse_boxes(item.after)[0]]
    several = [item for item in pointed if "several" in kinds_of(item.record.value["id"])]
    chosen = (several + [item for item in pointed if item not in several])[
        : SHEET_COLUMNS * SHEET_ROWS
    ]
    sheet = Image.new("RGB", (SHEET_COLUMNS * SHEET_TILE, SHEET_ROWS * SHEET_TILE), "white")
    for place, item in enumerate(chosen):
        tile = _picture_of(item).resize((SHEET_TILE, SHEET_TILE), Image.Resampling.BICUBIC)
        row, column = divmod(place, SHEET_COLUMNS)
        sheet.paste(draw_boxes(tile, item.after), (column * SHEET_TILE, row * SHEET_TILE))
    return sheet


def _picture_of(item: Scored) -> Image.Image:
    """The picture that a question with a box is about: the first of its record."""
    source = re.search(r"<img>(.*?)</img>", item.record.value["conversations"][0]["value"])
    assert source is not None, "the demo's records begin with a picture"
    return open_image(item.record.file.parent / source[1], where=item.record.name)
