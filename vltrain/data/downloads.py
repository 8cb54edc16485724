"""A picture's URL -> its file in a cache on disk, or why it could not be fetched.

A data file can be somebody else's, so its URLs may ask for nothing but pictures of the open
network: every hop's name is looked up once, the addresses are judged, and the connection goes to
one of those. Proxies that the environment names are not used.
"""

import hashlib
import http.client
import ipaddress
import os
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

from vltrain import __version__
from vltrain.data.faults import Fault
from vltrain.data.images import picture_size, shown

MOST_HOPS = 5  # redirects that are followed
_REDIRECTS = (301, 302, 303, 307, 308)
_READ_BYTES = 65_536  # at once
_KEPT_BY_QUOTING = "/%:@!$&'()*+,;=~-._"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # the last 32 bits are an IPv4 address
_HEADERS = {
    "User-Agent": f"vltrain/{__version__}",
    "Accept": "image/*,*/*;q=0.5",
    "Accept-Encoding": "identity",
    "Connection": "close",
}
_UNREACHABLE_FIX = "mend the URL, or remove the record"


class _NotFetchedError(Exception):
    """Why a URL gave no picture; `what` is said behind the picture's name."""

    def __init__(
        self, kind: str, what: str, fix: str = _UNREACHABLE_FIX, *, again: bool = False
    ) -> None:
        super().__init__(what)
        self.kind, self.what, self.fix = kind, what, fix
        self.again = again  # may the next try do better?


@dataclass(frozen=True)
class Target:
    """What a URL asks for, and of whom."""

    name: str  # of the server
    port: int
    host: str  # name and port as the URL has them
    path: str  # quoted, its query included
    encrypted: bool
    addresses: tuple[str, ...] = ()  # of the name, once it was looked up


def target_of(url: str) -> Target:
    """The parts of an http(s) URL.

    Raises:
        _NotFetchedError: it has another scheme, no server, a broken port, or a user's name.
    """
    try:
        parts = urlsplit(url)
        port, name = parts.port, parts.hostname or ""
        path = quote(parts.path or "/", _KEPT_BY_QUOTING)
        query = f"?{quote(parts.query, _KEPT_BY_QUOTING + '?')}" if parts.query else ""
        if ":" not in name:  # or it is an IPv6 address
            name = name.encode("idna").decode("ascii")
    except ValueError as error:
        raise _NotFetchedError("unreachable_url", f"is no URL ({error})") from error
    if parts.scheme not in ("http", "https"):
        raise _NotFetchedError("unreachable_url", f"leads to {shown(url)}, which is not http(s)")
    if not name:
        raise _NotFetchedError("unreachable_url", "names no server")
    if parts.username is not None:
        fix = "take the name out of the URL, or write a file's path"
        raise _NotFetchedError("unreachable_url", "names a user, and nobody is signed in", fix)
    return Target(
        name=name,
        port=port or (443 if parts.scheme == "https" else 80),
        host=(f"[{name}]" if ":" in name else name) + (f":{port}" if port else ""),
        path=path + query,
        encrypted=parts.scheme == "https",
    )


@dataclass(frozen=True)
class Downloads:
    """How pictures are fetched, and where they are kept. Small, and can be sent to any worker."""

    folder: Path  # the cache; a picture that is in it is not asked for again
    timeout: float = 20.0  # seconds of one try, from connecting to the last byte
    most_bytes: int = 50_000_000  # of one picture
    retries: int = 2  # after a timeout, a server's own error (5xx) and "too many requests" (429)
    allow_private: bool = False  # addresses of this machine and of networks that are not public
    first_pause: float = 0.5  # seconds before the first retry; doubled before each one after it

    def fetch(self, url: str) -> Path | Fault:
        """The file that an http(s) URL's picture is kept in; downloaded unless it is there.

        Only what begins like a picture is kept. Several processes may fetch the same one.
        """
        file = self.file_of(url)
        if file.is_file():
            return file
        try:
            content = self._download(url)
        except _NotFetchedError as failure:
            message = f"picture {shown(url)!r} {failure.what}"
            return Fault(failure.kind, message, failure.fix)
        size = picture_size(content, name=shown(url))
        if isinstance(size, Fault):
            return size
        try:
            _write_beside(file, content)
        except OSError as error:
            message = f"{self.folder} cannot be written ({error.strerror or error})"
            return Fault("unwritable_cache", message, "set data.cache_dir to another folder")
        return file

    def file_of(self, url: str) -> Path:
        """Where a URL's picture is kept, once it is downloaded."""
        digest = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / digest[:2] / digest

    def _download(self, url: str) -> bytes:
        pause = self.first_pause
        for _ in range(self.retries):
            try:
                return self._follow(url)
            except _NotFetchedError as failure:
                if not failure.again:
                    raise
            time.sleep(pause)
            pause *= 2
        return self._follow(url)

    def _follow(self, url: str) -> bytes:
        """What a URL holds, or what it leads to does: one try."""
        deadline = time.monotonic() + self.timeout
        for _ in range(MOST_HOPS + 1):
            found = self._ask(target_of(url), deadline)
            if isinstance(found, bytes):
                return found
            url = _joined(url, found)
        raise _NotFetchedError("unreachable_url", f"leads on more than {MOST_HOPS} times")

    def _ask(self, target: Target, deadline: float) -> bytes | str:
        """What one server answers: a body, or the URL where it is to be found."""
        try:
            with _connection(self._checked(target), deadline) as connection:
                connection.request("GET", target.path, headers=_HEADERS | {"Host": target.host})
                with connection.getresponse() as response:
                    location = response.getheader("Location")
                    if response.status in _REDIRECTS and location:
                        return location
                    if response.status != 200:
                        raise _refusal(response)
                    return _body(response, self.most_bytes)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, TimeoutError) or time.monotonic() >= deadline:
                what = f"was not there after {self.timeout:g} seconds"
                fix = "try again, or raise data.url_timeout"
                raise _NotFetchedError("unreachable_url", what, fix, again=True) from error
            reason = str(error) or type(error).__name__
            what = f"cannot be fetched from {target.name} ({reason})"
            raise _NotFetchedError("unreachable_url", what) from error

    def _checked(self, target: Target) -> Target:
        """A target with the addresses of its name, none of which is private."""
        try:
            found = socket.getaddrinfo(target.name, target.port, type=socket.SOCK_STREAM)
        except ValueError as error:  # a name that no name server can be asked for
            raise OSError("it is no name of a server") from error
        addresses = tuple(dict.fromkeys(str(place[4][0]) for place in found))
        private = [address for address in addresses if not is_public(address)]
        if private and not self.allow_private:
            what = f"is on {target.name}, whose address {private[0]} is not public"
            fix = "set data.url_private: true if you trust the data, or write a file's path"
            raise _NotFetchedError("private_url", what, fix)
        return replace(target, addresses=addresses)


