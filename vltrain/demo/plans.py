"""Which questions make up a record, and on which pictures."""

from collections.abc import Callable

import numpy as np

from vltrain.demo.questions import Asker, Exchange, Picture

OTHERS_SHARE = 0.35  # of the pictures to pretrain on: how often one is counted, or pointed at


class Drawer:
    """Hands out pictures: all of a number of signs in random order before one comes again."""

    def __init__(self, pictures: dict[int, list[Picture]], rng: np.random.Generator) -> None:
        self._pictures = pictures
        self._rng = rng
        self._left: dict[int, list[int]] = {signs: [] for signs in pictures}

    def __call__(self, *numbers_of_signs: int) -> Picture:
        """A picture with one of these numbers of signs."""
        signs = int(self._rng.choice(numbers_of_signs))
        if not self._left[signs]:
            self._left[signs] = list(self._rng.permutation(len(self._pictures[signs])))
        return self._pictures[signs][self._left[signs].pop()]


Plan = Callable[[Asker, Drawer], list[Exchange]]


def single(asker: Asker, draw: Drawer) -> list[Exchange]:
    return [asker.single(draw(1))]


def several(asker: Asker, draw: Drawer) -> list[Exchange]:
    return [asker.several(draw(2, 2, 3))]


def count(asker: Asker, draw: Drawer) -> list[Exchange]:
    return [asker.count(draw(1, 2, 3))]


def point(asker: Asker, draw: Drawer) -> list[Exchange]:
    return [asker.point(draw(1, 2, 3))]


def compare(asker: Asker, draw: Drawer) -> list[Exchange]:
    digits = asker.subject == "digit" and asker.rng.random() < 0.5
    numbers = (1,) if digits else (1, 2, 3)
    while (exchange := asker.compare(draw(*numbers), draw(*numbers))) is None:
        pass
    return [exchange]


def single_then_point(asker: Asker, draw: Drawer) -> list[Exchange]:
    picture = draw(1)
    return [asker.single(picture), asker.point(picture, shown=True)]


def several_then_point(asker: Asker, draw: Drawer) -> list[Exchange]:
    picture = draw(2, 3)
    return [asker.several(picture), asker.point(picture, shown=True)]


def count_several_point(asker: Asker, draw: Drawer) -> list[Exchange]:
    picture = draw(2, 3)
    return [
        asker.count(picture),
        asker.several(picture, shown=True),
        asker.point(picture, shown=True),
    ]


def singles_then_compare(asker: Asker, draw: Drawer) -> list[Exchange]:
    """Two pictures that come one after the other, then a question about both."""
    first, second = draw(1), draw(1)
    compared = asker.compare(first, second, bring=())
    exchanges = [asker.single(first), asker.single(second)]
    return exchanges if compared is None else [*exchanges, compared]


def mixed(asker: Asker, picture: Picture) -> list[Exchange]:
    """One to three questions about one picture, in any order: reading it is always one of them.

    Reading is what a model learns last, and a box has ten times the tokens of a sign.
    """
    read = asker.single if len(picture.scene.glyphs) == 1 else asker.several
    questions = [read]
    questions += [q for q in (asker.count, asker.point) if asker.rng.random() < OTHERS_SHARE]
    order = list(asker.rng.permutation(len(questions)))
    if len(picture.scene.glyphs) == 1:
        order.sort(key=lambda i: questions[i] == asker.point)  # it names the sign: last
    return [questions[i](picture, shown=turn > 0) for turn, i in enumerate(order)]
