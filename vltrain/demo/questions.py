"""What is asked about the demo's pictures, in English and Chinese, and the right answers.

Kinds of questions: `single` (which digit is this), `several` (read them from left to right),
`count` (how many), `compare` (which of two pictures) and `point` (where: the answer is boxes).
Digits, letters and shapes are asked about in the same words, so that a model taught on printed
signs knows the task when it meets handwriting.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from vltrain.demo.glyphs import DIGITS, LETTERS, SHAPES
from vltrain.demo.scenes import PlacedGlyph, Scene

Kind = Literal["single", "several", "count", "compare", "point"]
Language = Literal["en", "zh"]
Subject = Literal["digit", "letter", "shape"]

KINDS: tuple[Kind, ...] = get_args(Kind)
LANGUAGES: tuple[Language, ...] = get_args(Language)
NAMES: dict[Subject, tuple[str, ...]] = {"digit": DIGITS, "letter": LETTERS, "shape": SHAPES}

CHINESE_NOUNS: dict[Subject, str] = {"digit": "数字", "letter": "字母", "shape": "图形"}
CHINESE_SHAPES = {
    "circle": "圆形",
    "square": "方形",
    "triangle": "三角形",
    "star": "星形",
    "cross": "十字",
    "diamond": "菱形",
}

# `compare` has two questions of its own; "greater" is asked of single digits only.
PHRASINGS: dict[tuple[str, Language], tuple[str, ...]] = {
    ("single", "en"): ("Which {noun} is this?", "What {noun} do you see?"),
    ("single", "zh"): ("这是哪个{noun}？", "图中是什么{noun}？"),
    ("several", "en"): (
        "Read the {noun}s from left to right.",
        "Which {noun}s are there, from left to right?",
    ),
    ("several", "zh"): ("从左到右读出{noun}。", "从左到右有哪些{noun}？"),
    ("count", "en"): ("How many {noun}s are there?", "Count the {noun}s."),
    ("count", "zh"): ("图中有几个{noun}？", "数一数有几个{noun}。"),
    ("more", "en"): ("Which picture has more {noun}s?", "Where are more {noun}s?"),
    ("more", "zh"): ("哪张图的{noun}更多？", "哪张图有更多{noun}？"),
    ("greater", "en"): (
        "Which picture shows the greater number?",
        "In which picture is the number greater?",
    ),
    ("greater", "zh"): ("哪张图的数更大？", "哪张图中的数更大？"),
    ("point", "en"): ("Where is the {name}?", "Point at the {name}."),
    ("point", "zh"): ("{name}在哪里？", "请框出{name}。"),
    ("point at all", "en"): ("Where are the {noun}s?", "Point at the {noun}s."),
    ("point at all", "zh"): ("{noun}都在哪里？", "请框出所有{noun}。"),
}


@dataclass(frozen=True)
class Picture:
    """A scene and the file in which a record names it, relative to the data file."""

    file: str
    scene: Scene


@dataclass(frozen=True)
class Exchange:
    """A question, its answer, and the pictures that the question brings along."""

    kind: Kind
    question: str
    answer: str
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Asker:
    """Asks in one language about one sort of sign; `rng` chooses among the phrasings."""

    language: Language
    subject: Subject
    rng: np.random.Generator

    def single(self, picture: Picture, *, shown: bool = False) -> Exchange:
        """Which sign is the only one of the picture? `shown`: an earlier turn brought it."""
        answer = self._spell(picture.scene.names[0])
        return self._exchange("single", answer, () if shown else (picture,))

    def several(self, picture: Picture, *, shown: bool = False) -> Exchange:
        """Which signs are there, from left to right?"""
        answer = " ".join(self._spell(name) for name in picture.scene.names)
        return self._exchange("several", answer, () if shown else (picture,))

    def count(self, picture: Picture, *, shown: bool = False) -> Exchange:
        """How many signs are there?"""
        answer = str(len(picture.scene.glyphs))
        return self._exchange("count", answer, () if shown else (picture,))

    def point(self, picture: Picture, *, shown: bool = False) -> Exchange:
        """Where is the only sign, by its name; or where are all of them, from left to right?"""
        glyphs = picture.scene.glyphs
        name = self._spell(glyphs[0].name)
        phrasing = "point" if len(glyphs) == 1 else "point at all"
        answer = "".join(self._boxed(glyph) for glyph in glyphs)
        pictures = () if shown else (picture,)
        return self._exchange("point", answer, pictures, phrasing=phrasing, name=name)

    def _boxed(self, glyph: PlacedGlyph) -> str:
        x1, y1, x2, y2 = glyph.box
        return f"<ref>{self._spell(glyph.name)}</ref><box>({x1},{y1}),({x2},{y2})</box>"

    def compare(
        self, first: Picture, second: Picture, *, bring: tuple[Picture, ...] | None = None
    ) -> Exchange | None:
        """Which of two pictures has more signs, or shows the greater digit?

        Args:
            first: Picture 1 of the conversation.
            second: Picture 2.
            bring: what this question brings along; default both.

        Returns:
            None if the pictures do not differ in that.
        """
        values = [len(picture.scene.glyphs) for picture in (first, second)]
        phrasing = "more"
        if values == [1, 1] and self.subject == "digit":
            values = [int(picture.scene.names[0]) for picture in (first, second)]
            phrasing = "greater"
        if values[0] == values[1]:
            return None
        number = 1 if values[0] > values[1] else 2
        answer = f"Picture {number}" if self.language == "en" else f"图{number}"
        pictures = (first, second) if bring is None else bring
        return self._exchange("compare", answer, pictures, phrasing=phrasing)

    def _spell(self, name: str) -> str:
        return CHINESE_SHAPES.get(name, name) if self.language == "zh" else name

    def _exchange(
        self,
        kind: Kind,
        answer: str,
        pictures: tuple[Picture, ...],
        *,
        phrasing: str | None = None,
        name: str = "",
    ) -> Exchange:
        choices = PHRASINGS[phrasing or kind, self.language]
        noun = self.subject if self.language == "en" else CHINESE_NOUNS[self.subject]
        question = choices[self.rng.integers(len(choices))].format(noun=noun, name=name)
        return Exchange(kind, question, answer, pictures)


def record(name: str, exchanges: Sequence[Exchange]) -> dict[str, Any]:
    """One element of a training JSON, in Qwen-VL's own form.

    The id ends with the kinds of the questions, see `kinds_of`.
    """
    turns = []
    number = 0
    for exchange in exchanges:
        lines = []
        for picture in exchange.pictures:
            number += 1
            lines.append(f"Picture {number}: <img>{picture.file}</img>")
        value = "\n".join([*lines, exchange.question])
        turns.append({"from": "user", "value": value})
        turns.append({"from": "assistant", "value": exchange.answer})
    kinds = "+".join(exchange.kind for exchange in exchanges)
    return {"id": f"{name}:{kinds}", "conversations": turns}


def kinds_of(record_id: str) -> list[str]:
    """The kind of each question of a record, in order, read from its id."""
    return record_id.rpartition(":")[2].split("+")


def every_text() -> list[str]:
    """Every phrasing with every noun and name, and answers: what a vocabulary is made from.

    What each sample has (roles, numbers of pictures, boxes) occurs often enough for tokens.
    """
    texts = ["You are a helpful assistant.", "system", "user", "assistant", "Picture 1: "] * 100
    texts += ["Picture 1", "图1", "图2", "(1,2),(3,4)"] * 50
    for (_, language), choices in PHRASINGS.items():
        for subject, names in NAMES.items():
            noun = subject if language == "en" else CHINESE_NOUNS[subject]
            spelled = [CHINESE_SHAPES.get(n, n) if language == "zh" else n for n in names]
            for choice in choices:
                texts += ["\n" + choice.format(noun=noun, name=name) for name in spelled]
            texts += [f"{name} {name}" for name in spelled]
    return texts
