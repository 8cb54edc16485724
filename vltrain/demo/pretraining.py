"""Make what the demo's base is pretrained on: `python -m vltrain.demo.pretraining OUT`.

OUT/start/ is a model to begin with; OUT/train.json, OUT/eval.json and OUT/images/ are printed
digits, letters and shapes with the demo's questions. No scan of handwriting is among them.
`vltrain full recipes/demo_base.yaml` does the training; the recipe tells both of its legs, and
how the base that ships differs from what it makes today. Which settings mattered, and what the base
scores, is in benchmarks/README.md.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any, get_args

import numpy as np

from vltrain.demo import plans
from vltrain.demo.glyphs import printed_glyph
from vltrain.demo.questions import LANGUAGES, NAMES, Asker, Picture, Subject, record
from vltrain.demo.scenes import compose
from vltrain.demo.start import write_start

SUBJECTS: tuple[Subject, ...] = get_args(Subject)
SUBJECT_SHARES = (0.7, 0.18, 0.12)  # digits, letters, shapes
SIGN_SHARES = (0.45, 0.33, 0.22)  # pictures of one, two, three signs
SHEET_PICTURES = 200  # pictures that one worker makes at a time, of one subject
COMPARISONS = 50  # records of a sheet with two pictures, beside one record for each picture
EVAL_SHEETS = 5


@dataclass(frozen=True)
class Sheet:
    """Pictures of one subject, made and asked about together: one worker's piece of work."""

    name: str
    seed: tuple[int, int]


def write_pretraining_data(
    out: Path, *, pictures: int, workers: int, seed: int = 0
) -> tuple[int, int]:
    """Render pictures and write the records about them.

    Args:
        out: folder that gets train.json, eval.json and images/.
        pictures: how many to render for training, rounded up to whole sheets.
        workers: processes that render; the result does not depend on their number.
        seed: of everything random.

    Returns:
        The numbers of training and of evaluation records.
    """
    count = -(-pictures // SHEET_PICTURES)
    sheets = [Sheet(f"train-{i:05d}", (seed, i)) for i in range(count)]
    sheets += [Sheet(f"eval-{i:05d}", (seed + 1, i)) for i in range(EVAL_SHEETS)]
    for sheet in sheets:
        (out / "images" / sheet.name).mkdir(parents=True)
    with Pool(workers) as pool:
        made = list(pool.imap(partial(_make_sheet, out), sheets, chunksize=2))
    train = _write_records(out / "train.json", made[:count])
    held_out = _write_records(out / "eval.json", made[count:])
    return train, held_out


def _write_records(path: Path, sheets: Sequence[list[dict[str, Any]]]) -> int:
    records = [entry for sheet in sheets for entry in sheet]
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return len(records)


def _make_sheet(out: Path, sheet: Sheet) -> list[dict[str, Any]]:
    """Write one sheet's pictures and return its records.

    The pictures are BMP files, which take a tenth of the time of PNG to write and to read.
    """
    rng = np.random.default_rng(sheet.seed)
    subject = SUBJECTS[rng.choice(len(SUBJECTS), p=SUBJECT_SHARES)]
    pictures: dict[int, list[Picture]] = {1: [], 2: [], 3: []}
    records = []
    for index in range(SHEET_PICTURES):
        signs = int(rng.choice((1, 2, 3), p=SIGN_SHARES))
        names = rng.choice(NAMES[subject], size=signs)
        scene = compose([printed_glyph(str(name), rng) for name in names], rng)
        picture = Picture(f"images/{sheet.name}/{index:03d}.bmp", scene)
        scene.image.save(out / picture.file)
        pictures[signs].append(picture)
        asker = Asker(LANGUAGES[index % 2], subject, rng)
        records.append(record(f"{sheet.name}-{index:03d}", plans.mixed(asker, picture)))
    draw = plans.Drawer(pictures, rng)
    for index in range(COMPARISONS):
        asker = Asker(LANGUAGES[index % 2], subject, rng)
        plan = plans.singles_then_compare if rng.random() < 0.3 else plans.compare
        records.append(record(f"{sheet.name}-c{index:02d}", plan(asker, draw)))
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write everything into a new folder."""
    parser = argparse.ArgumentParser(prog="python -m vltrain.demo.pretraining")
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=1, help="processes that render")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    write_start(options.out / "start", options.seed)
    train, held_out = write_pretraining_data(
        options.out, pictures=options.pictures, workers=options.workers, seed=options.seed
    )
    print(f"{train} records to train on and {held_out} to evaluate with in {options.out}")


if __name__ == "__main__":
    main()
