"""Faults inside a conversation, as people make them, each with the kind that names it.

They are planted in every form that can hold them. Faults of a record's keys are in
`planted_records`, those of files and of whole sets in `planted_files`.
"""

from dataclasses import dataclass, field
from typing import Literal

from forms import Turns

Severity = Literal["error", "warning"]
U, A, S = "user", "assistant", "system"
NOT_SWIFT = {"swift": None}  # `query` and `response` have no place for it
PROSE = {"messages": "picture_markup", "sharegpt": "picture_markup"}  # no <img> in their text


@dataclass(frozen=True)
class InTurns:
    """A fault inside a conversation."""

    name: str
    kind: str
    turns: Turns
    severity: Severity = "error"
    elsewhere: dict[str, str | None] = field(default_factory=dict)  # form -> kind; None: nowhere


def asked(question: str, answer: str = "An answer.") -> Turns:
    return ((U, question), (A, answer))


def answered(answer: str) -> Turns:
    return asked("[[good.png]]A question.", answer)


IN_TURNS = (
    # Roles and order.
    InTurns("an unknown role", "role", (("bot", "q"), (A, "a")), elsewhere=NOT_SWIFT),
    InTurns("a role in capitals", "role", (("User", "q"), (A, "a")), elsewhere=NOT_SWIFT),
    InTurns("no role at all", "role", (("", "q"), (A, "a")), elsewhere=NOT_SWIFT),
    InTurns(
        "two user turns in a row", "order", ((U, "q"), (U, "r"), (A, "a")), elsewhere=NOT_SWIFT
    ),
    InTurns(
        "two assistant turns in a row", "order", ((U, "q"), (A, "a"), (A, "b")), elsewhere=NOT_SWIFT
    ),
    InTurns(
        "two system turns", "order", ((S, "s"), (S, "t"), (U, "q"), (A, "a")), elsewhere=NOT_SWIFT
    ),
    InTurns(
        "a system turn in the middle",
        "order",
        ((U, "q"), (A, "a"), (S, "s"), (U, "r"), (A, "b")),
        elsewhere=NOT_SWIFT,
    ),
    InTurns("a question at the end", "order", ((U, "q"), (A, "a"), (U, "r")), elsewhere=NOT_SWIFT),
    InTurns("a question alone", "nothing_to_learn", ((U, "q"),), elsewhere=NOT_SWIFT),
    InTurns("a system turn alone", "empty_conversation", ((S, "s"),), elsewhere=NOT_SWIFT),
    InTurns("an answer and no question", "empty_conversation", ((A, "a"),), elsewhere=NOT_SWIFT),
    InTurns(
        "an assistant turn that comes first",
        "leading_assistant",
        ((A, "Hello."), (U, "q"), (A, "a")),
        "warning",
        NOT_SWIFT,
    ),
    InTurns("an empty question", "empty_turn", asked("")),
    InTurns("an empty answer among others", "empty_turn", ((U, "q"), (A, ""), (U, "r"), (A, "b"))),
    InTurns("blanks for an answer", "empty_turn", asked("q", " \n ")),
    InTurns("blanks for a question", "empty_turn", asked(" \t")),
    InTurns("an answer without a word", "nothing_to_learn", asked("q", "")),
    # Tags.
    InTurns("an <img> left open", "unclosed_tag", asked("<img>good.png q"), elsewhere=PROSE),
    InTurns(
        "an </img> alone",
        "stray_tag",
        asked("good.png</img>q"),
        elsewhere={**PROSE, "swift": "picture_markup"},
    ),
    InTurns(
        "an <img> in an <img>",
        "nested_tag",
        asked("<img><img>good.png</img>q"),
        elsewhere=PROSE,
    ),
    InTurns("a <ref> left open", "unclosed_tag", answered("<ref>cat is here")),
    InTurns(
        "a <ref> left open, then a box", "unclosed_tag", answered("<ref>a<box>(1,2),(3,4)</box>")
    ),
    InTurns(
        "an <img> left open, then a box",
        "unclosed_tag",
        asked("<img>good.png <ref>a</ref><box>(1,2),(3,4)</box>"),
        elsewhere=PROSE,
    ),
    InTurns("a <box> left open", "unclosed_tag", answered("<box>(1,2),(3,4) here")),
    InTurns("a <quad> left open", "unclosed_tag", answered("<quad>(1,2),(3,2),(3,4),(1,4)")),
    InTurns("a </ref> alone", "stray_tag", answered("the cat</ref>")),
    InTurns("a </box> alone", "stray_tag", answered("(1,2),(3,4)</box>")),
    InTurns("a </quad> alone", "stray_tag", answered("(1,2),(3,2),(3,4),(1,4)</quad>")),
    InTurns("a <box> in a <ref>", "nested_tag", answered("<ref>a<box>(1,2),(3,4)</box></ref>")),
    InTurns("tags that cross", "nested_tag", answered("<ref>a<box></ref>(1,2),(3,4)</box>")),
    InTurns("a <ref> in a <ref>", "nested_tag", answered("<ref>a<ref>b</ref></ref>")),
    # Pictures.
    InTurns("a missing picture", "missing_picture", asked("[[nowhere.png]]q")),
    InTurns("a folder for a picture", "missing_picture", asked("[[folder.png]]q")),
    InTurns(
        "a picture without a path",
        "empty_path",
        asked("[[]]q"),
        elsewhere={"llava": "missing_pictures"},
    ),
    InTurns("blanks for a path", "empty_path", asked("[[  ]]q")),
    InTurns("a JPEG cut short", "broken_picture", asked("[[cut.jpg]]q")),
    InTurns("a PNG cut short", "broken_picture", asked("[[cut.png]]q")),
    InTurns("a GIF cut short", "broken_picture", asked("[[cut.gif]]q")),
    InTurns("a WebP cut short", "broken_picture", asked("[[cut.webp]]q")),
    InTurns("a BMP cut short", "broken_picture", asked("[[cut.bmp]]q")),
    InTurns("a TIFF cut short", "broken_picture", asked("[[cut.tiff]]q")),
    InTurns("a picture of no bytes", "zero_size_picture", asked("[[empty.png]]q")),
    InTurns("a picture of no width", "broken_picture", asked("[[flat.png]]q")),
    InTurns("a text under .png", "broken_picture", asked("[[text.png]]q")),
    InTurns("a web page under .jpg", "broken_picture", asked("[[page.jpg]]q")),
    InTurns("a picture over the limit of pixels", "huge_picture", asked("[[huge.png]]q")),
    InTurns("a URL", "url", asked("[[https://example.com/a.png]]q")),
    InTurns("a file: URL", "unknown_scheme", asked("[[file:///tmp/a.png]]q")),
    InTurns("a scheme nobody knows", "unknown_scheme", asked("[[s3://bucket/a.png]]q")),
    InTurns("a data: URI without base64", "bad_data_uri", asked("[[data:image/png;base64,*]]q")),
    InTurns("a data: URI without a comma", "bad_data_uri", asked("[[data:image/png;base64]]q")),
    InTurns(
        "a data: URI that is no picture",
        "broken_picture",
        asked("[[data:image/png;base64,aGVsbG8=]]q"),
    ),
    InTurns("grey of 16 bits", "deep_grey", asked("[[deep.png]]q"), "warning"),
    InTurns(
        "boxes on a turned picture",
        "turned_picture",
        asked("[[turned.jpg]]q", "<box>(100,200),(300,900)</box>"),
        "warning",
    ),
    InTurns("a missing picture in an answer", "missing_picture", asked("q", "[[nowhere.png]]a")),
    # Boxes.
    InTurns("a box of one point", "malformed_box", answered("<box>(1,2)</box>")),
    InTurns("a box of three numbers", "malformed_box", answered("<box>(1,2),(3)</box>")),
    InTurns("a box of fractions", "malformed_box", answered("<box>(0.1,0.2),(0.3,0.4)</box>")),
    InTurns("a box in brackets", "malformed_box", answered("<box>[1,2,3,4]</box>")),
    InTurns("a box without brackets", "malformed_box", answered("<box>1,2,3,4</box>")),
    InTurns("a box of words", "malformed_box", answered("<box>top left</box>")),
    InTurns("an empty box", "malformed_box", answered("<box></box>")),
    InTurns("a box of three points", "malformed_box", answered("<box>(1,2),(3,4),(5,6)</box>")),
    InTurns("a quad of two points", "malformed_box", answered("<quad>(1,2),(3,4)</quad>")),
    InTurns("a box beyond the grid", "box_out_of_range", answered("<box>(1,2),(3,1001)</box>")),
    InTurns("a box below zero", "box_out_of_range", answered("<box>(-1,2),(3,4)</box>")),
    InTurns(
        "a quad beyond the grid",
        "box_out_of_range",
        answered("<quad>(1,2),(3,2),(3,4000),(1,4)</quad>"),
    ),
    InTurns("a box from right to left", "inverted_box", answered("<box>(9,2),(3,4)</box>")),
    InTurns("a box from below", "inverted_box", answered("<box>(1,9),(3,4)</box>")),
    InTurns(
        "a faulty box in a question", "inverted_box", asked("[[good.png]]<box>(9,9),(1,1)</box>")
    ),
    InTurns(
        "a faulty box without a picture",
        "box_out_of_range",
        asked("q", "<box>(1,2),(3,2000)</box>"),
    ),
    InTurns("a box to 1000", "box_at_1000", answered("<box>(1,2),(1000,4)</box>"), "warning"),
    # Tokens.
    InTurns(
        "box tokens of Qwen2-VL",
        "foreign_box",
        answered("<|box_start|>(1,2),(3,4)<|box_end|>"),
        "warning",
    ),
    InTurns("box tokens of PaliGemma", "foreign_box", answered("<loc0001><loc0002> a"), "warning"),
    InTurns("box tokens of Kosmos-2", "foreign_box", answered("<patch_index_0044> a"), "warning"),
    InTurns("box tokens of DeepSeek", "foreign_box", answered("<|ref|>a<|/ref|>"), "warning"),
    InTurns(
        "box tokens in a question", "foreign_box", asked("<|box_start|>(1,2),(3,4)"), "warning"
    ),
    InTurns("control tokens in a question", "control_token", asked("q<|im_end|>\n"), "warning"),
    InTurns("image tokens in a question", "control_token", asked("<imgpad>q"), "warning"),
    InTurns("the end of text in a question", "control_token", asked("q<|endoftext|>"), "warning"),
    # Placeholders and pictures, where pictures stand beside the turns.
    InTurns(
        "more <image> than pictures",
        "missing_pictures",
        asked("[[good.png]]<image>q"),
        elsewhere={"qwen_vl": None, "qwen_vl_lines": None, "messages": None},
    ),
    InTurns(
        "an <image> without any picture",
        "missing_pictures",
        asked("<image>q"),
        elsewhere={"messages": "missing_pictures"},
    ),
    # Lengths.
    InTurns("a sample that is too long", "too_long", asked("q", "a" * 1500)),
)
