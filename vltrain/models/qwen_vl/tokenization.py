"""The Qwen-VL tokenizer: byte-pair ranks from `qwen.tiktoken`, special tokens behind them.

Ids 0..n-1 are the ranks of the vocabulary file, ids from n on are `SPECIAL_TOKENS` in their
order; the published file has n = 151643. `tiktoken` does the merging.

Tokens are bytes, and many are no text by themselves (half of a Chinese character, say).
Where `transformers` wants a token as a string, each byte is one Latin-1 character, so that
every token has a string of its own and nothing is lost on the way back.
"""

import base64
import binascii
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tiktoken
from transformers import AddedToken, PreTrainedTokenizer

from vltrain.errors import VltrainError
from vltrain.models.qwen_vl.list_format import from_list_format, to_list_format

VOCAB_FILE = "qwen.tiktoken"

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
IMAGE_START = "<img>"
IMAGE_END = "</img>"
IMAGE_PAD = "<imgpad>"

GROUNDING_TOKENS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")

SPECIAL_TOKENS = (
    END_OF_TEXT,
    TURN_START,
    TURN_END,
    *(f"<|extra_{i}|>" for i in range(205)),
    *GROUNDING_TOKENS,
    IMAGE_START,
    IMAGE_END,
    IMAGE_PAD,
)

# What the data format defines as markup inside a text. A text never opens a turn or a picture:
# the layout of the sample does that, with ids of its own.
MARKUP_TOKENS = frozenset((*GROUNDING_TOKENS, IMAGE_END))

# How text falls into pieces before merging: contractions, words, single digits, runs of
# punctuation, line ends, blanks.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

TOKENIZER_CONFIG = {"model_max_length": 8192, "tokenizer_class": "QwenVLTokenizer"}

_NO_TOKEN = b"\xff"  # never part of UTF-8: an id without a token decodes to U+FFFD


def parse_ranks(content: bytes, where: str) -> dict[bytes, int]:
    """The tokens of a vocabulary file and their ranks.

    Args:
        content: lines of base64, a blank, a number; line ends LF or CRLF.
        where: the file's name, for the error.

    Raises:
        VltrainError: a line is not of that form, ranks have holes or occur twice, or one of
            the 256 single bytes is missing, without which some text has no ids.
    """
    fix = f"put the {VOCAB_FILE} of the published checkpoint in its place"
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            what = f"line {number} is not a base64 token and its rank"
            raise VltrainError.at(where, what=what, fix=fix) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        what = f"the ranks of its {len(ranks)} tokens are not 0..{len(ranks) - 1}, each once"
        raise VltrainError.at(where, what=what, fix=fix)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        what = f"{len(missing)} of the 256 single bytes are no token"
        raise VltrainError.at(where, what=what, fix=fix)
    return ranks


