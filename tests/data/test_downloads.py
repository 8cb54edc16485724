"""Pictures by URL, from a server on this machine; no test needs a network."""

import http.server
import io
import json
import pickle
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from letters import record
from PIL import Image

from vltrain.config import DataConfig
from vltrain.data import downloads
from vltrain.data.checks import check_files
from vltrain.data.downloads import MOST_HOPS, Downloads, is_public, target_of
from vltrain.data.faults import Fault
from vltrain.data.pictures import Pictures, pictures_of


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


@pytest.fixture
def server() -> Iterator[PictureServer]:
    with PictureServer() as started:
        thread = threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield started
        started.ended.set()
        started.shutdown()
        thread.join()


@pytest.fixture
def downloader(tmp_path) -> Downloads:
    """Downloads from this machine, which is a private address."""
    return Downloads(
        tmp_path / "cache", timeout=5.0, retries=2, allow_private=True, first_pause=0.01
    )


def fault_of(found: object, kind: str) -> str:
    """The message of a fault, which must be of a kind and say how to mend it."""
    assert isinstance(found, Fault), found
    assert found.kind == kind
    assert found.fix
    return found.message


def files_in(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in folder.rglob("*") if file.is_file()]


def test_a_picture_is_downloaded_once_and_kept(server, downloader):
    server.answers["/a.png"] = gives(png())

    first = downloader.fetch(server.url("/a.png"))
    again = downloader.fetch(server.url("/a.png"))

    assert first == again
    assert Pictures(downloads=downloader).watched(server.url("/a.png")) == [str(first)]
    assert Pictures(downloads=downloader).watched(server.url("/b.png")) == []
    assert first.read_bytes() == png()
    assert server.asked == ["/a.png"]


def test_pictures_are_opened_measured_and_checked_by_their_urls(server, downloader):
    server.answers["/a.png?size=8"] = gives(png())
    server.answers["/no.png"] = gives(b"<html>", 404)
    pictures = Pictures(downloads=downloader)

    assert pictures.size(server.url("/a.png?size=8")) == (8, 6)
    assert pictures.open(server.url("/a.png?size=8")).getpixel((0, 0)) == (10, 20, 30)
    assert pictures.faults(server.url("/a.png?size=8")) == []
    (fault,) = pictures.faults(server.url("/no.png"))
    assert fault_of(fault, "unreachable_url").endswith("the server answers 404 Not Found")
    assert server.asked == ["/a.png?size=8", "/no.png"]


def test_nothing_is_asked_for_unless_urls_are_allowed(server):
    server.answers["/a.png"] = gives(png())
    url = server.url("/a.png")

    for config in (DataConfig(files=()), DataConfig(files=(), url_private=True)):
        fault = pictures_of(config).locate(url)
        assert "is a URL, and pictures are not downloaded" in fault_of(fault, "url")
        assert "data.allow_urls: true" in fault.fix
    assert server.asked == []


def test_a_recipes_keys_reach_the_downloads(tmp_path, monkeypatch):
    config = DataConfig(
        files=(),
        allow_urls=True,
        url_timeout=3.0,
        url_max_bytes=1000,
        url_retries=0,
        url_private=True,
        cache_dir=tmp_path,
    )

    assert pictures_of(config).downloads == Downloads(tmp_path / "pictures", 3.0, 1000, 0, True)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    found = pictures_of(DataConfig(files=(), allow_urls=True)).downloads
    assert found.folder == Path("/caches/vltrain/pictures")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ann")
    found = pictures_of(DataConfig(files=(), allow_urls=True)).downloads
    assert found.folder == Path("/home/ann/.cache/vltrain/pictures")


