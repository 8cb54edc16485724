import numpy as np
import pytest

from vltrain.demo.glyphs import (
    DIGITS,
    FONT_FILES,
    LETTERS,
    SHAPES,
    Glyph,
    enlarge,
    printed_glyph,
    scanned_digits,
)


def test_there_are_1797_scans_of_ten_digits():
    scans = scanned_digits()

    assert len(scans) == 1797
    assert {scan.name for scan in scans} == set(DIGITS)


@pytest.mark.parametrize("name", [*DIGITS, *LETTERS, *SHAPES])
def test_every_printed_sign_leaves_ink_in_few_cells(name):
    for seed in range(5):
        cells = printed_glyph(name, np.random.default_rng(seed)).cells

        assert 8 - 1 <= cells.shape[0] <= 16
        assert cells.min() >= 0
        assert cells.max() <= 1
        assert cells.mean() > 0.1


def test_the_same_seed_prints_the_same_sign():
    first, second = (printed_glyph("7", np.random.default_rng(3)) for _ in range(2))

    assert np.array_equal(first.cells, second.cells)


def test_every_font_of_the_list_is_one_that_matplotlib_ships():
    from pathlib import Path

    import matplotlib

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    assert [name for name in FONT_FILES if not (folder / name).is_file()] == []


def test_an_enlarged_sign_has_about_the_height_asked_for_and_is_cropped_to_its_ink():
    bar = Glyph("1", np.ones((8, 2), dtype=np.float32))

    mask = enlarge(bar, 40)

    assert mask.shape[0] == pytest.approx(40, abs=4)
    assert mask.shape[1] == pytest.approx(10, abs=4)
    for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1]):
        assert edge.max() > 0.3