class QwenVLTokenizer(PreTrainedTokenizer):
    """Text to ids and back, as the published Qwen-VL has them.

    What a user writes stays text: by default only `MARKUP_TOKENS` are read as tokens, while
    `<|im_end|>`, `<img>` and their like are spelled out. `split_special_tokens=False`, in
    the constructor or a call, reads every special token, for text that the caller trusts.
    Text is NFC-normalised.
    """

    vocab_files_names = {"vocab_file": VOCAB_FILE}  # noqa: RUF012 (the base class's form)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str | Path,
        errors: str = "replace",
        split_special_tokens: bool = True,
        **kwargs: Any,
    ) -> None:
        """Read a vocabulary.

        Args:
            vocab_file: the `qwen.tiktoken` to read.
            errors: what becomes of bytes that are no UTF-8, as in `bytes.decode`.
            split_special_tokens: whether control tokens inside a text stay text.
            kwargs: as `PreTrainedTokenizer` takes them.

        Raises:
            VltrainError: the file is missing or no vocabulary.
        """
        self._vocab_content = _read_vocab_file(Path(vocab_file))
        ranks = parse_ranks(self._vocab_content, where=str(vocab_file))
        special_ids = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            "qwen_vl", pat_str=PIECES, mergeable_ranks=ranks, special_tokens=special_ids
        )
        self._token_ids = {token.decode("latin-1"): rank for token, rank in ranks.items()}
        self._token_ids |= special_ids
        self._token_bytes = {rank: token for token, rank in ranks.items()}
        self._token_bytes |= {rank: token.encode() for token, rank in special_ids.items()}
        self._added_tokens_decoder = {
            rank: AddedToken(token, special=True, normalized=False)
            for token, rank in special_ids.items()
        }
        self.errors = errors
        named = {"pad_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
        super().__init__(
            errors=errors, split_special_tokens=split_special_tokens, **(named | kwargs)
        )

    @property
    def vocab_size(self) -> int:
        """How many tokens the vocabulary file has, special tokens not counted."""
        return len(self._token_bytes) - len(SPECIAL_TOKENS)

    @property
    def all_special_tokens(self) -> list[str]:
        """Every special token, in the order of its id."""
        return list(SPECIAL_TOKENS)

    def get_vocab(self) -> dict[str, int]:
        """Every token as a string and its id, special tokens included."""
        return dict(self._token_ids)

    def text_ids(self, text: str, split_special_tokens: bool = True) -> list[int]:
        """The ids of a text; the shortest way from text to ids.

        Args:
            text: any string.
            split_special_tokens: as in the constructor.
        """
        allowed = MARKUP_TOKENS if split_special_tokens else set(SPECIAL_TOKENS)
        normal = unicodedata.normalize("NFC", text)
        return self._encoding.encode(normal, allowed_special=allowed, disallowed_special=())

    def from_list_format(self, elements: Iterable[Mapping[str, Any]]) -> str:
        """The text of a list of pictures, texts and boxes, as `list_format` has it."""
        return from_list_format(elements)

    def to_list_format(self, text: str) -> list[dict[str, str]]:
        """The pictures, texts and boxes of a text, as `list_format` has it."""
        return to_list_format(text)

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """The tokens of a text as strings; see the module about their form."""
        split = kwargs.get("split_special_tokens", self.split_special_tokens)
        return self.convert_ids_to_tokens(self.text_ids(text, split_special_tokens=split))

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._token_ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._token_bytes.get(index, _NO_TOKEN).decode("latin-1")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text that tokens spell together."""
        joined = b"".join(token.encode("latin-1") for token in tokens)
        return joined.decode("utf-8", errors=self.errors)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        keep_markup: bool = False,
        errors: str | None = None,
        **_: Any,
    ) -> str:
        """Ids to text; `decode` and `batch_decode` pass their keywords here.

        Args:
            token_ids: one id or many. An id without a token (the matrices have more rows
                than there are tokens) becomes U+FFFD, or nothing where special ones go.
            skip_special_tokens: leave out special tokens.
            keep_markup: but not the tags of boxes and pictures, which are part of an answer.
            errors: instead of the tokenizer's own.
        """
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        if skip_special_tokens:
            kept = self._markup_ids() if keep_markup else frozenset()
            ids = [i for i in ids if 0 <= i < self.vocab_size or i in kept]
        joined = b"".join(self._token_bytes.get(i, _NO_TOKEN) for i in ids)
        return joined.decode("utf-8", errors=errors or self.errors)

    def _markup_ids(self) -> frozenset[int]:
        return frozenset(
            self._token_ids[token] for token in (*GROUNDING_TOKENS, IMAGE_START, IMAGE_END)
        )

    @property
    def vocabulary_hash(self) -> str:
        """sha256 of the vocabulary file, line ends as they are."""
        return hashlib.sha256(self._vocab_content).hexdigest()

    def save_vocabulary(
        self, save_directory: str | Path, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write the vocabulary file, byte for byte as it was read."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / (prefix + VOCAB_FILE)
        target.write_bytes(self._vocab_content)
        return (str(target),)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> tuple[str, ...]:
        """Write `qwen.tiktoken` and `tokenizer_config.json`, as `AutoTokenizer` reads them.

        The published layout is written by `vltrain export`.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")
        return (str(config), *self.save_vocabulary(folder))


def _read_vocab_file(path: Path) -> bytes:
    if not path.is_file():
        raise VltrainError.at(
            str(path.parent),
            what=f"there is no {path.name}, the vocabulary of Qwen-VL",
            fix=f"copy {VOCAB_FILE} from the published checkpoint (Qwen/Qwen-VL-Chat) there",
        )
    return path.read_bytes()
