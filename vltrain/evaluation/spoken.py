"""Tokens to text while they are said: no piece ends in the middle of a character."""

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

UNFINISHED = "\ufffd"  # what the first bytes of a character decode to


class SpokenText(BaseStreamer):
    """Takes the tokens of `generate` one by one and hands on their text.

    A token may end in the middle of a character (half a Chinese one, say): its text waits for the
    next token.
    """

    def __init__(self, text_of: Callable[[Sequence[int]], str], listener: Callable[[str], None]):
        """Listen.

        Args:
            text_of: ids of an answer to text.
            listener: gets the pieces.
        """
        self._text_of = text_of
        self._listener = listener
        self._waiting: list[int] = []
        self._prompt_is_past = False

    def put(self, value: Tensor) -> None:
        """Take the prompt, which comes first and is passed over, or the tokens after it."""
        if not self._prompt_is_past:
            self._prompt_is_past = True
            return
        self._waiting += value.flatten().tolist()
        text = self._text_of(self._waiting)
        if not text.endswith(UNFINISHED):
            self._hand_on(text)

    def end(self) -> None:
        """Hand on what waits: nothing comes that could finish it."""
        self._hand_on(self._text_of(self._waiting))

    def _hand_on(self, text: str) -> None:
        self._waiting.clear()
        if text:
            self._listener(text)
