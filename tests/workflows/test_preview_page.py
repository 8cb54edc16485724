"""The page of `vltrain preview`, from values to HTML."""

from vltrain.data.checks import Finding
from vltrain.data.grounding import Box, Quad
from vltrain.data.pieces import Piece
from vltrain.data.statistics import Collected, summarise
from vltrain.workflows.preview_page import PageHead, PictureView, SampleView, page, visible

EVIL = "</span><script>alert('x')</script><img src=http://evil.example/x.png onerror=alert(1)>"


def head(*findings: Finding) -> PageHead:
    return PageHead(("train.json",), "model", None, summarise(Collected(), 100), findings)


def text(content: str, *, learned: bool) -> Piece:
    return Piece("text", content, (1,), learned)


def test_markup_in_text_is_shown_and_not_obeyed():
    assert visible('<b class="x">&</b>') == "&lt;b class=&quot;x&quot;&gt;&amp;&lt;/b&gt;"


def test_blanks_tabs_and_line_ends_can_be_seen():
    assert visible("a b\t\n", marks=True) == "a<i>·</i>b<i>→</i><i>↵<br></i>"


def test_characters_that_nobody_sees_are_spelled_out():
    assert visible("\u202e\u00a0\x1b\ud800") == "".join(
        f'<i class="u">U+{code}</i>' for code in ("202E", "00A0", "001B", "D800")
    )


def test_nothing_of_a_record_becomes_markup():
    finding = Finding(EVIL, 0, EVIL, "error", EVIL, EVIL, EVIL)
    sample = SampleView(
        name=EVIL,
        id=EVIL,
        findings=(finding,),
        turns=((text(EVIL, learned=True),),),
        pictures=(
            PictureView(EVIL),
            PictureView(EVIL, "data:image/png;base64,", (5, 5), (Box(1, 2, 3, 4, EVIL),)),
        ),
    )
    faulty = SampleView(name=EVIL, id=EVIL, raw=EVIL)
    whole = PageHead((EVIL,), EVIL, None, summarise(Collected(), 100), (finding,))

    html = page(whole, [sample, faulty])

    assert "<script" not in html
    assert html.count("<img ") == 1
    assert "&lt;script&gt;" in html


def test_the_page_forbids_scripts_and_the_network():
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in page(
        head(), []
    )


def test_learned_and_masked_tokens_are_of_different_classes():
    turn = (text("a", learned=False), text("b", learned=True))

    html = page(head(), [SampleView("r", None, turns=(turn,))])

    assert '<span class="t" title="1">a</span><wbr><span class="t l" title="1">b</span>' in html


def test_image_tokens_are_one_chip_with_their_number():
    turn = (Piece("image", "", (9,) * 1256, learned=False),)

    html = page(head(), [SampleView("r", None, turns=(turn,))])

    assert '<span class="chip" title="9">picture 1: 1,256 image tokens</span>' in html


def test_a_box_is_placed_in_per_cent_of_its_picture():
    picture = PictureView("a.png", "data:,", (10, 10), (Box(100, 250, 300, 1000, "cat"),))

    html = page(head(), [SampleView("r", None, pictures=(picture,))])

    assert 'style="left:10%;top:25%;width:20%;height:75%;--colour:#e6194b"' in html
    assert '<span class="label">cat</span>' in html


def test_a_quad_is_drawn_side_by_side_within_the_box_around_it():
    quad = Quad(((100, 300), (300, 200), (350, 400), (150, 500)), "sign")
    picture = PictureView("a.png", "data:,", (10, 10), (quad,))

    html = page(head(), [SampleView("r", None, pictures=(picture,))])

    assert 'class="quad" style="left:10%;top:20%;width:25%;height:30%;--colour:#e6194b"' in html
    assert '<svg viewBox="0 0 250 300" preserveAspectRatio="none">' in html
    assert '<polygon points="0,100 200,0 250,200 50,300"/>' in html
    assert '<span class="label">sign</span>' in html


def test_a_quad_that_is_a_line_still_has_an_outline():
    quad = Quad(((5, 7), (9, 7), (9, 7), (5, 7)))
    picture = PictureView("a.png", "data:,", (10, 10), (quad,))

    html = page(head(), [SampleView("r", None, pictures=(picture,))])

    assert '<svg viewBox="0 0 4 1" preserveAspectRatio="none">' in html


def test_boxes_and_quads_are_counted_apart():
    regions = (Box(1, 2, 3, 4), Quad(((1, 1), (2, 1), (2, 2), (1, 2))))
    picture = PictureView("a.png", "data:,", (10, 10), regions)
    turn = (text("a", learned=True),)

    html = page(head(), [SampleView("r", None, turns=(turn,), pictures=(picture,))])

    assert "1 box drawn · 1 quad drawn" in html


def test_a_picture_keeps_its_proportions_within_the_bounds_of_the_page():
    pictures = (
        PictureView("large", "data:,", (1000, 500)),
        PictureView("small", "data:,", (7, 14)),
        PictureView("thin", "data:,", (1, 5000)),
    )

    html = page(head(), [SampleView("r", None, pictures=pictures)])

    assert 'width="448" height="224"' in html
    assert 'width="140" height="280"' in html
    assert 'width="1" height="448"' in html


def test_a_sample_over_the_limit_is_marked():
    view = SampleView("r", None, turns=((text("a", learned=False), text("b", learned=True)),))
    limited = PageHead(("train.json",), "model", 1, summarise(Collected(), 100), ())

    assert '<span class="error">2 tokens, more than 1</span>' in page(limited, [view])


def test_a_finding_about_the_file_stands_in_the_head():
    finding = Finding("train.json", None, None, "error", "not_json", "broken", "mend it")

    html = page(head(finding), [])

    assert "<b>error: not json</b> broken<br>fix: mend it" in html
