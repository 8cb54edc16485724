"""A picture as a record names it -> its place, its size, its pixels, or what is wrong with it.

A picture is named by a path, by a `data:` URI, which holds its bytes, or by an http(s) URL where
that is allowed. `Pictures` is the one value that says where to look; all that reads records is
given it.
"""

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, unquote_to_bytes

from PIL import Image

from vltrain.config import DataConfig
from vltrain.data.downloads import Downloads
from vltrain.data.faults import Fault, error_of
from vltrain.data.images import (
    Look,
    Place,
    image_candidates,
    locate_file,
    look_at,
    open_image,
    picture_size,
    shown,
)
from vltrain.data.swift import ImageSize

BadPictures = Literal["error", "drop"]
"""What becomes of a run that meets a bad picture: it stops, or goes on without the record."""

BAD_PICTURE_KINDS = frozenset(
    (
        *("missing_picture", "broken_picture", "zero_size_picture", "huge_picture"),
        *("bad_data_uri", "unreachable_url", "private_url", "huge_download"),
        "pixel_box",  # on a picture whose size is not known
    )
)
"""Kinds of faults for which a record can be dropped: they are the picture's, not the recipe's."""

_SCHEME = re.compile(r"(?:([A-Za-z][A-Za-z0-9+.-]*)://|(file|data):)", re.IGNORECASE)
_FETCHED = ("http", "https")
_DOWNLOADS_AT_ONCE = 8  # each waits for its server most of the time, and holds one picture
_BLANKS = re.compile(r"\s+")
_LONGEST_KEY = 500  # characters; paths are shorter
_DATA_URI_FIX = "write data:image/png;base64, and behind it the file's bytes in base64"


@dataclass(frozen=True)
class Pictures:
    """Where pictures are looked up, and what is fetched. Small; can be sent to any worker."""

    image_root: Path | None = None  # where relative paths are looked up first
    downloads: Downloads | None = None  # None: a URL is a fault

    def locate(self, source: str, data_file: Path | None = None) -> Place | Fault:
        """Where a picture's bytes are, or why there are none.

        Args:
            source: what a record names it by: a path, absolute or relative, a `data:` URI, or
                the URL of a picture, which is downloaded unless it was before.
            data_file: the file with the record; relative paths are looked up beside it, too.
        """
        if not source:
            fix = "write its path between <img> </img>"
            return Fault("empty_path", "a picture has no path", fix)
        scheme = _scheme_of(source)
        if scheme is None:
            return locate_file(source, data_file=data_file, image_root=self.image_root)
        if scheme == "data":
            return bytes_of_data_uri(source)
        if scheme in _FETCHED and self.downloads is not None:
            return self.downloads.fetch(source)
        return _scheme_fault(source, scheme)

    def open(
        self,
        source: str,
        data_file: Path | None = None,
        *,
        where: str | None = None,
        side: int | None = None,
    ) -> Image.Image:
        """The picture as RGB, as `images.open_image` gives it.

        Args:
            source, data_file: as for `locate`.
            where: what an error calls the record.
            side: pixels a side that it will be stretched to, as for `images.open_image`.

        Raises:
            VltrainError: the picture is missing or broken.
        """
        place = self.locate(source, data_file)
        if isinstance(place, Fault):
            raise error_of([place], where or shown(source))
        return open_image(place, name=_name(source, place), where=where, side=side)

    def size(self, source: str, data_file: Path | None = None) -> tuple[int, int] | Fault:
        """Width and height in pixels, from the header alone, or why they are not known."""
        place = self.locate(source, data_file)
        if isinstance(place, Fault):
            return place
        return picture_size(place, name=_name(source, place))

    def measure(self, data_file: Path) -> ImageSize:
        """What gives the size of the pictures of a data file's records by their names."""
        return partial(self.size, data_file=data_file)

    def faults(
        self, source: str, data_file: Path | None = None, *, decode: bool = True
    ) -> list[Fault]:
        """What is wrong with a picture; `decode` as for `images.look_at`."""
        return list(self.look(source, data_file, decode=decode).faults)

    def look(self, source: str, data_file: Path | None = None, *, decode: bool = True) -> Look:
        """A picture's place, size and faults; `decode` as for `images.look_at`."""
        place = self.locate(source, data_file)
        if isinstance(place, Fault):
            return Look((place,))
        return look_at(place, name=_name(source, place), decode=decode)

    def watched(self, source: str, data_file: Path | None = None) -> list[str]:
        """The paths whose files decide what a picture is, all where it is looked for if it is
        missing. Nothing is downloaded for it."""
        scheme = _scheme_of(source)
        if scheme in _FETCHED and self.downloads is not None:
            file = self.downloads.file_of(source)
            return [str(file)] if file.is_file() else []
        if scheme is not None:
            return []
        found = locate_file(source, data_file=data_file, image_root=self.image_root)
        if isinstance(found, Path):
            return [str(found)]
        return image_candidates(source, data_file=data_file, image_root=self.image_root)

    def fetch_all(self, sources: Iterable[str]) -> dict[str, Fault]:
        """Download the pictures that are URLs, several at a time; why some could not be."""
        if self.downloads is None:
            return {}
        urls = sorted({source for source in sources if _scheme_of(source) in _FETCHED})
        with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
            found = zip(urls, pool.map(self.downloads.fetch, urls), strict=True)
            return {url: fault for url, fault in found if isinstance(fault, Fault)}


