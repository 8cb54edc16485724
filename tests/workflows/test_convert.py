"""`vltrain convert`, as the user sees it."""

import json
import pickle
import subprocess
import sys

import pytest
from PIL import Image

from vltrain.data.checks import check_files
from vltrain.data.sources import read_records
from vltrain.errors import VltrainError
from vltrain.workflows.convert import convert_coco_file, convert_llava_file, convert_refcoco_file

COCO = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 40, "height": 20},
        {"id": 2, "file_name": "b.png", "width": 40, "height": 20},
    ],
    "categories": [{"id": 5, "name": "猫"}],
    "annotations": [
        {"image_id": 1, "category_id": 5, "bbox": [10, 5, 20, 10]},
        {"image_id": 2, "category_id": 5, "bbox": [10, 5, 20, 10]},
        {"image_id": 2, "category_id": 5, "bbox": [10, 5, 20, 10], "iscrowd": 1},
        {"image_id": 2, "category_id": 5, "bbox": [30, 5, 20, 10]},
    ],
}
REFERRAL = {"image": "a.png", "expression": "the cat", "bbox": [10, 5, 20, 10]}
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]


@pytest.fixture
def folder(tmp_path):
    """A working place with two pictures under `pictures/`."""
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 20)).save(tmp_path / "pictures" / name)
    return tmp_path


def annotations(folder, value, name="annotations.json"):
    file = folder / name
    file.write_text(json.dumps(value), encoding="utf-8")
    return file


def asked(file):
    """The first question of every record."""
    return [record.value["conversations"][0]["value"] for record in read_records(file)]


def test_coco_becomes_a_clean_training_file_and_an_account_of_it(folder, capsys):
    file, out = annotations(folder, COCO), folder / "train.json"

    convert_coco_file(file, out, images=folder / "pictures")

    assert check_files([out]).findings == ()
    assert asked(out) == [
        "Picture 1: <img>pictures/a.png</img>\nDetect every 猫.",
        "Picture 1: <img>pictures/b.png</img>\nDetect every 猫.",
    ]
    assert capsys.readouterr().out == (
        f"{out}: 2 records\n"
        "  changed:\n"
        "    boxes cut off at the edge of their picture: 1 (first: annotations[3])\n"
        "  left out:\n"
        "    crowd regions: 1 (first: annotations[2])\n"
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "annotations.json",
        "pictures",
        "train.json",
    ]


def test_the_output_is_readable_line_by_line(folder):
    file, out = annotations(folder, COCO), folder / "train.json"

    convert_coco_file(file, out, images=folder / "pictures")

    lines = out.read_text(encoding="utf-8").splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("[", "]", 4)
    assert "猫" in lines[1]


def test_the_ending_asks_for_jsonl(folder):
    file, out = annotations(folder, COCO), folder / "train.jsonl"

    convert_coco_file(file, out, images=folder / "pictures")

    assert len(out.read_text(encoding="utf-8").splitlines()) == 2
    assert check_files([out]).findings == ()


def test_pictures_are_named_from_the_training_files_folder(folder):
    (folder / "data").mkdir()
    file, out = annotations(folder, COCO), folder / "data" / "train.json"

    convert_coco_file(file, out, images=folder / "pictures")

    assert "<img>../pictures/a.png</img>" in asked(out)[0]
    assert check_files([out]).findings == ()


def test_pictures_are_found_through_a_linked_folder(folder):
    (folder / "far" / "away").mkdir(parents=True)
    (folder / "here").symlink_to(folder / "far" / "away")
    file, out = annotations(folder, COCO), folder / "here" / "train.json"

    convert_coco_file(file, out, images=folder / "pictures")

    assert check_files([out]).findings == ()


def test_a_record_whose_picture_is_missing_is_left_out(folder, capsys):
    (folder / "pictures" / "b.png").unlink()
    file, out = annotations(folder, COCO), folder / "train.json"

    convert_coco_file(file, out, images=folder / "pictures")

    assert len(asked(out)) == 1
    said = capsys.readouterr().out
    assert "records with an error of the kind 'missing picture': 1 (first: images[1]: pict" in said


def test_without_a_folder_pictures_keep_their_names_and_are_not_looked_for(folder, capsys):
    file, out = annotations(folder, COCO), folder / "train.json"

    convert_coco_file(file, out)

    assert asked(out)[0] == "Picture 1: <img>a.png</img>\nDetect every 猫."
    assert "pictures that were not found stay in: --images" in capsys.readouterr().out


def test_expressions_take_the_size_of_the_picture(folder):
    file, out = annotations(folder, [REFERRAL]), folder / "train.json"

    convert_refcoco_file(file, out, images=folder / "pictures")

    answer = read_records(out)[0].value["conversations"][1]["value"]
    assert answer == "<ref>the cat</ref><box>(250,250),(750,750)</box>"
    assert check_files([out]).findings == ()


def test_a_picture_that_cannot_be_read_gives_no_size(folder):
    (folder / "pictures" / "a.png").write_bytes(b"no picture")
    file, out = annotations(folder, [REFERRAL]), folder / "train.json"

    with pytest.raises(VltrainError, match="entry 0 has no `width` and `height`, and no file"):
        convert_refcoco_file(file, out, images=folder / "pictures")


