"""Samples -> the HTML of `vltrain preview`: values in, text out.

Everything that comes from a record is escaped, and the page's own policy forbids scripts and
the network: records are written by anybody. Characters that cannot be seen, or that would turn
the order of the text round, are spelled out.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count

from vltrain.data.checks import Finding
from vltrain.data.grounding import GRID, Box, Quad, Region
from vltrain.data.pieces import Piece
from vltrain.data.statistics import Summary
from vltrain.workflows.preview_style import STYLE

PICTURE_SIDE = 448  # pixels of the page; a larger picture is scaled down
_LEAST_SIDE = 280  # pixels of the page; a smaller one is scaled up

_COLOURS = ("#e6194b", "#0a7d32", "#1f55d6", "#b35c00", "#7d1fb0", "#00707a")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_MARKS = {" ": "·", "\n": "↵<br>", "\t": "→"}
_INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp", "Cs", "Co", "Cn")  # general categories of Unicode
_LABEL_ROOM = 90  # of the grid: above a box that begins higher there is no room for its label


@dataclass(frozen=True)
class PictureView:
    """A picture of a sample; no data where it cannot be opened, which a finding explains."""

    source: str  # as the record has it
    data_uri: str | None = None
    size: tuple[int, int] | None = None  # width and height in pixels, of the file
    regions: tuple[Region, ...] = ()  # boxes and quads to draw on it


@dataclass(frozen=True)
class SampleView:
    """All that is shown of one record."""

    name: str
    id: str | None
    findings: tuple[Finding, ...] = ()
    turns: tuple[tuple[Piece, ...], ...] = ()
    learned_tokens: int = 0
    pictures: tuple[PictureView, ...] = ()
    raw: str | None = None  # the JSON of a record that cannot be laid out

    @property
    def tokens(self) -> int:
        """How many tokens the sample has, image tokens included."""
        return sum(len(piece.token_ids) for turn in self.turns for piece in turn)


@dataclass(frozen=True)
class PageHead:
    """What is said of the files as a whole."""

    files: tuple[str, ...]
    model: str
    max_length: int | None
    summary: Summary
    findings: tuple[Finding, ...]


def page(head: PageHead, samples: Sequence[SampleView]) -> str:
    """The page, whole and self-contained."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{visible(', '.join(head.files))} - vltrain preview</title>",
            f"<style>{STYLE}</style></head><body>",
            _head(head, len(samples)),
            *(_sample(sample, head.max_length) for sample in samples),
            "</body></html>\n",
        ]
    )


def visible(text: str, *, marks: bool = False) -> str:
    """Text as HTML that shows it as it is.

    Args:
        text: any string.
        marks: show blanks, tabs and line ends as signs too.
    """
    return "".join(_visible_character(character, marks) for character in text)


def _visible_character(character: str, marks: bool) -> str:
    if character in _MARKS:
        return f"<i>{_MARKS[character]}</i>" if marks else character
    if unicodedata.category(character) in _INVISIBLE:
        return f'<i class="u">U+{ord(character):04X}</i>'
    return escape(character)


def _head(head: PageHead, shown: int) -> str:
    summary = head.summary
    limit = "no limit" if head.max_length is None else f"{head.max_length:,}"
    facts = [
        ("records", f"{summary.records:,}"),
        ("shown here", f"{shown:,}"),
        ("tokens", f"{summary.tokens:,}"),
        ("learned", f"{summary.learned_tokens:,} ({summary.learned_share:.1%})"),
        ("pictures", f"{summary.pictures.total:,}"),
        ("boxes", f"{summary.boxes:,}"),
    ]
    if summary.lengths:
        spread = (
            f"{summary.lengths.least:,} / {summary.lengths.median:,} / {summary.lengths.most:,}"
        )
        facts.append(("shortest / median / longest", spread))
    facts.append(("max_length", limit))
    return (
        f"<header><h1>{visible(', '.join(head.files))}</h1>"
        f'<p class="model">as {visible(head.model)} gets it</p>'
        f"{_facts(facts)}{_kinds(head.findings)}{_findings(_of_files(head.findings))}{_LEGEND}"
        "</header>"
    )


_LEGEND = (
    '<p class="legend"><span class="t l">learned</span> <span class="t">shown, not learned</span> '
    '<span class="t c">control token</span> <span class="t c l">control token, learned</span> '
    '<span class="chip">the image tokens of a picture</span> '
    '<span class="t"><i>·</i></span> blank <span class="t"><i>→</i></span> tab '
    '<span class="t"><i>↵</i></span> line end. Each field is a token, its number in the '
    "vocabulary under the pointer; tokens that are parts of one character share a field. A box "
    "is drawn on the last picture before it.</p>"
)


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{items}</dl>'


