"""Every planted fault is found where it is, in every form, alone; and clean files are clean."""

import io
import struct
import zlib

import numpy as np
import pytest
from forms import FORMS
from letters import LetterProcessor
from PIL import Image
from planted_faults import IN_TURNS, asked
from planted_files import IN_FILE, IN_SET, InFile, InSet
from planted_records import IN_KEYS, InKeys

from vltrain.data.checks import check_files

LIMITS = {"processor": LetterProcessor(), "max_length": 1200}
GOOD = [
    asked("[[good.png]]What is it?", "A good picture."),
    asked("[[good.png]]Where is it?", "<ref>it</ref><box>(10,20),(800,900)</box>"),
    [("system", "Be brief."), *asked("Why?", "So."), *asked("Oh?", "Yes.")],
    asked("Name a prime number.", "Seven."),
]
PLACE = 2  # where the faulty record stands among the good ones


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with good pictures and bad ones."""
    folder = tmp_path_factory.mktemp("planted")
    noise = Image.effect_noise((320, 240), 90)
    noise.save(folder / "good.png")
    for ending in ("jpg", "png", "gif", "webp", "bmp", "tiff"):
        whole = folder / f"whole.{ending}"
        noise.save(whole)
        content = whole.read_bytes()
        (folder / f"cut.{ending}").write_bytes(content[: len(content) // 2])
    (folder / "folder.png").mkdir()
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("a picture of a cat")
    (folder / "page.jpg").write_text("<!DOCTYPE html><html>404</html>")
    (folder / "flat.png").write_bytes(png_of(0, 8))
    (folder / "huge.png").write_bytes(png_of(60_000, 60_000))
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 500).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(folder / "turned.jpg", exif=exif)
    return folder


def png_of(width, height):
    """The beginning and the end of a PNG that says to have that size."""
    with io.BytesIO() as file:
        Image.new("L", (8, 8)).save(file, "PNG")
        content = file.getvalue()
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def written(folder, form, records):
    _, write, ending = FORMS[form]
    file = folder / f"{form}{ending}"
    file.write_bytes(write(records))
    return file


def among_good(form, record):
    """Good records with another in their midst, each with an id."""
    write = FORMS[form][0]
    records = [write(turns) for turns in GOOD]
    records.insert(PLACE, record)
    return [
        {"id": f"r{place}", **value} if isinstance(value, dict) else value
        for place, value in enumerate(records)
    ]


def in_turns():
    for fault in IN_TURNS:
        for form in FORMS:
            kind = fault.elsewhere.get(form, fault.kind)
            if kind is not None:
                yield pytest.param(fault, form, kind, id=f"{fault.name}-{form}")


@pytest.mark.parametrize(("fault", "form", "kind"), [*in_turns()])
def test_a_fault_in_a_conversation_is_found(folder, fault, form, kind):
    file = written(folder, form, among_good(form, FORMS[form][0](fault.turns)))

    report = check_files([file], **LIMITS)

    assert_alone(report, kind, fault.severity, PLACE, f"r{PLACE}")


@pytest.mark.parametrize(
    ("fault", "form"),
    [
        pytest.param(fault, form, id=f"{fault.name}-{form}")
        for fault in IN_KEYS
        for form in fault.forms
    ],
)
def test_a_fault_of_a_records_form_is_found(folder, fault: InKeys, form):
    faulty = fault.change(FORMS[form][0](asked("[[good.png]]A question.")))
    file = written(folder, form, among_good(form, faulty))

    report = check_files([file], **LIMITS)

    identity = f"r{PLACE}" if isinstance(faulty, dict) else None
    assert_alone(report, fault.kind, fault.severity, PLACE, identity)


@pytest.mark.parametrize("fault", IN_FILE, ids=lambda fault: fault.name)
def test_a_fault_of_a_file_is_found(folder, fault: InFile):
    file = folder / f"file{fault.ending}"
    file.write_bytes(fault.content)

    assert_alone(check_files([file], **LIMITS), fault.kind, "error", fault.record, None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fault", IN_SET, ids=lambda fault: fault.name)
def test_a_fault_of_a_set_is_found(folder, fault: InSet, form):
    file = written(folder, form, [FORMS[form][0](turns) for turns in fault.conversations])

    assert_alone(check_files([file]), fault.kind, "warning", fault.record, None)


def assert_alone(report, kind, severity, record, identity):
    """One finding, with a place, a message and a fix."""
    found = [(f.kind, f.severity, f.record, f.id) for f in report.findings]
    assert found == [(kind, severity, record, identity)], report.findings
    assert report.findings[0].message
    assert report.findings[0].fix


def test_more_than_sixty_kinds_of_faults_are_planted():
    names = [fault.name for fault in (*IN_TURNS, *IN_KEYS, *IN_FILE, *IN_SET)]

    assert len(names) == len(set(names))
    assert len(names) > 150
    assert len({fault.kind for fault in (*IN_TURNS, *IN_KEYS, *IN_FILE, *IN_SET)}) > 40


@pytest.mark.parametrize("form", FORMS)
def test_the_same_without_a_fault_is_clean(folder, form):
    write = FORMS[form][0]
    file = written(folder, form, among_good(form, write(asked("[[good.png]]A question."))))

    assert check_files([file], **LIMITS).findings == ()
    assert check_files([file], decode=True).findings == ()


def as_people_have_them(folder, form):
    """A good file as other tools and editors leave it: bytes."""
    write, write_file, ending = FORMS[form]
    names = [
        "my cat (1).png",
        "#50%.png",
        "猫.PNG",
        "cmyk.jpg",
        "palette.png",
        "bit.png",
        "wrong.png",
    ]
    names += [
        f"../{folder.name}/good.png",
        str(folder / "good.png"),
        "whole.webp",
        "whole.gif",
        "whole.bmp",
        "whole.tiff",
    ]
    records = [write(asked(f"[[{name}]]What is it?", f"It is {name}.")) for name in names]
    records += [
        write(asked("[[good.png]]Where?", "<ref> a cat </ref> <box> ( 1 , 2 ) , ( 3,4 )\n</box>")),
        write(asked("[[turned.jpg]]Without a box?", "Yes.")),
        write(asked("What ends a turn?", "<|im_end|> does; <ref>no box</ref> is fine as well.")),
        write(asked("1 < 2, <b>bold</b> and <IMG>?", "Text.\u2028\U0001f600")),
        {
            **write(asked("Keys of others?", "Passed over.")),
            "source": None,
            "score": 0.5,
            "ids": [1],
        },
    ]
    content = write_file(records)
    if ending == ".jsonl":
        content = content.replace(b"\n", b"\n\n \t\n")
    return b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")


@pytest.mark.parametrize("form", FORMS)
def test_files_as_people_have_them_are_clean(folder, form):
    picture = Image.effect_noise((64, 48), 90)
    for name in ("my cat (1).png", "#50%.png", "猫.PNG"):
        picture.save(folder / name)
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("1").save(folder / "bit.png")
    picture.save(folder / "wrong.png", "JPEG")
    file = folder / f"as it is, {form}{FORMS[form][2]}"
    file.write_bytes(as_people_have_them(folder, form))

    assert check_files([file], **LIMITS).findings == ()
    assert check_files([file], decode=True).findings == ()
