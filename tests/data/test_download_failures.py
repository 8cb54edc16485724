"""Servers that are in trouble, slow, endless or not there; no test needs a network."""

import http.server
import socket
import time
from pathlib import Path

import pytest
from picture_server import fault_of, files_in, gives, in_turn, png

from vltrain.data.downloads import Downloads


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


def test_a_server_that_is_not_there_is_a_fault(downloader):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        found = downloader.fetch(f"http://127.0.0.1:{bound.getsockname()[1]}/a.png")

    assert "cannot be fetched from 127.0.0.1" in fault_of(found, "unreachable_url")


def test_a_server_that_talks_something_else_is_a_fault(server, downloader):
    server.answers["/a.png"] = lambda handler: handler.wfile.write(b"220 mail.example ready\r\n")

    fault_of(downloader.fetch(server.url("/a.png")), "unreachable_url")