def _of_files(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that are about no record."""
    return [found for found in findings if found.record is None]


def _kinds(findings: Sequence[Finding]) -> str:
    """How many findings of each kind the files have, errors first."""
    if not findings:
        return '<p class="kinds">check finds nothing to mend</p>'
    counts = Counter((found.severity, found.kind) for found in findings)
    items = "".join(
        f'<span class="{severity}">{visible(kind.replace("_", " "))} {number:,}</span> '
        for (severity, kind), number in sorted(counts.items())
    )
    return f'<p class="kinds">check finds in all records: {items}</p>'


def _findings(findings: Sequence[Finding]) -> str:
    if not findings:
        return ""
    items = "".join(
        f'<li class="{found.severity}"><b>{found.severity}: {visible(found.kind.replace("_", " "))}'
        f"</b> {visible(found.message)}<br>fix: {visible(found.fix)}</li>"
        for found in findings
    )
    return f'<ul class="findings">{items}</ul>'


def _sample(sample: SampleView, max_length: int | None) -> str:
    identity = "" if sample.id is None else f' <span class="id">{visible(sample.id)}</span>'
    numbers = count(1)
    turns = "".join(_turn(turn, numbers) for turn in sample.turns)
    pictures = "".join(_picture(view, n) for n, view in enumerate(sample.pictures, start=1))
    raw = "" if sample.raw is None else f'<pre class="raw">{visible(sample.raw)}</pre>'
    return (
        f'<section class="sample"><h2>{visible(sample.name)}{identity}</h2>'
        f"{_counts(sample, max_length)}{_findings(sample.findings)}"
        f'<div class="body"><div class="pictures">{pictures}</div>'
        f'<div class="turns">{turns}{raw}</div></div></section>'
    )


def _counts(sample: SampleView, max_length: int | None) -> str:
    if not sample.turns:
        return '<p class="counts">cannot be laid out: the model gets nothing of it</p>'
    share = sample.learned_tokens / sample.tokens
    regions = [region for picture in sample.pictures for region in picture.regions]
    quads = sum(isinstance(region, Quad) for region in regions)
    over = max_length is not None and sample.tokens > max_length
    length = f"{sample.tokens:,} tokens" + (f", more than {max_length:,}" if over else "")
    parts = [
        f'<span class="error">{length}</span>' if over else length,
        f"{sample.learned_tokens:,} learned ({share:.1%})",
        _number(len(sample.pictures), "picture"),
        f"{_number(len(regions) - quads, 'box', 'boxes')} drawn",
        *([f"{_number(quads, 'quad')} drawn"] if quads else []),
    ]
    return f'<p class="counts">{" · ".join(parts)}</p>'


def _number(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _turn(pieces: Iterable[Piece], numbers: Iterator[int]) -> str:
    """The fields of a turn; `numbers` counts the pictures of the sample."""
    fields = "<wbr>".join(
        _chip(piece, next(numbers)) if piece.kind == "image" else _field(piece) for piece in pieces
    )
    return f'<div class="turn">{fields}</div>'


def _field(piece: Piece) -> str:
    """One token, or a few that share a character."""
    control = " c" if piece.kind == "control" else ""
    learned = " l" if piece.learned else ""
    ids = " ".join(map(str, piece.token_ids))
    text = visible(piece.text, marks=True)
    return f'<span class="t{control}{learned}" title="{ids}">{text}</span>'


def _chip(piece: Piece, number: int) -> str:
    tokens = f"{len(piece.token_ids):,} image tokens"
    return f'<span class="chip" title="{piece.token_ids[0]}">picture {number}: {tokens}</span>'


def _picture(view: PictureView, number: int) -> str:
    caption = f"<b>{number}</b> {visible(view.source)}"
    if view.data_uri is None or view.size is None:
        return (
            '<figure><p class="missing">cannot be opened</p>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    regions = "".join(_region(region, n) for n, region in enumerate(view.regions))
    width, height = view.size
    shown_width, shown_height = _shown_size(width, height)
    return (
        f'<figure><div class="picture"><img src="{escape(view.data_uri)}" alt="" '
        f'width="{shown_width}" height="{shown_height}">{regions}</div>'
        f"<figcaption>{caption} <span>{width:,} × {height:,} pixels</span></figcaption></figure>"
    )


def _shown_size(width: int, height: int) -> tuple[int, int]:
    """The size of a picture on the page: neither too large nor too small for its labels."""
    longer = max(width, height)
    scale = min(PICTURE_SIDE / longer, max(1.0, _LEAST_SIDE / longer))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _region(region: Region, number: int) -> str:
    """A frame over the picture, placed in per cent of it, with its label.

    A quad's frame is the rectangle around it, in which its four sides are drawn.
    """
    around = region if isinstance(region, Box) else _around(region)
    place = {
        "left": around.x1,
        "top": around.y1,
        "width": around.x2 - around.x1,
        "height": around.y2 - around.y1,
    }
    style = ";".join(f"{name}:{value * 100 / GRID:g}%" for name, value in place.items())
    colour = _COLOURS[number % len(_COLOURS)]
    inside = " in" if around.y1 < _LABEL_ROOM else ""
    leftward = " left" if around.x1 > GRID / 2 else ""
    ref = region.ref
    label = f'<span class="label{inside}{leftward}">{visible(ref)}</span>' if ref else ""
    shape, sides = ("quad", _sides(region, around)) if isinstance(region, Quad) else ("box", "")
    return f'<div class="{shape}" style="{style};--colour:{colour}">{sides}{label}</div>'


def _around(quad: Quad) -> Box:
    """The smallest box that holds a quad."""
    xs, ys = zip(*quad.corners, strict=True)
    return Box(min(xs), min(ys), max(xs), max(ys), quad.ref)


def _sides(quad: Quad, around: Box) -> str:
    """A quad's outline, stretched over the box around it."""
    points = " ".join(f"{x - around.x1},{y - around.y1}" for x, y in quad.corners)
    width, height = (max(1, side) for side in (around.x2 - around.x1, around.y2 - around.y1))
    return (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">'
        f'<polygon points="{points}"/></svg>'
    )
