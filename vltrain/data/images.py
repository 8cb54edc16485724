"""Find a picture's file, open it, and say what is wrong with it.

A picture's place is its file, or its bytes where they are in memory already.
"""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from vltrain.data.faults import Fault, error_of

Place = Path | bytes

_DEEP_GREY = ("I", "F")  # modes that Pillow's convert("RGB") clips to white; "I;16" begins so
TURNED_PICTURE = "turned_picture"  # kind of a fault that matters to records with boxes alone
# How many times a reduced JPEG is at least as large as what it is stretched to, on either side.
# From 3 times on, the result differs from that of a whole decode by less than half a grey level on
# average (benchmarks/jpeg_scale.py), which is what rounding pixels to bfloat16 changes, too.
REDUCED_MARGIN = 3
# What stands at the end of a whole file, and in how many of its last bytes: cameras write a
# little behind it.
_END_MARKS = {
    "JPEG": (b"\xff\xd9", 1024),
    "MPO": (b"\xff\xd9", 1024),  # a JPEG with more behind it, as telephones write
    "PNG": (b"IEND", 1024),
    "GIF": (b";", 1),
}
_TIFF_PARTS = ((273, 279), (324, 325))  # tags: where strips, or tiles, begin and their bytes
# What Pillow's decoders raise on bytes that are no picture.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def locate_file(
    source: str, *, data_file: Path | None = None, image_root: Path | None = None
) -> Path | Fault:
    """The file that a picture's path means, or why there is none."""
    candidates = image_candidates(source, data_file=data_file, image_root=image_root)
    for candidate in candidates:
        if os.path.isfile(candidate):  # unlike Path.is_file, false for any impossible name
            return Path(candidate)
    looked = ", ".join(candidates)
    message = f"picture {source!r} is missing; looked for {looked}"
    fix = "put the file there, mend the path, or set data.image_root"
    return Fault("missing_picture", message, fix)


def image_candidates(
    source: str, *, data_file: Path | None = None, image_root: Path | None = None
) -> list[str]:
    """Where a picture may lie, in the order of looking.

    Under `image_root`, beside the data file, in the working directory (where the original
    looks). An absolute path is looked for where it says. Texts, not paths: a check asks for a
    million of them, and paths take long to make.
    """
    here = os.getcwd()
    bases = [image_root, data_file.parent if data_file else None, ""]
    joined = (os.path.join(here, base, source) for base in bases if base is not None)
    return list(dict.fromkeys(_plain(path) for path in joined))


def _plain(path: str) -> str:
    """A path as `Path` writes it: without `.` and doubled slashes, `..` kept."""
    if "/." in path or "//" in path or path.endswith("/"):
        return str(Path(path))
    return path


def shown(source: str) -> str:
    """What a message calls a picture: its name, cut where it is long."""
    return source if len(source) <= 80 else f"{source[:79]}…"


def open_image(
    place: Place, *, name: str | None = None, where: str | None = None, side: int | None = None
) -> Image.Image:
    """The picture as RGB, decoded, its file closed.

    EXIF orientation is not applied (the model's original does not either). Grey deeper than
    8 bits is stretched from its darkest to its brightest value, where a plain conversion
    turns it white.

    Args:
        place: a file that exists, or bytes.
        name: what an error calls the picture; None: its path.
        where: what an error calls the record.
        side: pixels a side that the picture will be stretched to. A JPEG much larger than that
            is decoded at a half, a quarter or an eighth of its scale, which takes half the time
            or less. None: at its own scale.

    Raises:
        VltrainError: there is no picture in the place, or a broken one.
    """
    try:
        with Image.open(_readable(place)) as image:
            if side is not None:
                image.draft(None, (side * REDUCED_MARGIN, side * REDUCED_MARGIN))
            return _rgb(image)
    except _DECODE_ERRORS as error:
        fault = _broken(place, name, error)
        raise error_of([fault], where or _called(place, name)) from error


@dataclass(frozen=True)
class Look:
    """What one look at a picture tells."""

    faults: tuple[Fault, ...] = ()
    size: tuple[int, int] | None = None  # width and height in pixels; None: not known, or none
    path: str | None = None  # where it was found, if it is a file