LOCAL_PICTURES = Pictures()  # beside the data file and in the working directory


def pictures_of(config: DataConfig) -> Pictures:
    """Where a recipe's pictures are looked up."""
    downloads = None
    if config.allow_urls:
        downloads = Downloads(
            folder=(config.cache_dir or default_cache_dir()) / "pictures",
            timeout=config.url_timeout,
            most_bytes=config.url_max_bytes,
            retries=config.url_retries,
            allow_private=config.url_private,
        )
    return Pictures(config.image_root, downloads)


def pictures_at(image_root: Path | None = None, allow_urls: bool = False) -> Pictures:
    """Where pictures are looked up: a recipe's defaults, but for what is said here."""
    return pictures_of(DataConfig(files=(), image_root=image_root, allow_urls=allow_urls))


def default_cache_dir() -> Path:
    """Where the user's caches are, by the XDG rules: a folder of vltrain's own in there."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "vltrain"


def bytes_of_data_uri(uri: str) -> bytes | Fault:
    """What a `data:` URI holds (RFC 2397), in base64 or percent-encoded.

    The media type is not looked at: the bytes say themselves what they are. Blanks, and base64
    without its `=` at the end, are read as browsers read them.
    """
    head, comma, content = uri.partition(",")
    if not comma:
        message = f"picture {shown(uri)!r} is a data: URI without a comma, so it holds nothing"
        return Fault("bad_data_uri", message, _DATA_URI_FIX)
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(content.encode("utf-8", "surrogatepass"))
    letters = _BLANKS.sub("", unquote(content))
    try:
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: beyond ASCII
        message = f"picture {shown(uri)!r} is a data: URI whose base64 is broken ({error})"
        return Fault("bad_data_uri", message, _DATA_URI_FIX)


def source_key(source: str) -> str:
    """What a picture's name is remembered by: itself, or the digest of a name that holds bytes."""
    if len(source) <= _LONGEST_KEY:
        return source
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()


def _scheme_of(source: str) -> str | None:
    """A URL's scheme, in small letters; None for a path."""
    match = _SCHEME.match(source)
    return (match[1] or match[2]).lower() if match else None


def _name(source: str, place: Place) -> str:
    """What a message calls a picture that is there: its file's path, or its URL."""
    return str(place) if isinstance(place, Path) and not _scheme_of(source) else shown(source)


def _scheme_fault(source: str, scheme: str) -> Fault:
    """Why a URL is no picture's place."""
    if scheme in _FETCHED:
        message = f"picture {shown(source)!r} is a URL, and pictures are not downloaded"
        fix = "set data.allow_urls: true (--allow-urls), or download it and write the file's path"
        return Fault("url", message, fix)
    message = f"picture {shown(source)!r} has the unknown scheme {scheme}:"
    return Fault("unknown_scheme", message, "write the path of a file, without a scheme")
