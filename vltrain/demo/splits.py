"""The demo's training and held-out records: real scans, of which no one is on both sides."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vltrain.demo import plans
from vltrain.demo.glyphs import Glyph, scanned_digits
from vltrain.demo.questions import LANGUAGES, Asker, Picture, record
from vltrain.demo.scenes import compose

SEED = 20240607
HELD_OUT_SHARE = 0.25  # of the scans of each digit

# How many pictures of one, two and three signs a split has.
TRAIN_PICTURES = {1: 1000, 2: 800, 3: 400}
HELD_OUT_PICTURES = {1: 150, 2: 110, 3: 60}

# Records of train.json: mostly reading, which is what the base has to learn.
TRAIN_RECORDS: tuple[tuple[plans.Plan, int], ...] = (
    (plans.single, 800),
    (plans.single_then_point, 200),
    (plans.singles_then_compare, 200),
    (plans.several, 1000),
    (plans.several_then_point, 200),
    (plans.count_several_point, 100),
    (plans.count, 200),
    (plans.compare, 400),
    (plans.point, 100),
)
# Records of heldout.json: about 115 questions of each kind.
HELD_OUT_RECORDS: tuple[tuple[plans.Plan, int], ...] = (
    (plans.single, 50),
    (plans.single_then_point, 30),
    (plans.singles_then_compare, 18),
    (plans.several, 50),
    (plans.several_then_point, 30),
    (plans.count_several_point, 33),
    (plans.count, 80),
    (plans.compare, 98),
    (plans.point, 30),
)


@dataclass(frozen=True)
class Split:
    """Records and the pictures they name.

    Attributes:
        records: in Qwen-VL's own form.
        pictures: by the number of signs.
    """

    records: list[dict[str, Any]]
    pictures: dict[int, list[Picture]]


def make_splits() -> tuple[Split, Split]:
    """The training and the held-out split, the same ones on every call."""
    train_scans, held_out_scans = divide_scans(scanned_digits())
    train = _make_split("train", train_scans, TRAIN_PICTURES, TRAIN_RECORDS)
    held_out = _make_split("heldout", held_out_scans, HELD_OUT_PICTURES, HELD_OUT_RECORDS)
    return train, held_out


def divide_scans(scans: Sequence[Glyph]) -> tuple[list[Glyph], list[Glyph]]:
    """Training and held-out scans; of every digit the same share, equal scans on one side.

    A scan's own hash decides, so that the side of one does not hang on the others.
    """
    train: list[Glyph] = []
    held_out: list[Glyph] = []
    for name in sorted({scan.name for scan in scans}):
        of_digit = sorted((scan for scan in scans if scan.name == name), key=_digest)
        digests = sorted({_digest(scan) for scan in of_digit})
        last_held_out = digests[round(len(digests) * HELD_OUT_SHARE) - 1]
        for scan in of_digit:
            (held_out if _digest(scan) <= last_held_out else train).append(scan)
    return train, held_out


def _digest(scan: Glyph) -> str:
    return hashlib.sha256(scan.cells.tobytes() + bytes(scan.cells.shape)).hexdigest()


def _make_split(
    name: str,
    scans: Sequence[Glyph],
    picture_counts: dict[int, int],
    record_counts: Sequence[tuple[plans.Plan, int]],
) -> Split:
    rng = np.random.default_rng([SEED, len(name)])
    pictures: dict[int, list[Picture]] = {}
    number = 0
    for signs, count in picture_counts.items():
        pictures[signs] = []
        for _ in range(count):
            chosen = [scans[i] for i in rng.choice(len(scans), size=signs, replace=False)]
            file = f"images/{name}-{number:05d}.png"
            pictures[signs].append(Picture(file, compose(chosen, rng)))
            number += 1
    chosen_plans = [plan for plan, count in record_counts for _ in range(count)]
    draw = plans.Drawer(pictures, rng)

    def ask(index: int) -> dict[str, Any]:
        asker = Asker(LANGUAGES[index % 2], "digit", rng)
        return record(f"{name}-{index:04d}", chosen_plans[index](asker, draw))

    records = [ask(index) for index in range(len(chosen_plans))]
    order = rng.permutation(len(records))
    _ask_repeated_anew(records, ask)
    return Split([records[i] for i in order], pictures)


def _ask_repeated_anew(records: list[dict[str, Any]], ask: Callable[[int], dict[str, Any]]) -> None:
    """Replace each record that says the same about the same picture as an earlier one."""
    said: set[str] = set()
    for index in range(len(records)):
        while str(records[index]["conversations"]) in said:
            records[index] = ask(index)
        said.add(str(records[index]["conversations"]))
