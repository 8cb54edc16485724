"""A file is read again only where it may be another."""

import os
import time
from pathlib import Path

import pytest

from vltrain.data import file_hashes
from vltrain.data.file_hashes import hashed

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # NIST's example


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that was written long ago, as far as anyone can tell."""
    monkeypatch.setattr(file_hashes, "SETTLED_NS", -(10**12))
    path = tmp_path / "data.json"
    path.write_bytes(b"abc")
    return path


def test_a_file_is_read_and_then_known_by_its_stamp(file):
    known, stamp = hashed(file, None, None)

    assert known == {"bytes": 3, "sha256": ABC}
    assert hashed(file, {"bytes": 3, "sha256": "not read"}, stamp)[0]["sha256"] == "not read"


def test_a_file_is_read_again_where_nothing_is_known_of_it(file):
    assert hashed(file, {"bytes": 3, "sha256": "not read"}, None)[0]["sha256"] == ABC


def test_a_file_that_changed_in_place_and_got_its_size_and_time_back_is_read_again(file):
    known, stamp = hashed(file, None, None)
    was = os.stat(file)
    time.sleep(0.05)  # longer than the clock of a file system takes to move
    with file.open("r+b") as opened:
        opened.write(b"abd")
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))

    now, _ = hashed(file, known, stamp)

    assert (os.stat(file).st_mtime_ns, os.stat(file).st_size) == (was.st_mtime_ns, 3)
    assert now["sha256"] != ABC


def test_another_file_in_its_place_is_read(file):
    known, stamp = hashed(file, None, None)
    was = os.stat(file)
    other = file.with_name("other")
    other.write_bytes(b"abd")
    os.utime(other, ns=(was.st_atime_ns, was.st_mtime_ns))
    os.replace(other, file)

    assert hashed(file, known, stamp)[0]["sha256"] != ABC


def test_a_file_that_was_just_written_gets_no_stamp(tmp_path):
    path = tmp_path / "young.json"
    path.write_bytes(b"abc")

    assert hashed(path, None, None) == ({"bytes": 3, "sha256": ABC}, None)