def look_at(place: Place, *, name: str | None = None, decode: bool = True) -> Look:
    """A picture's size, and what is wrong with its bytes.

    Args:
        place, name: as for `open_image`.
        decode: read all of it; otherwise its header, and its end where the format marks it:
            a file that seems to be cut short is then decoded to be sure.
    """
    path = str(place) if isinstance(place, Path) else None
    try:
        with Image.open(_readable(place)) as image:
            size, mode = image.size, image.mode
            orientation = _orientation(image)
            if decode or not _ends_well(place, image):
                image.draft("RGB", (1, 1))  # the smallest that a JPEG can be decoded to
                image.load()
    except _DECODE_ERRORS as error:
        return Look((_broken(place, name, error),), path=path)
    called = _called(place, name)
    if 0 in size:
        message = f"picture {called} is {size[0]} x {size[1]} pixels"
        return Look((Fault("zero_size_picture", message, "replace the file"),), path=path)
    return Look(tuple(_oddities(called, mode, orientation)), size, path)


def _oddities(called: str, mode: str, orientation: int) -> Iterator[Fault]:
    """What people may not expect of a good picture: warnings."""
    if mode.startswith(_DEEP_GREY):
        message = f"picture {called} is grey of more than 8 bits: it is stretched over its range"
        fix = "save it with 8 bits to decide the range yourself"
        yield Fault("deep_grey", message, fix, "warning")
    if orientation in range(2, 9):
        message = (
            f"picture {called} is turned by viewers (EXIF orientation {orientation}), not here"
        )
        fix = "save it upright, or measure its boxes on the picture as it is stored"
        yield Fault(TURNED_PICTURE, message, fix, "warning")


def _orientation(image: Image.Image) -> int:
    """How viewers turn a picture, 1 for not at all, from its header; 1 where EXIF is broken."""
    if "exif" not in image.info:  # asked for it all the same, Pillow would decode a PNG
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODE_ERRORS:
        return 1
    return found if isinstance(found, int) else 1


def _ends_well(place: Place, image: Image.Image) -> bool:
    """Does a picture's file end as its format says? True where the format does not say."""
    with open(place, "rb") if isinstance(place, Path) else io.BytesIO(place) as file:
        length = file.seek(0, os.SEEK_END)
        if image.format in ("WEBP", "BMP"):
            file.seek(4 if image.format == "WEBP" else 2)
            behind = 8 if image.format == "WEBP" else 0  # "RIFF" and the number do not count
            return int.from_bytes(file.read(4), "little") + behind <= length
        if isinstance(image, TiffImageFile):
            return _tiff_end(image) <= length
        mark, tail_bytes = _END_MARKS.get(image.format or "", (b"", 0))
        file.seek(max(0, length - tail_bytes))
        return mark in file.read(tail_bytes)


def _tiff_end(image: TiffImageFile) -> int:
    """Up to which byte the pixels of a TIFF go, as its header says; 0 where it does not."""
    ends = [0]
    for starts, sizes in _TIFF_PARTS:
        if starts in image.tag_v2 and sizes in image.tag_v2:
            pairs = zip(image.tag_v2[starts], image.tag_v2[sizes], strict=False)
            ends += [start + size for start, size in pairs]
    return max(ends)


def picture_size(place: Place, *, name: str | None = None) -> tuple[int, int] | Fault:
    """Width and height in pixels as a picture's header has them, or why it has none."""
    try:
        with Image.open(_readable(place)) as image:
            return image.size
    except _DECODE_ERRORS as error:
        return _broken(place, name, error)


def _readable(place: Place) -> Path | io.BytesIO:
    """What Pillow opens."""
    return place if isinstance(place, Path) else io.BytesIO(place)


def _called(place: Place, name: str | None) -> str:
    """What a message calls a picture."""
    return name or (str(place) if isinstance(place, Path) else "in memory")


def _rgb(image: Image.Image) -> Image.Image:
    if not image.mode.startswith(_DEEP_GREY):
        return image.convert("RGB")
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    darkest, brightest = float(values.min()), float(values.max())
    scale = 255.0 / (brightest - darkest) if brightest > darkest else 0.0
    grey = np.rint((values - darkest) * scale).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _broken(place: Place, name: str | None, error: BaseException) -> Fault:
    """Why some bytes could not be read as a picture."""
    called = _called(place, name)
    if isinstance(error, Image.DecompressionBombError):
        message = f"picture {called} has too many pixels: {error}"
        return Fault("huge_picture", message, "save it smaller; the model sees far fewer pixels")
    if _is_empty(place):
        message = f"picture {called} is empty (0 bytes)"
        return Fault("zero_size_picture", message, "replace the file")
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, UnidentifiedImageError):  # its own words name an object in memory
        reason = "it begins like no known kind of picture"
    message = f"picture {called} cannot be read ({reason})"
    return Fault("broken_picture", message, "replace the file, or remove the record")


def _is_empty(place: Place) -> bool:
    if isinstance(place, bytes):
        return not place
    return os.path.isfile(place) and os.path.getsize(place) == 0
