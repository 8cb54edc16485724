"""Markup inside a text: pictures as `<img>path</img>`, and tags that must pair up."""

import re
from collections.abc import Iterable

from vltrain.data.conversation import ImagePart, Part, TextPart, Turn
from vltrain.data.faults import Fault, Grade

TAG = re.compile(r"<(/?)(img|ref|box|quad)>")
BOX_TAG = re.compile(r"<(?:box|quad)>")
PICTURE_TAG = re.compile(r"</?img>")

# Tokens that part turns or stand for pictures, of Qwen's models; text that holds them stays text.
_CONTROL_TOKEN = re.compile(
    r"<\|(?:im_start|im_end|endoftext|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>"
    r"|<imgpad>"
)
# How Qwen2-VL, PaliGemma, Kosmos-2 and DeepSeek-VL2 write places, which here is plain text.
_FOREIGN_BOX = re.compile(
    r"<\|(?:box|object_ref|quad)_(?:start|end)\|>|<loc\d{4}>|<patch_index_\d{4}>"
    r"|<\|/?(?:det|ref)\|>"
)


def parts_of(text: str, where: str) -> tuple[tuple[Part, ...], list[Fault]]:
    """Take text apart at its pictures; find the tags that do not pair up.

    `<ref>`, `<box>` and `<quad>` stay in the text, which keeps every byte. `<|…|>` and
    `<imgpad>` mean nothing here: they are what somebody wrote.
    """
    parts: list[Part] = []
    faults: list[Fault] = []
    opened: re.Match[str] | None = None  # the tag that waits for its end
    inside: re.Match[str] | None = None  # the first tag in an <img> that waits for its end
    outer: list[tuple[re.Match[str], re.Match[str]]] = []  # opened before, and what began in it
    text_start = 0
    for tag in TAG.finditer(text):
        closes, name = bool(tag[1]), tag[2]
        if opened and closes and opened[2] == name:
            if inside:
                faults.append(_misplaced("nested_tag", where, inside, "inside <img>", "unreadable"))
            elif name == "img":
                source = text[opened.end() : tag.start()].strip()
                parts += [TextPart(text[text_start : opened.start()]), ImagePart(source)]
                text_start = tag.end()
                faults += [] if source else [_empty_path(where)]
            opened = inside = None
        elif opened and opened[2] == "img":
            inside = inside or tag
        elif closes:
            pair = next((pair for pair in reversed(outer) if pair[0][2] == name), None)
            if pair:
                outer.remove(pair)
                faults.append(_misplaced("nested_tag", where, pair[1], f"inside <{name}>"))
            else:
                faults.append(_misplaced("stray_tag", where, tag, "without its beginning"))
        else:
            outer += [(opened, tag)] if opened else []
            opened = tag
    for tag in [*(begun for begun, _ in outer), *([opened] if opened else [])]:
        grade: Grade = "unreadable" if tag[2] == "img" else "strict"
        faults.append(_misplaced("unclosed_tag", where, tag, "without its end", grade))
    parts.append(TextPart(text[text_start:]))
    return joined(parts), faults


def prose_faults(text: str, where: str) -> list[Fault]:
    """What is wrong with text in which `<img>` names no picture: a tag of it, or unpaired ones.

    Such a tag is refused. Read as a picture it would open whatever path somebody wrote; left as
    text it would end a picture that never began. No reading takes it: the original knew no format
    but its own.
    """
    tag = PICTURE_TAG.search(text)
    if tag is None:
        return parts_of(text, where)[1]
    around = text[max(0, tag.start() - 12) : tag.end() + 12]
    message = f"{where} has {tag[0]} in its text, where this format has no pictures: {around!r}"
    fix = "write the picture as this format does, or set data.format: qwen_vl to read the tags"
    return [Fault("picture_markup", message, fix)]


def token_faults(turn: Turn) -> list[Fault]:
    """Tokens in a turn's text that another model, or no writer, would mean: warnings."""
    text = turn.text
    if "<|" not in text and "<loc" not in text and "<patch" not in text and "<imgpad" not in text:
        return []
    faults: list[Fault] = []
    foreign = _FOREIGN_BOX.search(text)
    if foreign:
        message = f"{turn.name} has {foreign[0]}, a box token of another model family"
        fix = "write <ref>…</ref><box>(x1,y1),(x2,y2)</box>"
        faults.append(Fault("foreign_box", message, fix, "warning"))
    control = _CONTROL_TOKEN.search(text) if turn.role == "user" else None
    if control:
        message = f"{turn.name} has {control[0]} in its words, which is read as plain text"
        fix = "remove it, or make the turns that it parts turns of the record"
        faults.append(Fault("control_token", message, fix, "warning"))
    return faults


def joined(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Parts without empty texts, and with texts that touch made one: they are tokenised as one."""
    result: list[Part] = []
    for part in parts:
        if not isinstance(part, TextPart):
            result.append(part)
        elif result and isinstance(result[-1], TextPart):
            result[-1] = TextPart(result[-1].text + part.text)
        elif part.text:
            result.append(part)
    return tuple(result)


def _empty_path(where: str) -> Fault:
    message = f"{where} has an <img></img> without a path"
    return Fault("empty_path", message, "write the picture's path, or remove the tags", "strict")


def _misplaced(
    kind: str, where: str, tag: re.Match[str], how: str, grade: Grade = "strict"
) -> Fault:
    """A tag that does not pair up, with the text around it."""
    around = tag.string[max(0, tag.start() - 12) : tag.end() + 12]
    message = f"{where} has {tag[0]} {how}, at character {tag.start()}: {around!r}"
    return Fault(kind, message, f"write <{tag[2]}>…</{tag[2]}>, one after the other", grade)
