"""What repeats in a data set, and what is unlike the rest of it, is found by name."""

import json

import pytest
from letters import LetterProcessor, record
from PIL import Image

from vltrain.data.checks import check_files
from vltrain.data.tallies import Majority, PixelScale, Spot


def written(path, *values):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def found(files, **options):
    """Place and kind of each finding; all of them must be warnings with a fix."""
    report = check_files(files, **options)
    assert report.errors == ()
    assert all(finding.fix for finding in report.findings)
    return [(finding.record, finding.kind) for finding in report.findings]


def message(files, **options):
    (finding,) = check_files(files, **options).findings
    return finding.message


def test_a_record_that_repeats_another_is_found_with_the_name_of_the_first(tmp_path):
    values = [record("q", "a", id=1), record("r", "a", id=2), record("q", "a", id=3)]

    (finding,) = check_files([written(tmp_path / "train.json", *values)]).findings

    assert (finding.record, finding.id, finding.kind) == (2, "3", "duplicate")
    assert finding.message == "repeats train.json#0 word for word"


def test_each_repetition_names_the_first(tmp_path):
    values = [record("q", "a"), record("q", "a"), record("q", "a")]

    findings = check_files([written(tmp_path / "train.json", *values)]).findings

    assert [finding.record for finding in findings] == [1, 2]
    assert {finding.message for finding in findings} == {"repeats train.json#0 word for word"}


def test_an_evaluation_file_that_repeats_training_data_is_seen(tmp_path):
    train = written(tmp_path / "train.json", record("q", "a"), record("r", "a"))
    held_out = written(tmp_path / "eval.json", record("s", "a"), record("r", "a"))

    (finding,) = check_files([train, held_out]).findings

    assert (finding.file, finding.record) == (str(held_out), 1)
    assert finding.message == f"repeats {train}#1 word for word"


def test_two_forms_of_one_conversation_are_the_same(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]

    assert found([written(tmp_path / "a.json", record("q", "a"), {"messages": messages})]) == [
        (1, "duplicate")
    ]


@pytest.mark.parametrize(
    "other",
    [
        record("q", "b"),
        record("q", "a", "q", "a"),
        record("q", "a", system="Be brief."),
        record("qa", ""),
        {
            "conversations": [
                {"from": "user", "value": "q"},
                {"from": "assistant", "value": "a"},
                {"from": "user", "value": "r"},
                {"from": "assistant", "value": "b", "weight": 0},
            ]
        },
    ],
)
def test_another_text_turn_or_system_is_another_record(tmp_path, other):
    report = check_files([written(tmp_path / "a.json", record("q", "a"), other)])

    assert "duplicate" not in [finding.kind for finding in report.findings]


def test_a_record_that_is_changed_in_reading_is_not_what_another_says(tmp_path):
    leading = {"conversations": [{"from": "assistant", "value": "Hi."}]}
    leading["conversations"] += record("q", "a")["conversations"]

    assert found([written(tmp_path / "a.json", record("q", "a"), leading, leading)]) == [
        (1, "leading_assistant"),
        (2, "leading_assistant"),
        (2, "duplicate"),
    ]


