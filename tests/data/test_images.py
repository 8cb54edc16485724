"""Opening pictures, whatever kind they are, and telling what is wrong with them."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vltrain.data.faults import Fault
from vltrain.data.images import (
    look_at,
    open_image,
    picture_size,
)
from vltrain.errors import VltrainError


def saved(path: Path, mode: str = "RGB", size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 1 if mode == "1" else 0).save(path)
    return path


def noise(path: Path) -> Path:
    pixels = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(
    ("mode", "ending"),
    [
        ("RGB", "png"),
        ("RGBA", "png"),
        ("LA", "png"),
        ("L", "png"),
        ("P", "png"),
        ("1", "png"),
        ("CMYK", "jpg"),
        ("RGB", "webp"),
        ("RGB", "bmp"),
        ("P", "gif"),
    ],
)
def test_a_picture_of_any_mode_is_opened_as_plain_rgb_does(tmp_path, mode, ending):
    path = saved(tmp_path / f"a.{ending}", mode)

    with Image.open(path) as image:
        expected = image.convert("RGB").tobytes()
    opened = open_image(path)

    assert (opened.mode, opened.size) == ("RGB", (8, 6))
    assert opened.tobytes() == expected
    assert look_at(path).faults == ()


def test_a_wrong_ending_does_not_matter(tmp_path):
    path = saved(tmp_path / "a.png").rename(tmp_path / "a.jpg")

    assert open_image(path).size == (8, 6)


def test_exif_orientation_is_not_applied():
    path = Path(__file__).parents[1] / "golden" / "i" / "exif6.jpg"
    with Image.open(path) as image:
        as_stored = image.size

    assert open_image(path).size == as_stored


@pytest.mark.parametrize(
    ("size", "decoded"),
    [
        ((300, 240), (300, 240)),  # half of 240 is less than 3 times 56
        ((350, 336), (175, 168)),
        ((1000, 336), (500, 168)),
        ((1344, 1400), (168, 175)),
        ((4000, 3000), (500, 375)),  # no smaller than an eighth
    ],
)
def test_a_large_jpeg_is_decoded_no_smaller_than_is_needed(tmp_path, size, decoded):
    path = tmp_path / "a.jpg"
    Image.new("RGB", size, (200, 100, 50)).save(path)

    assert open_image(path, side=56).size == decoded
    assert open_image(path.read_bytes(), side=56).size == decoded
    assert open_image(path).size == size


def test_a_reduced_jpeg_gives_the_model_almost_the_same_pixels(tmp_path):
    y, x = np.mgrid[0:600, 0:800]
    waves = np.stack([128 + 60 * np.sin(x / 9) + 60 * np.cos(y / (7 + c)) for c in range(3)], -1)
    path = tmp_path / "a.jpg"
    Image.fromarray(waves.astype(np.uint8)).save(path, quality=90)

    whole, reduced = (
        np.asarray(picture.resize((56, 56), Image.Resampling.BICUBIC), dtype=int)
        for picture in (open_image(path), open_image(path, side=56))
    )

    assert np.abs(whole - reduced).mean() < 0.5


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_small_pictures_and_other_kinds_are_the_same_to_the_bit_at_any_side(tmp_path, ending):
    path = noise(tmp_path / f"a.{ending}")  # 64 pixels a side
    side = 12 if ending == "jpg" else 2  # 3 * 12 pixels are more than half of 64

    assert open_image(path, side=side).tobytes() == open_image(path).tobytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_grey_is_stretched_over_its_range(tmp_path, dtype):
    values = np.array([[1000, 1500, 2000]], dtype=dtype)
    path = tmp_path / "a.tiff"
    Image.fromarray(values).save(path)

    assert np.asarray(open_image(path)).tolist() == [[[0, 0, 0], [128, 128, 128], [255] * 3]]
    assert [(f.kind, f.grade) for f in look_at(path).faults] == [("deep_grey", "warning")]


def test_deep_grey_of_one_value_is_black(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.full((1, 2), 700, dtype=np.uint16)).save(path)

    assert np.asarray(open_image(path)).tolist() == [[[0, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp"])
def test_a_file_cut_short_is_found_and_refused(tmp_path, ending):
    path = noise(tmp_path / f"a.{ending}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    assert [fault.kind for fault in look_at(path).faults] == ["broken_picture"]
    with pytest.raises(VltrainError, match=r"^t#1: picture .* cannot be read"):
        open_image(path, where="t#1")


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_a_file_cut_short_is_found_by_its_end(tmp_path, ending):
    whole = noise(tmp_path / f"whole.{ending}")
    cut = tmp_path / f"cut.{ending}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])

    assert look_at(whole, decode=False).faults == ()
    assert [fault.kind for fault in look_at(cut, decode=False).faults] == ["broken_picture"]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif"])
def test_bytes_in_memory_are_looked_at_as_a_file_is(tmp_path, ending):
    path = noise(tmp_path / f"a.{ending}")
    content = path.read_bytes()

    assert open_image(content).tobytes() == open_image(path).tobytes()
    assert picture_size(content) == (64, 64)
    assert look_at(content, decode=False).faults == ()
    cut = look_at(content[: len(content) // 2], name="row 3", decode=False).faults
    assert [fault.kind for fault in cut] == ["broken_picture"]
    assert cut[0].message.startswith("picture row 3 cannot be read (")


def test_no_bytes_in_memory_are_an_empty_picture():
    assert [fault.kind for fault in look_at(b"").faults] == ["zero_size_picture"]
    with pytest.raises(VltrainError, match=r"^t#1: picture in memory is empty \(0 bytes\)"):
        open_image(b"", where="t#1")


def test_bytes_behind_a_pictures_end_are_no_fault(tmp_path):
    path = noise(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes() + bytes(5000))

    assert look_at(path, decode=False).faults == ()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_is_no_fault_of_a_picture(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (8, 8)).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")

    assert look_at(path, decode=False).faults == ()


def test_only_decoding_finds_damage_in_the_middle(tmp_path):
    path = noise(tmp_path / "a.png")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)

    assert look_at(path, decode=False).faults == ()
    assert [fault.kind for fault in look_at(path, decode=True).faults] == ["broken_picture"]


def test_a_pictures_size_is_read_from_its_header(tmp_path):
    whole = noise(tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:400])
    (tmp_path / "no.png").write_text("no picture")

    assert picture_size(tmp_path / "cut.png") == (64, 64)
    fault = picture_size(tmp_path / "no.png")
    assert isinstance(fault, Fault)
    assert fault.kind == "broken_picture"


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"", "zero_size_picture"), (b"<html>not found</html>", "broken_picture")],
)
def test_a_file_that_is_no_picture_is_found(tmp_path, content, kind):
    path = tmp_path / "a.png"
    path.write_bytes(content)

    assert [fault.kind for fault in look_at(path).faults] == [kind]
    assert [fault.kind for fault in look_at(path, decode=False).faults] == [kind]


def test_a_picture_beyond_pillows_limit_is_found(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", size=(50, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)

    assert [fault.kind for fault in look_at(path).faults] == ["huge_picture"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_opened_pictures_leave_no_file_open(tmp_path):
    path = saved(tmp_path / "a.png")
    before = len(os.listdir("/proc/self/fd"))

    pictures = [open_image(path) for _ in range(20)]

    assert len(pictures) == 20
    assert len(os.listdir("/proc/self/fd")) == before