def test_what_is_no_picture_is_not_kept(server, downloader):
    server.answers["/a.png"] = in_turn(gives(b"<html>sorry</html>"), gives(png()))

    message = fault_of(downloader.fetch(server.url("/a.png")), "broken_picture")

    assert message.startswith(f"picture {server.url('/a.png')} cannot be read")
    assert files_in(downloader.folder) == []
    assert downloader.fetch(server.url("/a.png")).read_bytes() == png()


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_in_trouble_is_asked_again(server, downloader, status):
    server.answers["/a.png"] = in_turn(gives(b"", status), gives(b"", status), gives(png()))

    assert downloader.fetch(server.url("/a.png")).read_bytes() == png()
    assert len(server.asked) == 3


def test_a_server_that_stays_in_trouble_is_given_up(server, downloader):
    server.answers["/a.png"] = gives(b"", 503)

    message = fault_of(downloader.fetch(server.url("/a.png")), "unreachable_url")

    assert message.endswith("the server answers 503 Service Unavailable")
    assert len(server.asked) == 3  # once, and two retries


@pytest.mark.parametrize("status", [204, 400, 403, 404, 410])
def test_an_answer_that_is_final_is_not_asked_for_again(server, downloader, status):
    server.answers["/a.png"] = gives(b"", status)

    message = fault_of(downloader.fetch(server.url("/a.png")), "unreachable_url")

    assert f"the server answers {status} " in message
    assert len(server.asked) == 1


def test_a_silent_server_is_given_up_in_time(server, downloader):
    server.answers["/a.png"] = lambda handler: server.ended.wait(10)
    impatient = Downloads(
        downloader.folder, timeout=0.2, retries=1, allow_private=True, first_pause=0.01
    )

    started = time.monotonic()
    message = fault_of(impatient.fetch(server.url("/a.png")), "unreachable_url")

    assert message.endswith("was not there after 0.2 seconds")
    assert time.monotonic() - started < 2
    assert len(server.asked) == 2


