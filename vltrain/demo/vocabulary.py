"""The demo's own small `qwen.tiktoken`: byte pairs learned from the demo's texts."""

import base64
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import regex

# How Qwen cuts a text into pieces before merging; no token reaches over a cut.
PIECES = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Tokens = tuple[bytes, ...]


def learn_ranks(texts: Iterable[str], size: int) -> list[bytes]:
    """Byte-pair encoding (arXiv:1508.07909): the most frequent pair becomes a token, repeatedly.

    Args:
        texts: what to learn from.
        size: how many tokens are wanted, the 256 bytes included.

    Returns:
        The tokens in the order of their ranks: the 256 bytes, then the merged pairs. Equal
        counts are decided by the pair itself, so that the result depends on the texts alone.

    Raises:
        ValueError: the texts have too few pairs for `size`.
    """
    ranks = [bytes([byte]) for byte in range(256)]
    pieces: Counter[Tokens] = Counter()
    for text in texts:
        for piece in PIECES.findall(text):
            pieces[tuple(bytes([byte]) for byte in piece.encode())] += 1
    while len(ranks) < size:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for tokens, count in pieces.items():
            for pair in pairwise(tokens):
                pairs[pair] += count
        if not pairs:
            raise ValueError(f"the texts have pairs for {len(ranks)} tokens, {size} are wanted")
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.append(best[0] + best[1])
        merged: Counter[Tokens] = Counter()
        for tokens, count in pieces.items():
            merged[_merge(tokens, best)] += count
        pieces = merged
    return ranks


def tiktoken_file(ranks: Iterable[bytes]) -> str:
    """The text of a `qwen.tiktoken`: one line "base64 rank" for each token."""
    return "".join(
        f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)
    )


def _merge(tokens: Tokens, pair: tuple[bytes, bytes]) -> Tokens:
    """The tokens with each occurrence of the pair joined, from the left."""
    joined: list[bytes] = []
    for token in tokens:
        # joined[-1] may be an earlier merge of the same pair: then it differs from pair[0].
        if joined and joined[-1] == pair[0] and token == pair[1]:
            joined[-1] = pair[0] + pair[1]
        else:
            joined.append(token)
    return tuple(joined)