def test_expressions_find_their_boxes_in_the_instances(folder):
    instances = {**COCO, "annotations": [{**COCO["annotations"][0], "id": 3}]}
    refs = [{"ann_id": 3, "sentences": [{"sent": "the cat"}], "file_name": "a_3.png"}]
    file, out = annotations(folder, refs), folder / "train.json"

    convert_refcoco_file(
        file,
        out,
        images=folder / "pictures",
        instances=annotations(folder, instances, "instances.json"),
    )

    assert asked(out) == ["Picture 1: <img>pictures/a.png</img>\nWhere is the cat?"]


def test_llavas_list_becomes_a_clean_training_file(folder):
    entries = [
        {"id": "1", "image": "a.png", "conversations": TURNS},
        {"id": "2", "image": "b.png", "conversations": [*TURNS, TURNS[1]]},  # answers twice
    ]
    file, out = annotations(folder, entries), folder / "train.json"

    convert_llava_file(file, out, images=folder / "pictures")

    assert asked(out) == ["Picture 1: <img>pictures/a.png</img>\nWhat?"]
    assert check_files([out]).findings == ()


def test_text_that_utf8_cannot_hold_is_escaped(folder):
    turns = [{"from": "human", "value": "\ud800"}, {"from": "gpt", "value": "猫"}]
    file, out = annotations(folder, [{"conversations": turns}]), folder / "train.json"

    convert_llava_file(file, out)

    assert asked(out) == ["\ud800"]


def test_json_lines_are_read(folder):
    file, out = folder / "refs.jsonl", folder / "train.json"
    file.write_text(json.dumps(REFERRAL) + "\n" + json.dumps(REFERRAL) + "\n")

    convert_refcoco_file(file, out, images=folder / "pictures")

    assert len(asked(out)) == 2


class Trap:
    """Writes a file when a pickle of it is opened."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", ["refs(unc).p", "refs.json"])
def test_a_pickle_is_refused_and_never_opened(folder, name, protocol):
    file, mark = folder / name, folder / "opened"
    file.write_bytes(pickle.dumps([Trap(mark)], protocol))

    with pytest.raises(VltrainError, match="is a pickle"):
        convert_refcoco_file(file, folder / "train.json")
    with pytest.raises(VltrainError, match="is a pickle"):
        convert_coco_file(file, folder / "train.json")
    assert not mark.exists()


def test_what_is_there_is_not_overwritten(folder):
    file, out = annotations(folder, COCO), folder / "train.json"
    out.write_text("mine")

    with pytest.raises(VltrainError, match=r"train\.json: is there already"):
        convert_coco_file(file, out)
    assert out.read_text() == "mine"


def test_a_draft_of_somebody_else_is_not_overwritten(folder):
    file, draft = annotations(folder, COCO), folder / "train.partial.json"
    draft.write_text("mine")

    with pytest.raises(VltrainError, match=r"train\.partial\.json: is there already"):
        convert_coco_file(file, folder / "train.json")
    assert draft.read_text() == "mine"


def test_nothing_to_write_is_an_error_that_says_why_and_leaves_no_file(folder):
    file = annotations(folder, COCO | {"annotations": []})

    with pytest.raises(VltrainError) as error:
        convert_coco_file(file, folder / "train.json")

    assert str(error.value) == (
        f"{file}: nothing is left to write\n"
        "  left out:\n"
        "    pictures without a box: 2 (first: images[0])\n"
        "  fix: see why each was left out"
    )
    assert sorted(path.name for path in folder.iterdir()) == ["annotations.json", "pictures"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\ufeff[]", "no object of lists"),
        ('{"images": ' + "9" * 5000 + "}", "not JSON"),
    ],
)
def test_a_file_that_is_no_annotations_is_refused(folder, text, fault):
    file = folder / "instances.json"
    file.write_text(text, encoding="utf-8")

    with pytest.raises(VltrainError, match=fault):
        convert_coco_file(file, folder / "train.json")


def test_other_encodings_are_refused(folder):
    file = folder / "instances.json"
    file.write_text(json.dumps(COCO, ensure_ascii=False), encoding="utf-16")

    with pytest.raises(VltrainError, match="not JSON: 'utf-8' codec"):
        convert_coco_file(file, folder / "train.json")


def test_what_cannot_be_is_said_before_anything_is_read(folder):
    absent = folder / "absent.json"

    with pytest.raises(VltrainError, match=r"train\.txt: is no name of a training file"):
        convert_coco_file(absent, folder / "train.txt")
    with pytest.raises(VltrainError, match="its folder is not there"):
        convert_llava_file(absent, folder / "no" / "train.json")
    with pytest.raises(VltrainError, match="no: is no folder"):
        convert_refcoco_file(absent, folder / "train.json", images=folder / "no")
    with pytest.raises(VltrainError, match="cannot be read"):
        convert_coco_file(absent, folder / "train.json")
    with pytest.raises(VltrainError, match="cannot be read"):
        convert_llava_file(absent, folder / "train.json")


def test_the_commands_output_passes_the_check_command(folder):
    annotations(folder, COCO)
    run = [sys.executable, "-m", "vltrain"]
    words = ["convert", "coco", "annotations.json", "-o", "train.json", "--images", "pictures"]

    subprocess.run([*run, *words], cwd=folder, check=True, capture_output=True)
    checked = subprocess.run(
        [*run, "check", "train.json"], cwd=folder, capture_output=True, text=True
    )

    assert checked.stdout == "2 records: 0 errors, 0 warnings\n"