def _joined(url: str, location: str) -> str:
    """Where a redirect leads."""
    try:
        return urljoin(url, location)
    except ValueError as error:
        what = f"leads to {shown(location)!r}, which is no URL"
        raise _NotFetchedError("unreachable_url", what) from error


def is_public(address: str) -> bool:
    """Does an IP address belong to the open network?

    Not so for private, shared, loopback, link-local, multicast and reserved ones; an IPv4
    address inside an IPv6 one counts as what it is.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


class _Connection(http.client.HTTPConnection):
    """A connection to one of a target's addresses: the name is not looked up again."""

    def __init__(self, target: Target, deadline: float) -> None:
        super().__init__(target.name, target.port)
        self.target, self.deadline = target, deadline
        self.line: socket.socket | None = None  # outlives `sock` until the answer is read

    def connect(self) -> None:
        self.line = self._reached()
        if self.target.encrypted:
            self.line = _tls().wrap_socket(
                self.line, server_hostname=self.target.name, do_handshake_on_connect=False
            )
            self.line.do_handshake()
        self.sock = self.line

    def _reached(self) -> socket.socket:
        """A socket to the first address that answers."""
        failure = OSError("its name has no address")
        for address in self.target.addresses:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            try:
                return socket.create_connection((address, self.target.port), timeout=left)
            except OSError as error:
                failure = error
        raise failure

    def cut(self) -> None:
        """End whatever is being waited for; called from another thread."""
        if self.line is not None:
            with suppress(OSError):  # it was over already
                socket.socket.shutdown(self.line, socket.SHUT_RDWR)  # TLS's own would wait


@contextmanager
def _connection(target: Target, deadline: float) -> Iterator[_Connection]:
    """A connection that ends at the deadline, however slowly its server talks."""
    connection = _Connection(target, deadline)
    watch = threading.Timer(max(0.0, deadline - time.monotonic()), connection.cut)
    watch.daemon = True
    watch.start()
    try:
        yield connection
        if time.monotonic() >= deadline:  # what was read then may be cut off
            raise TimeoutError
    finally:
        watch.cancel()
        connection.close()


@cache
def _tls() -> ssl.SSLContext:
    """Certificates as the system has them; read once."""
    return ssl.create_default_context()


def _refusal(response: http.client.HTTPResponse) -> _NotFetchedError:
    """Why an answer is no picture."""
    status = f"{response.status} {response.reason}".strip()
    again = response.status == 429 or response.status >= 500
    what = f"cannot be fetched: the server answers {status}"
    return _NotFetchedError("unreachable_url", what, again=again)


def _body(response: http.client.HTTPResponse, most_bytes: int) -> bytes:
    """An answer's content, read no further than the limit whatever its header says."""
    content = bytearray()
    while piece := response.read(_READ_BYTES):
        content += piece
        if len(content) > most_bytes:
            what = f"has more than {most_bytes:,} bytes"
            fix = "raise data.url_max_bytes, or save it smaller"
            raise _NotFetchedError("huge_download", what, fix)
    if response.length:  # what its header promised and did not come
        raise http.client.IncompleteRead(bytes(content), response.length)
    return bytes(content)


def _write_beside(file: Path, content: bytes) -> None:
    """Write a file under a name of its own and rename it: it is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        draft.write_bytes(content)
        os.replace(draft, file)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
