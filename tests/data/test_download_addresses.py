"""Whom a download asks: URLs, redirects, private addresses and certificates."""

import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import pytest
from picture_server import PictureServer, fault_of, gives, leads_to, png

from vltrain.data import downloads
from vltrain.data.downloads import MOST_HOPS, Downloads, is_public, target_of


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