def test_one_name_for_two_pictures_is_no_repetition(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    value = record("<img>1.png</img>q", "a")
    files = [written(tmp_path / name / "data.json", value) for name in ("a", "b")]

    assert found(files) == []


def test_the_same_picture_under_two_names_of_its_path_is_a_repetition(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    values = [record(f"<img>{name}</img>q", "a") for name in ("1.png", "./1.png")]

    assert found([written(tmp_path / "a.json", *values)]) == [(1, "duplicate")]


def test_records_that_cannot_be_read_repeat_nothing(tmp_path):
    report = check_files([written(tmp_path / "a.json", {}, {}, record("q"), record("q"))])

    assert {finding.kind for finding in report.findings} == {"no_conversations", "nothing_to_learn"}


def test_repetitions_are_found_across_chunks_files_and_empty_lines(tmp_path):
    lines = [json.dumps(record("q", str(number % 600))) for number in range(1100)]
    lines[550] = ""
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(lines))
    other = written(tmp_path / "b.json", record("q", "7"))

    alone = check_files([file, other])
    together = check_files([file, other], workers=2)

    repeated = [f.record for f in alone.findings if f.file == str(file)]
    assert repeated == list(range(600, 1100))
    assert alone.findings[0].message == "repeats a.jsonl#0 word for word"
    assert alone.findings[-1].message == f"repeats {file}#7 word for word"
    assert together == alone


def answers(tmp_path, *texts):
    values = [record(f"question {number}", text) for number, text in enumerate(texts)]
    return [written(tmp_path / "a.json", *values)]


def test_nearly_nothing_but_one_answer_is_found_and_counted(tmp_path):
    files = answers(tmp_path, "no", *["Yes, it is."] * 19)

    assert found(files) == [(None, "one_answer")]
    assert message(files) == "19 of 20 learned answers are 'Yes, it is.'"


def test_a_long_answer_is_shown_short(tmp_path):
    files = answers(tmp_path, *["y" * 70] * 20)

    assert message(files) == f"20 of 20 learned answers are '{'y' * 60}…'"


@pytest.mark.parametrize(
    "texts",
    [["yes"] * 19, ["yes"] * 18 + ["no"] * 2, [str(number) for number in range(40)]],
    ids=["few", "less than 95 %", "all different"],
)
def test_other_answers_or_few_of_them_are_left_alone(tmp_path, texts):
    assert found(answers(tmp_path, *texts)) == []


def test_answers_that_are_not_learned_do_not_count(tmp_path):
    def value(number):
        turns = record(f"question {number}", "yes", "And?", f"answer {number}")
        turns["conversations"][1]["weight"] = 0
        return turns

    assert found([written(tmp_path / "a.json", *map(value, range(30)))]) == []


def test_silence_is_no_answer_that_many_records_share(tmp_path):
    values = [record(f"question {number}", " ", "And?", str(number)) for number in range(30)]

    report = check_files([written(tmp_path / "a.json", *values)])

    assert {finding.kind for finding in report.findings} == {"empty_turn"}


def test_one_answer_of_each_file_is_counted_for_itself(tmp_path):
    first = written(tmp_path / "a.json", *[record(f"a{n}", "yes") for n in range(20)])
    second = written(tmp_path / "b.json", *[record(f"b{n}", "no") for n in range(1200)])

    findings = check_files([first, second], workers=2).findings

    assert [(finding.file, finding.message) for finding in findings] == [
        (str(first), "20 of 20 learned answers are 'yes'"),
        (str(second), "1,200 of 1,200 learned answers are 'no'"),
    ]


def test_a_majority_outlives_any_order_of_the_rest():
    texts = ["yes" if number % 3 else str(number) for number in range(300)]
    count = Majority()
    for start in range(0, 300, 50):
        part = Majority()
        for text in texts[start : start + 50]:
            part.add(text)
        count.add(part.text, part.lead, part.total)

    assert (count.text, count.total) == ("yes", 300)
    assert count.lead >= 100


def boxed(tmp_path, boxes, size=(320, 200)):
    """A file of records about one picture of that size, a box in each answer."""
    Image.new("RGB", size).save(tmp_path / "p.png")
    values = [
        record(f"<img>p.png</img>question {number}", "<box>({},{}),({},{})</box>".format(*box))
        for number, box in enumerate(boxes)
    ]
    return [written(tmp_path / "a.json", *values)]


IN_PIXELS = [(10, 20, 310, 190), (0, 0, 100, 100), (200, 50, 280, 150), (5, 5, 20, 199)]


def test_boxes_that_look_like_pixels_are_found(tmp_path):
    files = boxed(tmp_path, IN_PIXELS)

    assert found(files) == [(None, "pixel_boxes")]


@pytest.mark.parametrize(
    ("boxes", "size"),
    [
        ([*IN_PIXELS, (0, 0, 999, 300)], (320, 200)),
        (IN_PIXELS[:3], (320, 200)),
        (IN_PIXELS[:1] * 30, (320, 200)),
        ([(n, n, n + 50, n + 40) for n in range(59)], (320, 200)),
        (IN_PIXELS, (1200, 1000)),
    ],
    ids=["one beyond", "three boxes", "one box again and again", "one corner", "large pictures"],
)
def test_boxes_that_chance_can_put_there_are_left_alone(tmp_path, boxes, size):
    assert "pixel_boxes" not in [kind for _, kind in found(boxed(tmp_path, boxes, size))]


def test_boxes_without_a_picture_are_left_alone(tmp_path):
    values = [record(f"q{n}", f"<box>(1,1),({n},{n})</box>") for n in range(1, 60)]

    assert found([written(tmp_path / "a.json", *values)]) == []


def test_a_box_beyond_the_grid_but_on_the_picture_is_said_to_look_like_pixels(tmp_path):
    files = boxed(tmp_path, [(100, 100, 1200, 700)], size=(1280, 720))

    (finding,) = check_files(files).findings

    assert finding.kind == "box_out_of_range"
    assert finding.message.endswith("; it looks like pixels of the picture's 1280 x 720")
    assert "1000 · x / width" in finding.fix
    assert "vltrain convert" in finding.fix


def test_a_box_beyond_grid_and_picture_is_just_out_of_range(tmp_path):
    files = boxed(tmp_path, [(100, 100, 1300, 700)], size=(1280, 720))

    assert "pixels" not in message(files)


def test_what_looks_like_pixels_does_not_depend_on_where_chunks_end():
    spots = [Spot(3 * n, 2 * n, 320, 200) for n in range(1, 100)]
    whole, parts = PixelScale(), PixelScale()
    whole.add(spots)
    for start in (0, 30, 60, 90):
        part = PixelScale()
        part.add(spots[start : start + 30])
        parts.fits = parts.fits and part.fits
        parts.add(part.spots)

    assert list(whole.spots) == list(parts.spots)
    assert whole.looks_like_pixels == parts.looks_like_pixels


def test_a_record_far_longer_than_the_rest_is_found(tmp_path):
    usual = [record(f"q{n}", "a" * (10 + n)) for n in range(20)]
    long = record("q", "b" * 5000, id="long")
    files = [written(tmp_path / "a.json", *usual, long)]

    assert found(files) == [(20, "odd_length")]
    assert message(files) == (
        "5,001 characters, far more than usual: half of the others have up to 23, 95 % up to 31"
    )


def test_a_record_far_shorter_than_the_rest_is_found(tmp_path):
    usual = [record("q", f"{n:02d}" + "a" * 2000) for n in range(20)]
    files = [written(tmp_path / "a.json", *usual, record("q", "b"))]

    assert found(files) == [(20, "odd_length")]
    assert "far fewer than usual" in message(files)


def test_with_a_model_lengths_are_counted_in_tokens(tmp_path):
    usual = [record("q", str(n)) for n in range(20)]
    files = [written(tmp_path / "a.json", *usual, record("q", "b" * 1000))]

    assert message(files, processor=LetterProcessor()).startswith("1,033 tokens, far more")


def test_a_record_over_the_limit_is_not_said_to_be_odd_as_well(tmp_path):
    usual = [record("q", str(n)) for n in range(20)]
    files = [written(tmp_path / "a.json", *usual, record("q", "b" * 1000))]

    report = check_files(files, processor=LetterProcessor(), max_length=500)

    assert [finding.kind for finding in report.findings] == ["too_long"]


@pytest.mark.parametrize(
    "lengths",
    [[10] * 8 + [5000], [10] * 20 + [300], [10] * 90 + [5000] * 10, list(range(1, 3000, 100))],
    ids=["few records", "still short", "a kind of their own", "all lengths"],
)
def test_lengths_that_are_not_odd_are_left_alone(tmp_path, lengths):
    values = [record("q", f"{n:02d}" + "a" * length) for n, length in enumerate(lengths)]

    assert found([written(tmp_path / "a.json", *values)]) == []


def test_three_records_are_too_few_to_call_anything_odd(tmp_path):
    values = [record("q", "yes"), record("r", "yes"), record("s" * 9000, "yes")]

    assert found([written(tmp_path / "a.json", *values)]) == []
