"""Pictures by URL: a server on this machine, and what came of asking it."""

import http.server
import io
import threading
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from vltrain.data.faults import Fault


def png(size: tuple[int, int] = (8, 6)) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", size, (10, 20, 30)).save(written, "PNG")
    return written.getvalue()


Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


class PictureServer(http.server.ThreadingHTTPServer):
    """Answers each path as it is told to, and remembers what it was asked for."""

    daemon_threads = True

    def __init__(self, host: str = "127.0.0.1") -> None:
        super().__init__((host, 0), _Handler)
        self.answers: dict[str, Answer] = {}
        self.asked: list[str] = []
        self.ended = threading.Event()

    def url(self, path: str, scheme: str = "http") -> str:
        return f"{scheme}://{self.server_address[0]}:{self.server_port}{path}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: PictureServer

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.server.answers[self.path](self)

    def log_message(self, *_: object) -> None:
        pass


def gives(
    content: bytes, status: int = 200, *, length: int | None = None, **headers: str
) -> Answer:
    """An answer with a body; `length` is what its header says, -1 for no such header."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        if length != -1:
            handler.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def leads_to(url: str) -> Answer:
    return gives(b"", 302, Location=url)


def in_turn(*answers: Answer) -> Answer:
    """One answer after the other."""
    left = list(answers)
    return lambda handler: left.pop(0)(handler)


def fault_of(found: object, kind: str) -> str:
    """The message of a fault, which must be of a kind and say how to mend it."""
    assert isinstance(found, Fault), found
    assert found.kind == kind
    assert found.fix
    return found.message


def files_in(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in folder.rglob("*") if file.is_file()]
