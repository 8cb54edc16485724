"""One answer at a time from Python: what is asked, what is shown again, what comes back."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_cases import GOLDEN, REAL448, with_image_pads, write_embeddings
from PIL import Image
from tiny import write_qwen_vl

import vltrain
from vltrain.data.pictures import LOCAL_PICTURES
from vltrain.errors import VltrainError
from vltrain.models import load_model, load_processor
from vltrain.workflows import dialogue
from vltrain.workflows.dialogue import (
    answer_turn,
    chat_prompt,
    plain_prompt,
    system_turn,
    user_turn,
    with_pictures,
    within_window,
)

MAKE_CONTEXT = json.loads((GOLDEN / "tokenizer" / "make_context.json").read_text())
CHATS = [case for case in MAKE_CONTEXT if "chat_format" not in case["input"]]
GENERATION = json.loads((GOLDEN / "generation" / "real448.json").read_text())
IMAGE_START_ID = 151857


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("dialogue") / "model")


@pytest.fixture(scope="module")
def model(folder: Path):
    return load_model(folder)


@pytest.fixture(scope="module")
def processor(folder: Path):
    return load_processor(folder)


@pytest.fixture(scope="module")
def original(tmp_path_factory, qwen_vocabulary: Path) -> Path:
    """The golden checkpoint with the real vocabulary, as a user's folder would be."""
    folder = tmp_path_factory.mktemp("golden") / REAL448.name
    shutil.copytree(REAL448.folder, folder, ignore=shutil.ignore_patterns("cases*"))
    write_embeddings(folder)
    shutil.copy(qwen_vocabulary, folder / "qwen.tiktoken")
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids of each prompt that a model is given."""
    seen: list[list[int]] = []

    def listening(model, processor, prompt, *args, **named):
        seen.append(list(prompt.input_ids))
        return say(model, processor, prompt, *args, **named)

    say = dialogue.say
    monkeypatch.setattr(dialogue, "say", listening)
    return seen


@pytest.mark.parametrize("case", CHATS, ids=lambda case: case["input"]["query"][:5])
def test_a_chat_asks_with_the_ids_of_the_original(case, qwen_vocabulary):
    from vltrain.models.qwen_vl.processing import QwenVLImageProcessor, QwenVLProcessor
    from vltrain.models.qwen_vl.tokenization import QwenVLTokenizer

    processor = QwenVLProcessor(QwenVLTokenizer(qwen_vocabulary), QwenVLImageProcessor())
    given = case["input"]
    said = [(user_turn(q), answer_turn(a)) for q, a in given["history"] or []]

    kept = within_window(said, processor, given["system"], given.get("max_window_size", 6144))
    turns = [*system_turn(given["system"]), *(t for pair in kept for t in pair)]
    prompt = chat_prompt([*turns, user_turn(given["query"])], processor, LOCAL_PICTURES)

    expected = case["out"]["result"]["context_tokens"]
    assert prompt.input_ids == with_image_pads(expected, IMAGE_START_ID)[0]


@pytest.mark.parametrize("name", GENERATION)
def test_a_chat_answers_as_the_original(name, original, monkeypatch):
    monkeypatch.chdir(GOLDEN)  # the pictures' paths start there
    golden = GENERATION[name]
    model, processor = load_model(original, dtype=torch.float32), load_processor(original)
    pieces: list[str] = []

    answer, history = vltrain.chat(
        model,
        processor,
        golden["query"],
        max_new_tokens=golden["max_new_tokens"],
        listener=pieces.append,
    )

    expected = processor.tokenizer.decode(golden["new_tokens"], skip_special_tokens=True)
    assert answer == "".join(pieces) == expected
    assert history == [(golden["query"], expected)]


def test_the_history_is_shown_with_the_next_query(model, processor, asked):
    _, history = vltrain.chat(model, processor, "one", max_new_tokens=2)
    answer, longer = vltrain.chat(model, processor, "two", history, max_new_tokens=2)

    turns = [user_turn("one"), answer_turn(history[0][1]), user_turn("two")]
    assert asked[1] == chat_prompt(turns, processor, LOCAL_PICTURES).input_ids
    assert longer == [*history, ("two", answer)]
    assert [query for query, _ in history] == ["one"]


def test_pictures_are_numbered_through_the_conversation(model, processor, tmp_path):
    red, blue = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (9, 9), "blue")
    red.save(tmp_path / "red.png")

    _, first = vltrain.chat(model, processor, "a", images=[tmp_path / "red.png"], max_new_tokens=1)
    _, both = vltrain.chat(model, processor, "b", first, [blue], max_new_tokens=1)

    assert first[0][0] == f"Picture 1: <img>{tmp_path / 'red.png'}</img>\na"
    assert both[1][0].startswith("Picture 2: <img>data:image/png;base64,")
    assert both[1][0].endswith("</img>\nb")


def test_a_picture_is_seen_the_same_with_and_without_a_path(model, processor, tmp_path):
    picture = Image.effect_noise((40, 30), 90).convert("RGB")
    picture.save(tmp_path / "noise.png")
    other = Image.new("RGB", (40, 30))

    def logits(image) -> torch.Tensor:
        turn = user_turn(with_pictures("what?", [dialogue.source_of(image)], first=1))
        prompt = chat_prompt([turn], processor, LOCAL_PICTURES)
        ids = torch.tensor([prompt.input_ids])
        with torch.inference_mode():
            return model(input_ids=ids, pixel_values=prompt.load_pixels()).logits

    by_path, itself = logits(tmp_path / "noise.png"), logits(picture)
    assert torch.equal(by_path, itself)
    assert not torch.equal(itself, logits(other))


def test_a_list_is_asked_as_its_text(model, processor, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    elements = [{"image": str(tmp_path / "a.png")}, {"text": "What?"}]

    _, history = vltrain.chat(model, processor, elements, max_new_tokens=1)

    assert history[0][0] == f"Picture 1: <img>{tmp_path / 'a.png'}</img>\nWhat?"


def test_a_picture_that_a_model_named_in_its_answer_is_not_opened(model, processor):
    history = [("hi", "<img>/no/such/picture.png</img>")]

    answer, _ = vltrain.chat(model, processor, "and?", history, max_new_tokens=1)

    assert isinstance(answer, str)


def test_an_answer_stops_where_the_model_opens_another_turn(folder, processor):
    model = load_model(folder)
    with torch.no_grad():  # every hidden state now points at <|im_start|>, id 257
        model.lm_head.weight[257] = 100 * model.lm_head.weight.abs().sum(0)
        model.transformer.ln_f.weight.abs_()
        model.lm_head.weight.abs_()
    ticks: list[str] = []

    answer, _ = vltrain.chat(model, processor, "q", listener=ticks.append)

    assert answer == ""
    assert ticks == []


def test_a_window_too_small_for_the_last_exchange_shows_none(processor):
    exchanges = [(user_turn("one"), answer_turn("1")), (user_turn("two"), answer_turn("2"))]
    # "<s>S<e>\n" is 9 tokens of system turn less one, an exchange "<s>user\n…<e>\n<s>assistant\n…"
    size = len("?system\nS?") + len("?user\ntwo?\n?assistant\n2?\n")

    assert within_window(exchanges, processor, "S", size) == []
    assert within_window(exchanges, processor, "S", size + 1) == exchanges[1:]


def test_draws_differ_and_follow_the_seed(model, processor):
    def drawn(seed: int) -> str:
        torch.manual_seed(seed)
        return vltrain.chat(model, processor, "q", max_new_tokens=12, temperature=1.0)[0]

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 0.5}, "top_p means nothing at temperature 0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(model, processor, options, fault):
    with pytest.raises(VltrainError, match=fault):
        vltrain.chat(model, processor, "q", **options)


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("<img>gone.png</img>what?", "gone.png"),
        ("<img>gone.png what?", "<img> without its end"),
        ("<img>https://localhost/a.png</img>what?", "not downloaded"),
    ],
)
def test_a_picture_that_cannot_be_shown_is_refused(model, processor, query, fault):
    with pytest.raises(VltrainError, match=fault):
        vltrain.chat(model, processor, query)


def test_a_completion_has_no_turns_around_it(processor):
    parts = user_turn("<img>a.png</img>Generate the caption:").parts

    ids = plain_prompt(parts, processor, LOCAL_PICTURES).input_ids

    assert ids == [470, 472, 472, 472, 472, 471, *b"Generate the caption:"]


def test_a_completion_goes_on_past_the_end_of_a_turn(folder, processor, asked, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    model = load_model(folder)
    said = iter([*b"<", 466, *b"(1,2),(3,4)", 467, 258, *b"!", 256, *b"never"])
    starts = len([470, *[472] * 4, 471, *b"G:"])

    def speak(_module, _inputs, logits):
        forced = torch.full_like(logits, -1e4)
        forced[..., next(said)] = 0
        return forced

    model.lm_head.register_forward_hook(speak)

    text = vltrain.complete(model, processor, "G:", [tmp_path / "a.png"])

    assert len(asked[0]) == starts
    assert text == "<<box>(1,2),(3,4)</box>!"


def test_an_empty_completion_is_refused(model, processor):
    with pytest.raises(VltrainError, match="text: it is empty"):
        vltrain.complete(model, processor, "")


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, vltrain; print({'torch', 'transformers'} & sys.modules.keys() or 'light')"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert done.stdout == "light\n"


def test_a_name_that_the_package_lacks_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'chatt'"):
        _ = vltrain.chatt
