"""Pictures by URL: when they are asked for, and what is kept; no test needs a network."""

import http.server
import json
import pickle
import threading
from pathlib import Path

from letters import record
from picture_server import fault_of, files_in, gives, in_turn, png

from vltrain.config import DataConfig
from vltrain.data.checks import check_files
from vltrain.data.downloads import Downloads
from vltrain.data.pictures import Pictures, pictures_of


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
