"""Text while it is said: whole characters only, and all of them."""

import pytest
import torch

from vltrain.evaluation.spoken import SpokenText


def heard(*tokens: bytes) -> list[str]:
    """The pieces that a listener gets where each token is one of these bytes."""
    pieces: list[str] = []

    def text_of(ids):
        return b"".join(tokens[place] for place in ids).decode("utf-8", errors="replace")

    streamer = SpokenText(text_of, pieces.append)
    streamer.put(torch.tensor([[0, 0, 0]]))  # the prompt
    for place in range(len(tokens)):
        streamer.put(torch.tensor([place]))
    streamer.end()
    return pieces


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        ((b"a", b" cat"), ["a", " cat"]),
        ((b"\xe7", b"\x8c\xab"), ["猫"]),
        ((b"a \xe7\x8c", b"\xab!\xe7", b"\x8b\x97"), ["a 猫!狗"]),
        ((b"\xe7", b"a"), ["\ufffda"]),
        ((b"a", b"\xe7"), ["a", "\ufffd"]),
        ((), []),
    ],
)
def test_pieces_end_where_characters_end(tokens, pieces):
    assert heard(*tokens) == pieces
