"""Which font labels are drawn in."""

import logging
from pathlib import Path

import matplotlib.font_manager
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from vltrain.data.grounding import draw_boxes, label_font, wide_font_file


@pytest.fixture
def fonts(monkeypatch):
    """Sets which font files this machine seems to have; forgets what was looked up before."""

    def install(*files):
        monkeypatch.setattr(matplotlib.font_manager, "findSystemFonts", lambda: list(files))
        wide_font_file.cache_clear()
        label_font.cache_clear()

    yield install
    wide_font_file.cache_clear()
    label_font.cache_clear()


def test_a_font_with_cjk_characters_is_found_by_its_name(fonts):
    fonts("/fonts/Arial.ttf", "/fonts/NotoSansCJK-Regular.ttc", "/fonts/wqy-zenhei.ttc")

    assert wide_font_file() == Path("/fonts/NotoSansCJK-Regular.ttc")


def write_font(file: Path, character: str) -> Path:
    """A font of one character, a square."""
    pen = TTGlyphPen(None)
    for number, corner in enumerate([(100, 0), (100, 700), (800, 700), (800, 0)]):
        (pen.lineTo if number else pen.moveTo)(corner)
    pen.closePath()
    font = FontBuilder(1024, isTTF=True)
    font.setupGlyphOrder([".notdef", "square"])
    font.setupCharacterMap({ord(character): "square"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (1024, 0), "square": (1024, 100)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Square", "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800)
    font.setupPost()
    font.save(file)
    return file


@pytest.mark.parametrize("character", "的の한")
def test_a_font_of_another_name_is_found_by_what_it_holds(fonts, tmp_path, character):
    latin, wide = write_font(tmp_path / "a.ttf", "a"), write_font(tmp_path / "b.ttf", character)
    (tmp_path / "c.ttf").write_bytes(b"no font")
    fonts(str(tmp_path / "c.ttf"), str(latin), str(wide))

    assert wide_font_file() == wide


def test_the_log_says_when_no_font_has_cjk_characters(fonts, caplog):
    fonts("/fonts/Arial.ttf")

    with caplog.at_level(logging.WARNING):
        draw_boxes(Image.new("RGB", (200, 100)), "<ref>猫</ref><box>(250,500),(750,800)</box>")

    assert caplog.messages == [
        "no font with CJK characters on this machine: such labels are unreadable"
    ]
