"""Qwen-VL's tokenizer, against outputs of the original and on a vocabulary of our own."""

import base64
import copy
import json
import pickle
from pathlib import Path

import pytest

from vltrain.errors import VltrainError
from vltrain.models.qwen_vl.tokenization import (
    PIECES,
    SPECIAL_TOKENS,
    QwenVLTokenizer,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer"

ENCODE_DECODE = json.loads((GOLDEN / "encode_decode.json").read_text())
DECODE_IDS = json.loads((GOLDEN / "decode_ids.json").read_text())
IMAGE_START_ID = 151857
# Pictures are laid out by the sample's encoding, never by the tokenizer.
TEXTS = [case for case in ENCODE_DECODE if "<img>" not in case["text"]]
DECODABLE = [c for c in DECODE_IDS if "result" in c["decode"] and IMAGE_START_ID not in c["ids"]]
MERGES = (b"he", b"ll", b"hell", b"hello")  # ids 256..259


@pytest.fixture(scope="module")
def tokenizer(qwen_vocabulary):
    return QwenVLTokenizer(qwen_vocabulary)


@pytest.fixture
def small_vocabulary(tmp_path):
    return write_vocabulary(tmp_path / "qwen.tiktoken", b"\n")


def write_vocabulary(path, line_end):
    tokens = [bytes([byte]) for byte in range(256)] + list(MERGES)
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    path.write_bytes(line_end.join(lines) + line_end)
    return path


def test_special_tokens_have_the_published_ids(tokenizer):
    special = json.loads((GOLDEN / "special.json").read_text())

    assert len(tokenizer) == special["len_tokenizer"] == 151860
    assert tokenizer.vocab_size == special["n_mergeable"]
    assert (
        dict(zip(SPECIAL_TOKENS, range(151643, 151860), strict=True)) == (special["special_tokens"])
    )
    assert tokenizer.convert_tokens_to_ids(["<ref>", "<imgpad>"]) == [151851, 151859]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 151643
    assert special["pat_str"] == PIECES


@pytest.mark.parametrize("case", TEXTS, ids=range(len(TEXTS)))
def test_a_trusted_text_has_the_ids_of_the_original(tokenizer, case):
    encoded = tokenizer(case["text"], split_special_tokens=False)

    assert encoded.input_ids == case["call_ids"]["result"]


@pytest.mark.parametrize("case", TEXTS, ids=range(len(TEXTS)))
def test_ids_decode_to_the_text_of_the_original(tokenizer, case):
    ids = case["call_ids"]["result"]
    with_markup = case["decode_skip_special_keep_image_chat_rev"]["result"]

    assert tokenizer.decode(ids) == case["decode"]["result"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == case["decode_skip_special"]["result"]
    assert tokenizer.decode(ids, skip_special_tokens=True, keep_markup=True) == with_markup


@pytest.mark.parametrize("case", DECODABLE, ids=range(len(DECODABLE)))
def test_single_ids_decode_as_the_original_decodes_them(tokenizer, case):
    assert tokenizer.decode(case["ids"]) == case["decode"]["result"]
    assert tokenizer.decode(case["ids"], errors="ignore") == case["decode_ignore"]["result"]
    assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["skip"]["result"]


def test_control_tokens_inside_a_text_stay_text(tokenizer):
    plain = "<|im_end|>\n<|im_start|>system\n<img>x<imgpad><|endoftext|><|extra_0|>"

    ids = tokenizer(plain).input_ids

    assert max(ids) < 151643
    assert tokenizer.decode(ids) == plain


def test_the_markup_of_boxes_inside_a_text_is_read(tokenizer):
    ids = tokenizer("<ref>a</ref><box>(1,2)</box><quad></quad></img>").input_ids

    special = [i for i in ids if i >= 151643]
    assert special == [151851, 151852, 151853, 151854, 151855, 151856, 151858]


def test_decomposed_characters_are_composed(tokenizer):
    assert tokenizer("e\u0301").input_ids == tokenizer("\u00e9").input_ids == [963]


def test_tokens_that_are_no_text_by_themselves_come_back(tokenizer):
    halves = [124026, 246]  # of one character beyond the basic plane

    tokens = tokenizer.convert_ids_to_tokens(halves)

    assert tokenizer.convert_tokens_to_ids(tokens) == halves
    assert tokenizer.convert_tokens_to_string(tokens) == tokenizer.decode(halves) == "𝔘"


def test_every_token_has_a_string_of_its_own(tokenizer):
    vocabulary = tokenizer.get_vocab()

    assert len(vocabulary) == 151860
    assert sorted(vocabulary.values()) == list(range(151860))


def test_an_id_without_a_token_decodes_to_the_replacement_character(tokenizer):
    assert tokenizer.decode([9707, 151935]) == "Hello\ufffd"
    assert tokenizer.decode([9707, 151935], skip_special_tokens=True) == "Hello"


def test_a_batch_is_padded_with_end_of_text(tokenizer):
    batch = tokenizer(["Hello", "Hello, world!"], padding=True)

    assert batch.input_ids == [[9707, 151643, 151643, 151643], [9707, 11, 1879, 0]]
    assert batch.attention_mask == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True)[0] == "Hello"


def test_special_ids_start_where_the_vocabulary_ends(small_vocabulary):
    tokenizer = QwenVLTokenizer(small_vocabulary)

    assert tokenizer("hello he").input_ids == [259, 32, 256]
    assert tokenizer.pad_token_id == 260
    assert tokenizer.convert_tokens_to_ids("<imgpad>") == 260 + 216
    assert len(tokenizer) == 260 + 217


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_saving_writes_the_vocabulary_byte_for_byte(tmp_path, line_end):
    source = write_vocabulary(tmp_path / "qwen.tiktoken", line_end)

    QwenVLTokenizer(source).save_pretrained(tmp_path / "saved")

    assert (tmp_path / "saved" / "qwen.tiktoken").read_bytes() == source.read_bytes()
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved == {"model_max_length": 8192, "tokenizer_class": "QwenVLTokenizer"}


def test_a_saved_tokenizer_is_loaded_by_from_pretrained(tmp_path, small_vocabulary):
    QwenVLTokenizer(small_vocabulary).save_pretrained(tmp_path / "saved")

    again = QwenVLTokenizer.from_pretrained(tmp_path / "saved")

    assert again("hello<box><|im_end|>").input_ids[:2] == [259, 260 + 210]
    assert again.decode(again("hello<|im_end|>").input_ids) == "hello<|im_end|>"
    assert again.pad_token_id == 260


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_a_copy_for_another_process_encodes_alike(small_vocabulary, duplicate):
    again = duplicate(QwenVLTokenizer(small_vocabulary))

    assert again("hello<box>").input_ids == [259, 260 + 210]
    assert again.decode([259, 470]) == "hello<box>"


def test_a_missing_vocabulary_says_where_to_get_it(tmp_path):
    with pytest.raises(VltrainError, match=r"no qwen\.tiktoken[\s\S]*Qwen/Qwen-VL-Chat"):
        QwenVLTokenizer(tmp_path / "qwen.tiktoken")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "line 1 is not"),
        (b"IQ== 0\nIg== one\n", "line 2 is not"),
        (b"IQ== 0\nIg== 2\n", r"not 0\.\.1, each once"),
        (b"IQ== 0\nIg== 1\n", "254 of the 256 single bytes"),
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path, content, fault):
    (tmp_path / "qwen.tiktoken").write_bytes(content)

    with pytest.raises(VltrainError, match=fault):
        QwenVLTokenizer(tmp_path / "qwen.tiktoken")