@pytest.mark.parametrize("begins", [b"", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["head", "body"])
def test_a_server_that_drips_is_given_up_in_time(server, downloader, begins):
    def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.wfile.write(begins)
        while not server.ended.wait(0.05):
            try:
                handler.wfile.write(b"H")
            except OSError:
                return

    server.answers["/a.png"] = drip
    impatient = Downloads(downloader.folder, timeout=0.3, retries=0, allow_private=True)

    started = time.monotonic()
    message = fault_of(impatient.fetch(server.url("/a.png")), "unreachable_url")

    assert message.endswith("was not there after 0.3 seconds")
    assert time.monotonic() - started < 2
    assert files_in(downloader.folder) == []


def test_an_endless_body_is_cut_at_the_limit(server, downloader):
    def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while not server.ended.is_set():
                handler.wfile.write(bytes(10_000))
        except OSError:
            return

    server.answers["/a.png"] = endless
    small = Downloads(downloader.folder, timeout=5, most_bytes=100_000, allow_private=True)

    message = fault_of(small.fetch(server.url("/a.png")), "huge_download")

    assert message.endswith("has more than 100,000 bytes")
    assert len(server.asked) == 1


def test_the_limit_holds_whatever_the_header_says(server, downloader):
    content = png()
    limit = len(content)
    server.answers["/whole.png"] = gives(content)
    server.answers["/lies.png"] = gives(content + b"x", length=-1)

    small = Downloads(downloader.folder, most_bytes=limit, allow_private=True)

    assert isinstance(small.fetch(server.url("/whole.png")), Path)
    fault_of(small.fetch(server.url("/lies.png")), "huge_download")


def test_a_body_that_breaks_off_is_not_kept(server, downloader):
    server.answers["/a.png"] = gives(png()[:-10], length=len(png()))

    message = fault_of(downloader.fetch(server.url("/a.png")), "unreachable_url")

    assert "IncompleteRead" in message
    assert files_in(downloader.folder) == []


def test_redirects_are_followed_to_the_picture(server, downloader):
    server.answers["/old.png"] = leads_to("new/a.png")
    server.answers["/new/a.png"] = leads_to(server.url("/a.png"))
    server.answers["/a.png"] = gives(png())

    assert downloader.fetch(server.url("/old.png")).read_bytes() == png()
    assert server.asked == ["/old.png", "/new/a.png", "/a.png"]


def test_redirects_in_a_circle_come_to_an_end(server, downloader):
    server.answers["/a.png"] = leads_to("/a.png")

    message = fault_of(downloader.fetch(server.url("/a.png")), "unreachable_url")

    assert message.endswith(f"leads on more than {MOST_HOPS} times")
    assert len(server.asked) == MOST_HOPS + 1


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://x.org/a.png", "//[/"])
def test_a_redirect_to_another_scheme_is_refused(server, downloader, place):
    server.answers["/a.png"] = leads_to(place)

    message = fault_of(downloader.fetch(server.url("/a.png")), "unreachable_url")

    assert f"leads to {place}" in message or f"leads to '{place}'" in message


def test_a_redirect_to_a_private_address_is_refused(server, downloader, monkeypatch):
    monkeypatch.setattr(downloads, "is_public", lambda address: address == "127.0.0.1")
    strict = Downloads(downloader.folder, timeout=5)
    with PictureServer("127.0.0.2") as hidden:
        server.answers["/a.png"] = leads_to(hidden.url("/secret.png"))
        hidden.timeout = 0.1

        message = fault_of(strict.fetch(server.url("/a.png")), "private_url")
        hidden.handle_request()  # returns at once if somebody has knocked

        assert hidden.asked == []
    assert message.endswith("is on 127.0.0.2, whose address 127.0.0.2 is not public")
    assert server.asked == ["/a.png"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]"])
def test_this_machine_is_not_asked_by_default(server, tmp_path, host):
    found = Downloads(tmp_path).fetch(f"http://{host}:{server.server_port}/a.png")

    assert "is not public" in fault_of(found, "private_url")
    assert server.asked == []


def test_a_name_is_looked_up_once_and_the_address_that_was_judged_is_asked(
    server, downloader, monkeypatch
):
    server.answers["/a.png"] = gives(png())
    lookups: list[str] = []
    real = socket.getaddrinfo

    def changing(host: str, port: int, *rest: object, **named: object) -> list:
        if host != "rebound.test":
            return real(host, port, *rest, **named)
        lookups.append(host)
        address = "127.0.0.1" if len(lookups) == 1 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    monkeypatch.setattr(downloads, "is_public", lambda address: address == "127.0.0.1")

    found = Downloads(downloader.folder).fetch(f"http://rebound.test:{server.server_port}/a.png")

    assert found.read_bytes() == png()
    assert lookups == ["rebound.test"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("64:ff9b::8.8.8.8", True),
        ("::ffff:8.8.8.8", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("240.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fe80::1%1", False),
        ("fd00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("::127.0.0.1", False),
        ("64:ff9b::10.0.0.1", False),
        ("64:ff9b:1::10.0.0.1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_only_addresses_of_the_open_network_are_public(address, public):
    assert is_public(address) is public


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("http://", "names no server"),
        ("http:///a.png", "names no server"),
        ("http://x.org:port/a.png", "is no URL"),
        ("http://x.org:99999/a.png", "is no URL"),
        ("http://[::1/a.png", "is no URL"),
        ("http://a..b/a.png", "is no URL"),
        ("http://x.org/\ud800.png", "is no URL"),
        ("http://ann:secret@x.org/a.png", "names a user"),
        ("http://" + "a" * 70 + ".org/a.png", "is no URL"),
    ],
)
def test_a_url_that_asks_nobody_for_anything_is_a_fault(downloader, url, what):
    assert what in fault_of(downloader.fetch(url), "unreachable_url")


def test_a_url_is_taken_apart_and_quoted():
    target = target_of("HTTPS://Bücher.example:8443/a b/猫%20.png?q=ü&x=1/2?#part")

    assert (target.name, target.port) == ("xn--bcher-kva.example", 8443)
    assert target.host == "xn--bcher-kva.example:8443"
    assert target.path == "/a%20b/%E7%8C%AB%20.png?q=%C3%BC&x=1/2?"
    assert target.encrypted
    plain = target_of("http://[2001:db8::1]")
    assert (plain.name, plain.port, plain.host) == ("2001:db8::1", 80, "[2001:db8::1]")
    assert (plain.path, plain.encrypted) == ("/", False)


def test_a_server_that_is_not_there_is_a_fault(downloader):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        found = downloader.fetch(f"http://127.0.0.1:{bound.getsockname()[1]}/a.png")

    assert "cannot be fetched from 127.0.0.1" in fault_of(found, "unreachable_url")


def test_a_server_that_talks_something_else_is_a_fault(server, downloader):
    server.answers["/a.png"] = lambda handler: handler.wfile.write(b"220 mail.example ready\r\n")

    fault_of(downloader.fetch(server.url("/a.png")), "unreachable_url")


def test_a_cache_that_cannot_be_written_is_a_fault(server, tmp_path):
    server.answers["/a.png"] = gives(png())
    (tmp_path / "cache").write_text("a file, no folder")

    found = Downloads(tmp_path / "cache", allow_private=True).fetch(server.url("/a.png"))

    assert "cannot be written" in fault_of(found, "unwritable_cache")


def test_many_may_fetch_the_same_picture_at_once(server, downloader):
    server.answers["/a.png"] = gives(png())
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.append(downloader.fetch(server.url("/a.png"))))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(set(found)) == 1
    assert files_in(downloader.folder) == [png()]  # no draft is left beside it


def test_a_check_downloads_several_pictures_at_a_time_and_asks_for_each_once(
    server, downloader, tmp_path
):
    met = threading.Barrier(4)  # breaks unless four are asked for at the same time

    def together(handler: http.server.BaseHTTPRequestHandler) -> None:
        met.wait(5)
        gives(png())(handler)

    paths = [f"/{number}.png" for number in range(4)]
    server.answers = dict.fromkeys(paths, together) | {"/gone.png": gives(b"", 404)}
    shown = [*paths, "/gone.png", "/gone.png", "/0.png"]
    records = [record(f"<img>{server.url(path)}</img>q", f"a{n}") for n, path in enumerate(shown)]
    file = tmp_path / "train.json"
    file.write_text(json.dumps(records))

    report = check_files([file], pictures=Pictures(downloads=downloader))

    assert [(found.record, found.kind) for found in report.findings] == [
        (4, "unreachable_url"),
        (5, "unreachable_url"),
    ]
    assert sorted(server.asked) == sorted([*paths, "/gone.png"])


def test_downloads_survive_the_way_to_a_worker(downloader):
    assert pickle.loads(pickle.dumps(downloader)) == downloader


@pytest.fixture
def certificate(tmp_path) -> Path:
    """Key and certificate of pictures.test in one file, signed by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("makes a certificate with openssl")
    file = tmp_path / "server.pem"
    made = subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=pictures.test"),
            *("-addext", "subjectAltName=DNS:pictures.test", "-keyout", "-", "-out", "-"),
        ],
        capture_output=True,
        check=True,
    )
    file.write_bytes(made.stdout)
    return file


@pytest.mark.parametrize(("name", "trusted"), [("pictures.test", True), ("other.test", False)])
def test_over_tls_the_certificate_must_be_of_the_urls_name(
    server, downloader, certificate, monkeypatch, name, trusted
):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.answers["/a.png"] = gives(png())
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    downloads._tls.cache_clear()
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **named: real("127.0.0.1", *rest, **named)
    )

    found = downloader.fetch(f"https://{name}:{server.server_port}/a.png")
    downloads._tls.cache_clear()

    if trusted:
        assert found.read_bytes() == png()
    else:
        assert "certificate verify failed" in fault_of(found, "unreachable_url")
        assert server.asked == []
