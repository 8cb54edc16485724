"""A JSON list, element by element: memory for one chunk of the file, however long the list."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from vltrain.data.faults import Fault

CHUNK_BYTES = 1 << 18
_DECODER = json.JSONDecoder()
_BLANK = re.compile(r"[ \t\n\r]*")
# A word, number or escape that a chunk cuts in two is reported at most so far before its end.
_CUT_CHARACTERS = 16


class NotJsonError(Exception):
    """The file breaks off being JSON; `fault` says where."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


def list_elements(file: BinaryIO, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Any]:
    """The elements of the JSON list that a file holds, in order, each when it has been read.

    Args:
        file: UTF-8, with or without a byte order mark; its first character but blanks is `[`.
        chunk_bytes: read at once; an element may be longer.

    Raises:
        NotJsonError: after all elements that stand before the broken place.
    """
    window = _Window(file, chunk_bytes)
    window.take("[", "value")
    if window.next_character() == "]":
        window.take("]", "value")
    else:
        yield window.value()
        while window.next_character() == ",":
            window.take(",", "',' delimiter")
            yield window.value()
        window.take("]", "',' delimiter")
    if window.next_character():
        raise NotJsonError(window.fault("Extra data", window.place))


class _Window:
    """The part of a file that is being read, as text, and where in the file it begins."""

    def __init__(self, file: BinaryIO, chunk_bytes: int) -> None:
        self.text = ""
        self.place = 0  # in `text`: all before it has been read
        self._file = file
        self._chunk_bytes = chunk_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._line = 1  # of the file, where `text` begins
        self._column = 0  # characters of that line before `text`
        self._undecodable: Fault | None = None  # lies right behind `text`
        self._ended = False
        self._begun = False

    def next_character(self) -> str:
        """The next character that is no blank, not taken; empty at the file's end."""
        while True:
            blank = _BLANK.match(self.text, self.place)
            self.place = blank.end() if blank else self.place
            if self.place < len(self.text):
                return self.text[self.place]
            if not self._read(self._chunk_bytes):
                return ""

    def take(self, character: str, wanted: str) -> None:
        """Pass over a character that must come next."""
        if self.next_character() != character:
            raise NotJsonError(self.fault(f"Expecting {wanted}", self.place))
        self.place += 1

    def value(self) -> Any:
        """Read the value that comes next."""
        self.next_character()
        size = self._chunk_bytes
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.place)
            except json.JSONDecodeError as error:
                if not self._may_be_cut(error) or not self._read(size):
                    raise NotJsonError(self.fault(error.msg, error.pos)) from error
            except (ValueError, RecursionError) as error:  # a number or nesting beyond measure
                line, _ = self._position(self.place)
                message = f"not JSON: line {line}: {error}"
                raise NotJsonError(Fault("not_json", message, f"mend line {line}")) from error
            else:
                # A number at the end of the window may go on behind it.
                if end < len(self.text) or not self._read(size):
                    self.place = end
                    return value
            size *= 2  # so that a long value is tried a few times only

    def fault(self, message: str, place: int) -> Fault:
        """What is wrong at a place of the window, named as an editor counts."""
        line, column = self._position(place)
        return Fault(
            "not_json", f"not JSON: line {line}, column {column}: {message}", f"mend line {line}"
        )

    def _position(self, place: int) -> tuple[int, int]:
        """Line and column in the file, both from 1."""
        lines = self.text.count("\n", 0, place)
        if lines:
            return self._line + lines, place - self.text.rindex("\n", 0, place)
        return self._line, self._column + place + 1

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Could more of the file mend this?"""
        unclosed = error.msg.startswith("Unterminated string")
        return unclosed or error.pos >= len(self.text) - _CUT_CHARACTERS

    def _read(self, size: int) -> bool:
        """Drop what has been read from the window and add more; False at the file's end."""
        if self._undecodable:
            raise NotJsonError(self._undecodable)
        if self._ended:
            return False
        line, column = self._position(self.place)
        self._line, self._column = line, column - 1
        self.text, self.place = self.text[self.place :], 0
        raw = self._file.read(size)
        self._ended = not raw
        if not self._begun:
            raw, self._begun = raw.removeprefix(codecs.BOM_UTF8), True
        try:
            self.text += self._decoder.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            self.text += error.object[: error.start].decode("utf-8")
            line, _ = self._position(len(self.text))
            self._undecodable = Fault(
                "not_utf8", f"line {line} is not UTF-8", "save the file as UTF-8"
            )
        return True
