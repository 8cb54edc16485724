"""Where a picture is found by the name that a record gives it."""

import base64
import pickle
from pathlib import Path
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
from PIL import Image

from vltrain.data.faults import Fault
from vltrain.data.images import image_candidates
from vltrain.data.pictures import LOCAL_PICTURES, Pictures, source_key
from vltrain.errors import VltrainError


def saved(path: Path, size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(path)
    return path


@pytest.fixture
def content(tmp_path) -> bytes:
    """A PNG of 8 x 6 pixels."""
    return saved(tmp_path / "content.png").read_bytes()


def kind_of(found: object) -> str:
    assert isinstance(found, Fault), found
    assert found.fix
    return found.kind


def test_a_pictures_size_is_its_width_and_height(tmp_path):
    saved(tmp_path / "a.png", size=(8, 6))

    assert Pictures(tmp_path).size("a.png") == (8, 6)
    assert LOCAL_PICTURES.measure(tmp_path / "train.json")("a.png") == (8, 6)


def test_the_size_of_what_is_no_picture_is_a_fault(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")

    assert kind_of(Pictures(tmp_path).size("a.png")) == "broken_picture"
    assert kind_of(Pictures(tmp_path).size("b.png")) == "missing_picture"


def test_a_picture_is_looked_for_in_the_root_then_beside_the_data_then_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures, data_file = Pictures(tmp_path / "root"), tmp_path / "data" / "train.json"
    here = saved(tmp_path / "a.png")

    assert pictures.locate("a.png", data_file) == here
    beside = saved(tmp_path / "data" / "a.png")
    assert pictures.locate("a.png", data_file) == beside
    rooted = saved(tmp_path / "root" / "a.png")
    assert pictures.locate("a.png", data_file) == rooted


def test_a_missing_picture_is_an_error_that_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(VltrainError) as caught:
        Pictures(Path("/pics")).open("a.png", Path("data/train.json"), where="t#3")

    assert str(caught.value).startswith(
        f"t#3: picture 'a.png' is missing; looked for /pics/a.png, {tmp_path}/data/a.png, "
        f"{tmp_path}/a.png\n  fix: "
    )


def test_absolute_paths_and_paths_above_the_data_are_fine(tmp_path):
    picture = saved(tmp_path / "pics" / "a.png")
    data_file = tmp_path / "data" / "train.json"
    data_file.parent.mkdir()

    assert LOCAL_PICTURES.locate(str(picture), data_file) == picture
    assert LOCAL_PICTURES.locate("../pics/a.png", data_file).samefile(picture)


def test_the_same_place_is_named_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert image_candidates("a.png", data_file=Path("train.json"), image_root=Path(".")) == [
        str(tmp_path / "a.png")
    ]


@pytest.mark.parametrize(
    "name", ["a b.png", "photo:1.png", "猫.png", "100%.png", "a#b?.png", "data", "data,1.png"]
)
def test_odd_file_names_are_names(tmp_path, name):
    picture = saved(tmp_path / "a.png").rename(tmp_path / name)

    assert Pictures(tmp_path).locate(name) == picture


@pytest.mark.parametrize(
    ("source", "kind", "what"),
    [
        ("", "empty_path", "a picture has no path"),
        ("http://x.org/a.png", "url", "is a URL, and pictures are not downloaded"),
        ("HTTPS://x.org/a.png", "url", "is a URL, and pictures are not downloaded"),
        ("file:///a.png", "unknown_scheme", "has the unknown scheme file:"),
        ("file:a.png", "unknown_scheme", "has the unknown scheme file:"),
        ("s3://bucket/a.png", "unknown_scheme", "has the unknown scheme s3:"),
        ("data://bucket/a.png", "bad_data_uri", "is a data: URI without a comma"),
        ("a\0b.png", "missing_picture", "is missing"),
        ("a" * 5000, "missing_picture", "is missing"),
    ],
)
def test_what_names_no_picture_is_refused_with_a_reason(source, kind, what):
    fault = LOCAL_PICTURES.locate(source)

    assert kind_of(fault) == kind
    assert what in fault.message
    with pytest.raises(VltrainError, match=what):
        LOCAL_PICTURES.open(source)


def test_what_decides_about_a_picture_is_its_file_or_all_places_where_it_is_looked_for(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    pictures, data_file = Pictures(Path("/pics")), tmp_path / "data" / "train.json"
    here = saved(tmp_path / "a.png")

    assert pictures.watched("a.png", data_file) == [str(here)]
    assert pictures.watched("b.png", data_file) == [
        "/pics/b.png",
        f"{tmp_path}/data/b.png",
        f"{tmp_path}/b.png",
    ]
    assert pictures.watched("data:,x", data_file) == []
    assert pictures.watched("http://x.org/a.png", data_file) == []


def test_a_folder_is_no_picture(tmp_path):
    assert kind_of(Pictures(tmp_path.parent).locate(tmp_path.name)) == "missing_picture"


@pytest.mark.parametrize(
    ("head", "written"),
    [
        ("data:image/png;base64,", lambda raw: base64.b64encode(raw).decode()),
        ("DATA:;BASE64,", lambda raw: base64.b64encode(raw).decode()),
        ("data:image/png;name=a.png;base64,", lambda raw: base64.encodebytes(raw).decode()),
        ("data:image/png;base64,", lambda raw: base64.b64encode(raw).decode().rstrip("=")),
        ("data:image/png;base64,", lambda raw: quote_from_bytes(base64.b64encode(raw), safe="")),
        ("data:image/png,", quote_from_bytes),
        ("data:,", quote_from_bytes),
    ],
    ids=["base64", "capitals", "lines", "no_padding", "quoted_base64", "percent", "bare"],
)
def test_a_data_uri_holds_its_picture(content, head, written):
    source = head + written(content)

    assert LOCAL_PICTURES.locate(source) == content
    assert LOCAL_PICTURES.size(source) == (8, 6)
    assert LOCAL_PICTURES.faults(source) == []
    opened = LOCAL_PICTURES.open(source)
    assert np.asarray(opened)[0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("source", "kind", "what"),
    [
        ("data:image/png;base64", "bad_data_uri", "without a comma"),
        ("data:image/png;base64,iVBO*w0K", "bad_data_uri", "base64 is broken"),
        ("data:image/png;base64,猫", "bad_data_uri", "base64 is broken"),
        ("data:image/png;base64,A", "bad_data_uri", "base64 is broken"),
        ("data:image/png;base64,", "zero_size_picture", "is empty (0 bytes)"),
        ("data:,\ud800", "broken_picture", "(it begins like no known kind"),
        ("data:image/png,hello", "broken_picture", "(it begins like no known kind"),
    ],
)
def test_a_data_uri_without_a_picture_is_a_fault(source, kind, what):
    (fault,) = LOCAL_PICTURES.faults(source)

    assert kind_of(fault) == kind
    assert what in fault.message


def test_a_long_data_uri_is_cut_in_messages():
    source = "data:image/png;base64," + "A" * 10_000

    (fault,) = LOCAL_PICTURES.faults(source)

    assert fault.message.startswith("picture data:image/png;base64,AAAA")
    assert len(fault.message) < 300


def test_names_are_remembered_as_they_are_and_bytes_by_their_digest():
    long = "data:image/png;base64," + "A" * 10_000

    assert source_key("images/a.png") == "images/a.png"
    assert source_key(long) == source_key(long) != source_key(long + "A")
    assert len(source_key(long)) == 64


def test_pictures_survive_the_way_to_a_worker(tmp_path):
    assert pickle.loads(pickle.dumps(Pictures(tmp_path))) == Pictures(tmp_path)
