"""Finding pictures and opening them, whatever kind they are."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vltrain.data.faults import Fault
from vltrain.data.images import (
    header_size,
    image_candidates,
    image_size,
    open_image,
    picture_faults,
    resolve_image,
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


def test_a_pictures_size_is_its_width_and_height(tmp_path):
    saved(tmp_path / "a.png", size=(8, 6))

    assert image_size("a.png", image_root=tmp_path) == (8, 6)


def test_the_size_of_what_is_no_picture_is_a_fault(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")

    for name, kind in (("a.png", "broken_picture"), ("b.png", "missing_picture")):
        fault = image_size(name, image_root=tmp_path)
        assert isinstance(fault, Fault)
        assert fault.kind == kind


def test_a_picture_is_looked_for_in_the_root_then_beside_the_data_then_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root, data_file = tmp_path / "root", tmp_path / "data" / "train.json"
    here = saved(tmp_path / "a.png")

    def found():
        return resolve_image("a.png", data_file=data_file, image_root=root)

    assert found() == here
    beside = saved(tmp_path / "data" / "a.png")
    assert found() == beside
    rooted = saved(root / "a.png")
    assert found() == rooted


def test_a_missing_picture_is_an_error_that_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(VltrainError) as caught:
        resolve_image(
            "a.png", data_file=Path("data/train.json"), image_root=Path("/pics"), where="t#3"
        )

    assert str(caught.value).startswith(
        f"t#3: picture 'a.png' is missing; looked for /pics/a.png, {tmp_path}/data/a.png, "
        f"{tmp_path}/a.png\n  fix: "
    )


def test_absolute_paths_and_paths_above_the_data_are_fine(tmp_path):
    picture = saved(tmp_path / "pics" / "a.png")
    data_file = tmp_path / "data" / "train.json"
    data_file.parent.mkdir()

    assert resolve_image(str(picture), data_file=data_file) == picture
    assert resolve_image("../pics/a.png", data_file=data_file).samefile(picture)


def test_the_same_place_is_named_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert image_candidates("a.png", data_file=Path("train.json"), image_root=Path(".")) == [
        str(tmp_path / "a.png")
    ]


@pytest.mark.parametrize("name", ["a b.png", "photo:1.png", "猫.png", "100%.png", "a#b?.png"])
def test_odd_file_names_are_names(tmp_path, name):
    picture = saved(tmp_path / name)

    assert resolve_image(name, image_root=tmp_path) == picture


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("", "a picture has no path"),
        ("http://x.org/a.png", "is a URL, and pictures are not downloaded"),
        ("HTTPS://x.org/a.png", "is a URL, and pictures are not downloaded"),
        ("file:///a.png", "has the unknown scheme file:"),
        ("file:a.png", "has the unknown scheme file:"),
        ("data:image/png;base64,AAAA", "has the unknown scheme data:"),
        ("s3://bucket/a.png", "has the unknown scheme s3:"),
        ("a\0b.png", "is missing"),
        ("a" * 5000, "is missing"),
    ],
)
def test_what_is_no_files_path_is_refused_with_a_reason(source, what):
    with pytest.raises(VltrainError, match=what):
        resolve_image(source)


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(VltrainError, match="is missing"):
        resolve_image(tmp_path.name, image_root=tmp_path.parent)


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
    assert picture_faults(path) == []


def test_a_wrong_ending_does_not_matter(tmp_path):
    path = saved(tmp_path / "a.png").rename(tmp_path / "a.jpg")

    assert open_image(path).size == (8, 6)


def test_exif_orientation_is_not_applied():
    path = Path(__file__).parents[1] / "golden" / "i" / "exif6.jpg"
    with Image.open(path) as image:
        as_stored = image.size

    assert open_image(path).size == as_stored


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_grey_is_stretched_over_its_range(tmp_path, dtype):
    values = np.array([[1000, 1500, 2000]], dtype=dtype)
    path = tmp_path / "a.tiff"
    Image.fromarray(values).save(path)

    assert np.asarray(open_image(path)).tolist() == [[[0, 0, 0], [128, 128, 128], [255] * 3]]
    assert [(f.kind, f.grade) for f in picture_faults(path)] == [("deep_grey", "warning")]


def test_deep_grey_of_one_value_is_black(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.full((1, 2), 700, dtype=np.uint16)).save(path)

    assert np.asarray(open_image(path)).tolist() == [[[0, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp"])
def test_a_file_cut_short_is_found_and_refused(tmp_path, ending):
    path = noise(tmp_path / f"a.{ending}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    assert [fault.kind for fault in picture_faults(path)] == ["broken_picture"]
    with pytest.raises(VltrainError, match=r"^t#1: picture .* cannot be read"):
        open_image(path, where="t#1")


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif"])
def test_a_file_cut_short_is_found_by_its_end(tmp_path, ending):
    whole = noise(tmp_path / f"whole.{ending}")
    cut = tmp_path / f"cut.{ending}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])

    assert picture_faults(whole, decode=False) == []
    assert [fault.kind for fault in picture_faults(cut, decode=False)] == ["broken_picture"]


def test_bytes_behind_a_pictures_end_are_no_fault(tmp_path):
    path = noise(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes() + bytes(5000))

    assert picture_faults(path, decode=False) == []


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_is_no_fault_of_a_picture(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (8, 8)).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")

    assert picture_faults(path, decode=False) == []


def test_only_decoding_finds_damage_in_the_middle(tmp_path):
    path = noise(tmp_path / "a.png")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)

    assert picture_faults(path, decode=False) == []
    assert [fault.kind for fault in picture_faults(path, decode=True)] == ["broken_picture"]


def test_a_pictures_size_is_read_from_its_header(tmp_path):
    whole = noise(tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:400])
    (tmp_path / "no.png").write_text("no picture")

    assert header_size(tmp_path / "cut.png") == (64, 64)
    assert header_size(tmp_path / "no.png") is None


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"", "zero_size_picture"), (b"<html>not found</html>", "broken_picture")],
)
def test_a_file_that_is_no_picture_is_found(tmp_path, content, kind):
    path = tmp_path / "a.png"
    path.write_bytes(content)

    assert [fault.kind for fault in picture_faults(path)] == [kind]
    assert [fault.kind for fault in picture_faults(path, decode=False)] == [kind]


def test_a_picture_beyond_pillows_limit_is_found(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", size=(50, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)

    assert [fault.kind for fault in picture_faults(path)] == ["huge_picture"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_opened_pictures_leave_no_file_open(tmp_path):
    path = saved(tmp_path / "a.png")
    before = len(os.listdir("/proc/self/fd"))

    pictures = [open_image(path) for _ in range(20)]

    assert len(pictures) == 20
    assert len(os.listdir("/proc/self/fd")) == before
