import numpy as np
import pytest

from vltrain.demo.glyphs import Glyph
from vltrain.demo.scenes import LUMINANCE, compose


def solid(name: str, rows: int = 8, columns: int = 6) -> Glyph:
    return Glyph(name, np.ones((rows, columns), dtype=np.float32))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seed", range(10))
def test_signs_stay_inside_and_apart_from_left_to_right(count, seed):
    wide = [solid(str(i), columns=10) for i in range(count)]

    scene = compose(wide, np.random.default_rng(seed))

    assert scene.image.size == (112, 112)
    assert scene.names == tuple("012"[:count])
    edges = [x for glyph in scene.glyphs for x in (glyph.box[0], glyph.box[2])]
    assert edges == sorted(edges)
    for glyph in scene.glyphs:
        x1, y1, x2, y2 = glyph.box
        assert 0 <= x1 < x2 <= 999
        assert 0 <= y1 < y2 <= 999


def test_a_box_holds_the_ink_and_nothing_beside_it():
    scene = compose([solid("7")], np.random.default_rng(1))
    pixels = np.asarray(scene.image, dtype=float) @ LUMINANCE

    left, top, right, bottom = (round(v * 112 / 1000) for v in scene.glyphs[0].box)
    inside = pixels[top + 3 : bottom - 3, left + 3 : right - 3].mean()
    around = pixels.copy()
    around[top:bottom, left:right] = np.nan

    assert abs(inside - np.nanmean(around)) > 50
    assert np.nanstd(around) < 20


def test_the_same_seed_paints_the_same_picture():
    first, second = (compose([solid("7")], np.random.default_rng(5)) for _ in range(2))

    assert first.image.tobytes() == second.image.tobytes()
    assert first.glyphs == second.glyphs
