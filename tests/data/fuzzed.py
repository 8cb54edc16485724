"""What must hold for any input: findings or a `VltrainError`, never anything else."""

import base64
import tempfile
import warnings
from pathlib import Path
from typing import Any

from letters import LetterProcessor
from PIL import Image

from vltrain.data.checks import Checker, check_files
from vltrain.data.encoding import encode
from vltrain.data.grounding import parse_regions, read_regions, write_regions
from vltrain.data.images import look_at, open_image
from vltrain.data.markup import parts_of, prose_faults
from vltrain.data.pictures import LOCAL_PICTURES
from vltrain.data.records import Record
from vltrain.errors import VltrainError

LETTERS = LetterProcessor()
CHECKER = Checker(LETTERS, max_length=200)
CHECKER_REFERENCE = Checker(LETTERS, labels="reference")


def a_file_is_checked(ending: str, content: bytes) -> None:
    """A data file gives a report, whatever is in it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"data{ending}")
        file.write_bytes(content)
        report = check_files([file], processor=LETTERS, max_length=200)
    assert all(found.message and found.fix for found in report.findings)


def a_record_is_examined(value: Any, folder: Path) -> None:
    """A record has errors, or it can be encoded; under both policies."""
    record = Record(folder / "data.json", 0, value)
    for checker in (CHECKER, CHECKER_REFERENCE):
        seen = checker.examine(record)
        assert all(found.message and found.fix for found in seen.findings)
        try:
            sample = encode(value, LETTERS, checker.labels, image_size=_measure(folder))
        except VltrainError:
            assert seen.sample is None
        else:
            assert sample == seen.sample


def a_text_is_taken_apart(text: str) -> None:
    """Tags and boxes of any text give parts, regions, and reasons."""
    parts_of(text, "here")
    prose_faults(text, "here")
    read_regions(text, (320, 240))
    regions, _ = parse_regions(text)
    try:
        written = write_regions(regions)
    except VltrainError:
        return
    assert parse_regions(written)[0] == regions


def a_picture_is_looked_at(content: bytes) -> None:
    """Bytes are a picture that opens, or have a fault; the same inside a `data:` URI."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about odd files
        look_at(content, decode=False)
        look = look_at(content)
        try:
            opened = open_image(content)
        except VltrainError:
            opened = None
        if look.size is None:
            assert opened is None
        uri = "data:;base64," + base64.b64encode(content).decode()
        assert LOCAL_PICTURES.look(uri).size == look.size


def a_source_is_looked_up(source: str) -> None:
    """Any name of a picture has a size or a fault."""
    look = LOCAL_PICTURES.look(source)
    assert look.size or look.faults


def _measure(folder: Path) -> Any:
    return LOCAL_PICTURES.measure(folder / "data.json")


def good_picture(folder: Path) -> None:
    """Write the picture that damaged records name."""
    Image.new("RGB", (64, 48)).save(folder / "good.png")
