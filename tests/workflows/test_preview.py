"""`vltrain preview`: from data files to a page, looked at in a browser where there is one."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from tiny import write_conversations, write_qwen_vl

from vltrain.data.conversation import Conversation, ImagePart, TextPart, Turn
from vltrain.data.grounding import Box, Quad
from vltrain.errors import VltrainError
from vltrain.workflows.preview import chosen_entries, preview, regions_of_pictures

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder without weights: a preview needs none. Every byte is a token."""
    folder = write_qwen_vl(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_conversations(tmp_path)


def sections(page: Path) -> list[str]:
    """The HTML of each sample."""
    return page.read_text(encoding="utf-8").split('<section class="sample">')[1:]


def test_every_sample_is_shown_with_its_picture_boxes_and_tokens(tmp_path, model, data, capsys):
    page = tmp_path / "out" / "page.html"

    preview([data], page, model=model)

    first, *others = sections(page)
    assert len(others) == 3
    assert "train.json#0" in first
    assert '<span class="id">r0</span>' in first
    assert 'src="data:image/jpeg;base64,' in first
    assert "left:14.2%;top:14.2%;width:35.8%;height:35.8%" in first
    assert '<span class="label">red</span>' in first
    assert "picture 1: 4 image tokens" in first
    assert 'class="t c l" title="258">&lt;|im_end|&gt;' in first  # the third behind 256 bytes
    assert capsys.readouterr().out.startswith(f"done: 4 of 4 records in {page} (")


def test_a_character_of_several_tokens_is_one_field(tmp_path, model, data):
    preview([data], tmp_path / "page.html", model=model)

    assert (
        f'title="{" ".join(map(str, "在".encode()))}">在</span>'
        in sections(tmp_path / "page.html")[2]
    )


def test_the_page_needs_nothing_beside_it(tmp_path, model, data):
    preview([data], tmp_path / "page.html", model=model)

    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!data:)', html) == []
    assert "url(" not in html


def test_findings_stand_with_their_record_and_a_faulty_one_is_shown_as_it_is(tmp_path, model):
    turns = [{"from": "user", "value": "<img>none.png</img>q"}, {"from": "assistant", "value": "a"}]
    file = tmp_path / "train.jsonl"
    records = [{"conversations": turns}, {"id": "odd", "conversations": turns[:1]}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + "{\n")

    preview([file], tmp_path / "page.html", model=model)

    missing, faulty, broken = sections(tmp_path / "page.html")
    assert "<b>error: missing picture</b>" in missing
    assert "cannot be opened" in missing
    assert "<b>error: nothing to learn</b>" in faulty
    assert '<pre class="raw">' in faulty
    assert "<b>error: not json</b>" in broken


def test_a_faulty_record_is_shown_without_the_bytes_of_its_pictures(tmp_path, model):
    uri = f"data:image/png;base64,{'A' * 3000}"
    turns = [{"from": "user", "value": "<image><image>q"}, {"from": "gpt", "value": "a"}]
    file = tmp_path / "train.json"
    file.write_text(json.dumps([{"image": [{"path": uri}], "messages": turns}]))

    preview([file], tmp_path / "page.html", model=model)

    (faulty,) = sections(tmp_path / "page.html")
    assert '<pre class="raw">' in faulty
    assert "data:image/png;base64,AAA" in faulty
    assert "A" * 100 not in faulty


def test_records_are_shown_in_the_format_that_is_set(tmp_path, model):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    said = [{"role": "user", "content": "<img>red.png</img>q"}, {"role": "gpt", "content": "a"}]
    file = tmp_path / "train.json"
    file.write_text(json.dumps([{"messages": said}]))

    preview([file], tmp_path / "page.html", model=model, format="qwen_vl")

    (sample,) = sections(tmp_path / "page.html")
    assert "picture 1: 4 image tokens" in sample
    assert "error" not in sample


def test_a_sample_over_the_limit_has_its_finding(tmp_path, model, data):
    preview([data], tmp_path / "page.html", model=model, max_length=100)

    assert "<b>error: too long</b>" in sections(tmp_path / "page.html")[2]


def test_a_file_without_a_record_is_named_in_the_head(tmp_path, model, data):
    file = tmp_path / "none.json"
    file.write_text("[]")

    preview([file, data], tmp_path / "page.html", model=model)

    head, *samples = (tmp_path / "page.html").read_text(encoding="utf-8").split("<section")
    assert "<b>error: no records</b>" in head
    assert len(samples) == 4


