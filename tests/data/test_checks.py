"""Every fault of a data file is found, with its place, and clean data is left alone."""

import json
from pathlib import Path

import pytest
from letters import LetterProcessor, record
from PIL import Image

from vltrain.data import checks
from vltrain.data.checks import Checker, Finding, check_files
from vltrain.data.faults import Fault
from vltrain.data.grounding import parse_boxes
from vltrain.data.images import open_image
from vltrain.data.pictures import Pictures
from vltrain.data.records import Record, Unreadable

EXAMPLES = Path(__file__).parents[2] / "data_examples"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a good picture and two bad ones; the working directory lies elsewhere."""
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return tmp_path


def checked(folder, *values, **options):
    file = folder / "train.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    return check_files([file], **options)


def turns(*pairs):
    return {"conversations": [{"from": role, "value": value} for role, value in pairs]}


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ([], "not_an_object"),
        ({"conversation": []}, "no_conversations"),
        ({"conversations": []}, "empty_conversation"),
        ({"conversations": [{"from": "user"}]}, "bad_turn"),
        (turns(("bot", "q"), ("assistant", "a")), "role"),
        (turns(("user", "q"), ("user", "q"), ("assistant", "a")), "order"),
        (turns(("user", "q")), "nothing_to_learn"),
        (record("", "a"), "empty_turn"),
        (record("q", "", "q", "a"), "empty_turn"),
        (record("<img>good.png\nq", "a"), "unclosed_tag"),
        (record("<img>good.png<img>good.png</img>", "a"), "nested_tag"),
        (record("good.png</img>", "a"), "stray_tag"),
        (record("<img></img>q", "a"), "empty_path"),
        (record("<img>no.png</img>q", "a"), "missing_picture"),
        (record("<img>bad.png</img>q", "a"), "broken_picture"),
        (record("<img>empty.png</img>q", "a"), "zero_size_picture"),
        (record("<img>file:///good.png</img>q", "a"), "unknown_scheme"),
        (record("<img>ftp://x.org/good.png</img>q", "a"), "unknown_scheme"),
        (record("<img>https://x.org/good.png</img>q", "a"), "url"),
        (record("<img>data:image/png;base64,*</img>q", "a"), "bad_data_uri"),
        (record("q", "<box>(1,2),(3)</box>"), "malformed_box"),
        (record("q", "<box>(1,2),(3,4000)</box>"), "box_out_of_range"),
        (record("q", "<box>(9,2),(3,4)</box>"), "inverted_box"),
        (record("where is <box>(9,2),(3,4)</box>?", "a"), "inverted_box"),
    ],
)
def test_an_error_is_found_with_its_record_and_id(folder, value, kind):
    if isinstance(value, dict):
        value["id"] = "x7"
    report = checked(folder, record("q", "a"), value)

    assert report.records == 2
    found = report.findings[0]
    assert (found.file, found.record) == (str(folder / "train.json"), 1)
    assert found.id == ("x7" if isinstance(value, dict) else None)
    assert (found.kind, found.severity) == (kind, "error")
    assert found.message
    assert found.fix


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (turns(("assistant", "hi"), ("user", "q"), ("assistant", "a")), "leading_assistant"),
        (record("q", "<box>(1,2),(3,1000)</box>"), "box_at_1000"),
        (record("q<|im_end|>\n<|im_start|>assistant", "a"), "control_token"),
        (record("<imgpad>q", "a"), "control_token"),
        (record("q", "<|box_start|>(1,2),(3,4)<|box_end|>"), "foreign_box"),
        (record("q", "<loc0012><loc0100><loc0500><loc0600> cat"), "foreign_box"),
    ],
)
def test_what_is_odd_is_a_warning(folder, value, kind):
    report = checked(folder, value)

    assert [(found.kind, found.severity) for found in report.findings] == [(kind, "warning")]
    assert report.errors == ()


def test_a_grey_picture_of_16_bits_is_a_warning(folder):
    Image.new("I;16", (4, 4)).save(folder / "deep.png")

    report = checked(folder, record("<img>deep.png</img>q", "a"))

    assert [(f.kind, f.severity) for f in report.findings] == [("deep_grey", "warning")]


def test_an_answer_may_explain_control_tokens(folder):
    assert checked(folder, record("q", "ChatML ends a turn with <|im_end|>.")).findings == ()


@pytest.mark.parametrize(
    ("orientation", "answer", "kinds"),
    [
        (6, "<box>(1,2),(3,4)</box>", ["turned_picture"]),
        (6, "<quad>(1,2),(3,2),(3,4),(1,4)</quad>", ["turned_picture"]),
        (6, "a cat", []),
        (1, "<box>(1,2),(3,4)</box>", []),
    ],
)
def test_boxes_on_a_picture_that_viewers_turn_are_a_warning(folder, orientation, answer, kinds):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (8, 8)).save(folder / "turned.jpg", exif=exif)

    report = checked(folder, record("<img>turned.jpg</img>q", answer))

    assert [found.kind for found in report.findings] == kinds
    assert report.errors == ()


def test_all_findings_of_all_records_are_reported_together(folder):
    report = checked(
        folder,
        turns(("user", "<img>no.png</img>"), ("bot", "<box>(1,2)</box>")),
        {},
        record("<img>bad.png</img><img>bad.png</img>", "<ref>a"),
    )

    assert [(found.record, found.kind) for found in report.findings] == [
        (0, "role"),
        (0, "missing_picture"),
        (1, "no_conversations"),
        (2, "unclosed_tag"),
        (2, "broken_picture"),
        (2, "broken_picture"),
    ]


def test_bad_pictures_are_warnings_where_their_records_are_dropped(folder):
    values = [
        record("<img>no.png</img><img>bad.png</img>q", "a"),
        record("<img>good.png</img>q", "a"),
        record("<img>https://x.org/a.png</img>q", "a"),
    ]

    report = checked(folder, *values, bad_pictures="drop")

    assert [(found.record, found.kind, found.severity) for found in report.findings] == [
        (0, "missing_picture", "warning"),
        (0, "broken_picture", "warning"),
        (2, "url", "error"),  # a matter of the recipe, not of the picture
    ]
    assert report.dropped == 1
    assert [found.drops for found in report.findings] == [True, True, False]
    assert all(found.message.endswith(": the record is dropped") for found in report.warnings)
    assert not any(found.drops for found in checked(folder, *values).findings)


def test_a_missing_picture_says_where_it_was_looked_for(folder):
    report = checked(folder, record("<img>no.png</img>q", "a"), pictures=Pictures(folder / "pics"))

    assert report.findings[0].message.endswith(
        f"looked for {folder}/pics/no.png, {folder}/no.png, {folder}/elsewhere/no.png"
    )


def test_a_broken_line_is_found_beside_good_ones(folder):
    file = folder / "train.jsonl"
    good, better = json.dumps(record("q", "a")), json.dumps(record("q", "b"))
    file.write_text(f"{good}\n{{broken\n{better}\n")

    report = check_files([file])

    assert report.records == 3
    assert [(f.record, f.kind) for f in report.findings] == [(1, "not_json")]
    assert report.findings[0].message.startswith("not JSON: line 2, column 2")


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.json", "[{", "not_json"),
        ("a.json", "{}", "not_a_list"),
        ("a.json", "{}\n{}\n", "lines_as_list"),
        ("a.json", "[]", "no_records"),
        ("a.jsonl", "[{}]", "list_as_lines"),
    ],
)
def test_a_files_own_fault_has_no_record(folder, name, content, kind):
    (folder / name).write_text(content)

    report = check_files([folder / name])

    assert [(f.record, f.id, f.kind) for f in report.errors] == [(None, None, kind)]
    assert report.records == 0


def test_one_unreadable_file_does_not_hide_the_others(folder):
    (folder / "b.json").write_text(json.dumps([{}]))

    report = check_files([folder / "nowhere.json", folder / "b.json"])

    assert [found.kind for found in report.findings] == ["unreadable_file", "no_conversations"]


def test_a_long_sample_is_an_error_or_dropped_and_counted(folder):
    value = record("q", "a" * 99)  # 132 tokens
    limits = {"processor": LetterProcessor(), "max_length": 100}

    refused = checked(folder, value, **limits)
    dropped = checked(folder, value, **limits, too_long="drop")

    assert [(f.kind, f.severity) for f in refused.findings] == [("too_long", "error")]
    assert refused.findings[0].message == "132 tokens, data.max_length is 100"
    assert [(f.kind, f.severity) for f in dropped.findings] == [("too_long", "warning")]
    assert (refused.dropped, dropped.dropped) == (0, 1)


def test_what_the_original_took_is_a_warning_under_reference_labels(folder):
    report = checked(folder, turns(("user", "q"), ("user", "q")), labels="reference")

    assert {(found.kind, found.severity) for found in report.findings} == {
        ("order", "warning"),
        ("nothing_to_learn", "warning"),
    }


def test_a_picture_cut_short_is_found(folder):
    path = folder / "cut.jpg"
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[:2000])

    report = checked(folder, record("<img>cut.jpg</img>q", "a"))

    assert [found.kind for found in report.findings] == ["broken_picture"]


def test_the_records_before_a_broken_place_are_checked(folder):
    file = folder / "train.json"
    file.write_text('[{},\n{"conversations": ]')

    report = check_files([file])

    assert [(f.record, f.kind) for f in report.findings] == [
        (0, "no_conversations"),
        (None, "not_json"),
    ]
    assert report.findings[1].message.startswith("not JSON: line 2, column 19")


def test_two_processes_report_what_one_does(folder):
    questions = ["<img>no.png</img>" if n % 3 else "q" for n in range(1500)]
    values = [record(question, str(n)) for n, question in enumerate(questions)]
    counts = []

    alone = checked(folder, *values)
    together = checked(folder, *values, workers=2, on_checked=counts.append)

    assert len(alone.findings) == 1000
    assert together == alone
    assert sum(counts) == 1500


def test_a_bounded_number_of_pictures_is_remembered(folder, monkeypatch):
    monkeypatch.setattr(checks, "MOST_PICTURES_SEEN", 2)
    checker = Checker()
    for name in ("a", "b", "c"):
        value = record(f"<img>{name}.png</img>q", "a")
        assert [f.kind for f in checker.examine(Record(folder / "x.json", 0, value)).findings] == [
            "missing_picture"
        ]

    assert [source for _, source in checker.seen] == ["b.png", "c.png"]


def test_one_look_gives_findings_conversation_and_sample(folder):
    value = record("<img>no.png</img>q", "a", id="x7")

    seen = Checker(LetterProcessor()).examine(Record(folder / "x.json", 3, value))

    assert [(found.record, found.id, found.kind) for found in seen.findings] == [
        (3, "x7", "missing_picture")
    ]
    assert seen.conversation is not None
    assert seen.conversation.image_sources == ("no.png",)
    assert seen.sample is not None
    assert len(seen.sample.input_ids) == 11 + 13 + 14  # system, user with a picture, assistant


def test_a_refused_record_has_no_conversation_and_no_sample(folder):
    checker = Checker(LetterProcessor())
    refused = Record(folder / "x.json", 0, turns(("user", "q")))
    nowhere = Unreadable(folder / "x.jsonl", 1, Fault("not_json", "broken", "mend it"))

    for entry, kind in ((refused, "nothing_to_learn"), (nowhere, "not_json")):
        seen = checker.examine(entry)
        assert [found.kind for found in seen.findings] == [kind]
        assert (seen.conversation, seen.sample) == (None, None)


def test_without_a_processor_a_record_is_read_and_not_encoded(folder):
    seen = Checker().examine(Record(folder / "x.json", 0, record("q", "a")))

    assert seen.conversation is not None
    assert seen.sample is None


def test_a_report_has_the_form_that_other_programs_read(folder):
    report = checked(folder, {"id": 5})

    assert report.as_json() == {
        "records": 1,
        "findings": [
            {
                "file": str(folder / "train.json"),
                "record": 0,
                "id": "5",
                "severity": "error",
                "kind": "no_conversations",
                "message": "the record has no `conversations`",
                "fix": 'put its turns under "conversations"',
            }
        ],
    }
    assert isinstance(report.findings[0], Finding)


def test_a_box_in_pixels_of_a_missing_picture_is_found_beside_it(folder):
    value = {"query": "<image>q", "response": "<bbox>", "images": ["no.png"]}
    value["objects"] = {"bbox": [[1, 1, 2, 2]]}

    report = checked(folder, value)

    assert [found.kind for found in report.findings] == ["pixel_box", "missing_picture"]


def test_pictures_beside_the_turns_are_checked_like_those_in_the_text(folder):
    turns = [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}]

    report = checked(
        folder,
        {"messages": turns, "images": ["bad.png"]},
        {"messages": turns, "images": ["good.png"]},
    )

    assert [(found.record, found.kind) for found in report.findings] == [(0, "broken_picture")]


def test_a_check_reads_records_in_the_format_that_is_set(folder):
    value = record("Say <image>.", "a")

    assert [found.kind for found in checked(folder, value).findings] == ["missing_pictures"]
    assert checked(folder, value, format="qwen_vl").findings == ()


def test_the_examples_are_clean():
    files = [file for file in sorted(EXAMPLES.iterdir()) if file.suffix in (".json", ".jsonl")]

    assert check_files(files, decode=True).findings == ()


def test_the_boxes_of_the_examples_lie_on_what_they_name():
    colours = {"circle": (214, 40, 40), "square": (29, 78, 216), "triangle": (42, 157, 74)}
    picture = open_image(EXAMPLES / "images" / "shapes.png")
    answer = json.loads((EXAMPLES / "grounding.json").read_text(encoding="utf-8"))[1]
    boxes, reasons = parse_boxes(answer["conversations"][1]["value"])

    assert reasons == []
    assert len(boxes) == 3
    for box in boxes:
        left, top, right, bottom = box.in_pixels(*picture.size)
        middle = picture.getpixel((round((left + right) / 2), round((top + bottom) / 2)))
        assert middle == colours[box.ref.split()[1]]
