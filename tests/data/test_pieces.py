"""Ids become pieces that a person can read, each token in exactly one."""

from vltrain.data.encoding import Sample
from vltrain.data.pieces import Piece, pieces_of

START, PAD = 300, 301


def decode(ids: list[int]) -> str:
    """Every byte is a token; the start of a turn is one too."""
    raw = b"".join(b"<start>" if i == START else bytes([i]) for i in ids)
    return raw.decode("utf-8", errors="replace")


def pieces(input_ids: list[int], labels: list[int]) -> list[Piece]:
    sample = Sample(input_ids, labels, [])
    return pieces_of(sample, decode, control_ids={START}, image_token_ids={PAD})


def test_a_token_of_text_is_a_piece():
    assert pieces([72, 105], [-100, 105]) == [
        Piece("text", "H", (72,), learned=False),
        Piece("text", "i", (105,), learned=True),
    ]


def test_tokens_that_are_parts_of_one_character_share_a_piece():
    assert pieces([0xE5, 0x9C, 0xA8, 33], [-100] * 4) == [
        Piece("text", "在", (0xE5, 0x9C, 0xA8), learned=False),
        Piece("text", "!", (33,), learned=False),
    ]


def test_the_image_tokens_of_a_picture_are_one_piece():
    assert pieces([PAD, PAD, PAD, 33, PAD], [-100] * 5) == [
        Piece("image", "", (PAD, PAD, PAD), learned=False),
        Piece("text", "!", (33,), learned=False),
        Piece("image", "", (PAD,), learned=False),
    ]


def test_a_control_token_stands_alone_and_may_be_learned():
    assert pieces([START, 33], [START, -100]) == [
        Piece("control", "<start>", (START,), learned=True),
        Piece("text", "!", (33,), learned=False),
    ]


def test_bytes_that_never_become_a_character_stay_apart():
    assert pieces([0xE5, START, 0xE5], [-100] * 3) == [
        Piece("text", "\ufffd", (0xE5,), learned=False),
        Piece("control", "<start>", (START,), learned=False),
        Piece("text", "\ufffd", (0xE5,), learned=False),
    ]


def test_a_piece_is_learned_as_a_whole_or_not_at_all():
    assert [piece.token_ids for piece in pieces([0xC3, 0xA9], [-100, 0xA9])] == [(0xC3,), (0xA9,)]


def test_text_that_holds_the_replacement_character_loses_no_token():
    ids = list("\ufffdabcdefghij".encode())

    found = pieces(ids, [-100] * len(ids))

    assert [token for piece in found for token in piece.token_ids] == ids
    assert "".join(piece.text for piece in found).endswith("abcdefghij")