def test_files_without_any_record_are_an_error_and_leave_no_page(tmp_path, model):
    with pytest.raises(VltrainError, match=r"none.json: there is no record to show"):
        preview([tmp_path / "none.json"], tmp_path / "page.html", model=model)

    assert not (tmp_path / "page.html").exists()


def test_the_page_never_takes_the_place_of_the_data_or_a_folder(tmp_path, model, data):
    before = data.read_bytes()

    with pytest.raises(VltrainError, match=r"train.json: is the data itself"):
        preview([data], data.parent / "images" / ".." / data.name, model=model)
    with pytest.raises(VltrainError, match=r"images: is a folder"):
        preview([data], data.parent / "images", model=model)

    assert data.read_bytes() == before


def test_the_same_seed_draws_the_same_records_in_their_order(tmp_path):
    file = tmp_path / "many.json"
    file.write_text(json.dumps(list(range(100))))

    drawn = [entry.index for entry in chosen_entries([file], 10, seed=3)]

    assert len(drawn) == 10
    assert drawn == sorted(drawn)
    assert drawn == [entry.index for entry in chosen_entries([file], 10, seed=3)]
    assert drawn != [entry.index for entry in chosen_entries([file], 10, seed=4)]


def test_every_record_has_the_same_chance_to_be_drawn(tmp_path):
    file = tmp_path / "many.json"
    file.write_text(json.dumps(list(range(4))))

    drawn = [e.index for seed in range(400) for e in chosen_entries([file], 1, seed)]

    assert all(70 <= drawn.count(index) <= 130 for index in range(4))


def test_the_page_colours_what_the_labels_of_the_run_learn(tmp_path, model, data):
    page = tmp_path / "page.html"

    preview([data], page, model=model)
    by_assistant = page.read_text().count('class="t c l"')
    preview([data], page, model=model, labels="reference")
    by_reference = page.read_text().count('class="t c l"')

    assert by_reference > by_assistant > 0


def test_a_box_or_quad_belongs_to_the_last_picture_before_it():
    def box(x: int) -> TextPart:
        return TextPart(f"<box>({x},0),(9,9)</box>")

    quad = TextPart("<quad>(4,0),(9,0),(9,9),(4,9)</quad>")
    conversation = Conversation(
        (
            Turn("user", (box(1), ImagePart("a"), box(2), ImagePart("b"))),
            Turn("assistant", (box(3), quad)),
        )
    )

    assert regions_of_pictures(conversation) == [
        [Box(1, 0, 9, 9), Box(2, 0, 9, 9)],
        [Box(3, 0, 9, 9), Quad(((4, 0), (9, 0), (9, 9), (4, 9)))],
    ]


def browse(page: Path, profile: Path, *words: str) -> str:
    """What the browser writes to stdout about a page."""
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
    command = [str(BROWSER), *flags, f"--user-data-dir={profile}", *words, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason=f"no browser is installed: {', '.join(BROWSERS)}")
def test_a_browser_shows_the_page(tmp_path, model, data):
    page, shot = tmp_path / "page.html", tmp_path / "shot.png"
    preview([data], page, model=model)

    dom = browse(page, tmp_path / "profile", "--dump-dom")
    browse(page, tmp_path / "profile", "--window-size=1200,900", f"--screenshot={shot}")

    parts = {"sample": 4, "picture": 5, "box": 4, "label": 2, "chip": 6, "legend": 1}
    found = {part: len(re.findall(rf'class="{part}[" ]', dom)) for part in parts}
    assert found == parts
    with Image.open(shot) as image:
        colors = {color: number for number, color in image.convert("RGB").getcolors(1 << 20)}
    assert image.size == (1200, 900)
    for part, color in (
        ("learned tokens", (0xBF, 0xE8, 0xC8)),
        ("masked tokens", (0xEC, 0xEE, 0xF1)),
        ("the chips", (0xDB, 0xE7, 0xFF)),
        ("the first box", (0xE6, 0x19, 0x4B)),
        ("cards", (0xFF, 0xFF, 0xFF)),
    ):
        assert colors.get(color, 0) > 100, f"{part} cannot be seen"
    reds = sum(n for (r, g, b), n in colors.items() if r > 220 and g < 60 and b < 40)
    assert reds > 1000, "the picture cannot be seen"
