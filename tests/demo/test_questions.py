import numpy as np
import pytest
from PIL import Image

from vltrain.demo import plans
from vltrain.demo.questions import Asker, Picture, kinds_of, record
from vltrain.demo.scenes import PlacedGlyph, Scene


def picture(*names: str, file: str = "images/a.png") -> Picture:
    glyphs = tuple(
        PlacedGlyph(name, (100 * i, 20, 100 * i + 90, 300)) for i, name in enumerate(names)
    )
    return Picture(file, Scene(Image.new("RGB", (112, 112)), glyphs))


def asker(language: str = "en", subject: str = "digit", seed: int = 0) -> Asker:
    return Asker(language, subject, np.random.default_rng(seed))


def test_a_single_digit_is_answered_by_itself():
    assert asker().single(picture("7")).answer == "7"


def test_several_digits_are_read_from_left_to_right():
    assert asker().several(picture("3", "1", "4")).answer == "3 1 4"


def test_a_count_counts_equal_digits_too():
    assert asker().count(picture("3", "3")).answer == "2"


def test_a_box_answers_where_the_only_digit_is_and_the_question_names_it():
    exchange = asker().point(picture("5"))

    assert "5" in exchange.question
    assert exchange.answer == "<ref>5</ref><box>(0,20),(90,300)</box>"


def test_several_digits_get_a_box_each_from_left_to_right_and_no_name_in_the_question():
    exchange = asker().point(picture("3", "3"))

    assert "3" not in exchange.question
    assert exchange.answer == (
        "<ref>3</ref><box>(0,20),(90,300)</box><ref>3</ref><box>(100,20),(190,300)</box>"
    )


@pytest.mark.parametrize(("language", "answer"), [("en", "Picture 2"), ("zh", "图2")])
def test_of_two_single_digits_the_greater_one_is_asked_for(language, answer):
    assert asker(language).compare(picture("3"), picture("8")).answer == answer


def test_of_pictures_with_more_digits_the_number_of_digits_is_asked_for():
    assert asker().compare(picture("1", "2", "3"), picture("9")).answer == "Picture 1"


def test_pictures_that_do_not_differ_are_not_compared():
    assert asker().compare(picture("4"), picture("4")) is None
    assert asker(subject="letter").compare(picture("A"), picture("B")) is None


def test_shapes_have_names_in_both_languages():
    assert asker("en", "shape").single(picture("star")).answer == "star"
    assert asker("zh", "shape").single(picture("star")).answer == "星形"


def test_a_record_numbers_its_pictures_across_turns_and_names_the_kinds_in_its_id():
    first, second = picture("3", file="images/a.png"), picture("8", file="images/b.png")
    ask = asker()
    exchanges = [ask.single(first), ask.single(second), ask.compare(first, second, bring=())]

    made = record("train-0001", exchanges)

    asked = [turn["value"].split("\n")[0] for turn in made["conversations"][::2]]
    assert asked[0] == "Picture 1: <img>images/a.png</img>"
    assert asked[1] == "Picture 2: <img>images/b.png</img>"
    assert "<img>" not in asked[2]
    assert [turn["value"] for turn in made["conversations"][1::2]] == ["3", "8", "Picture 2"]
    assert made["id"] == "train-0001:single+single+compare"
    assert kinds_of(made["id"]) == ["single", "single", "compare"]


@pytest.mark.parametrize("seed", range(20))
def test_mixed_questions_bring_their_picture_once_and_never_give_a_single_sign_away(seed):
    exchanges = plans.mixed(asker(seed=seed), picture("7"))

    assert [len(exchange.pictures) for exchange in exchanges] == [1] + [0] * (len(exchanges) - 1)
    kinds = [exchange.kind for exchange in exchanges]
    assert "point" not in kinds[:-1]


def test_every_picture_comes_before_one_comes_again():
    pictures = [picture("1", file=str(i)) for i in range(5)]
    draw = plans.Drawer({1: pictures}, np.random.default_rng(0))

    assert {draw(1).file for _ in range(5)} == set("01234")
