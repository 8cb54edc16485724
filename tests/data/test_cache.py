"""Entries of a cache: whole or not at all, made by one process, gone when nobody wants them."""

import os
import subprocess
import sys
import time

import pytest

from vltrain.data.cache import UNUSED_SECONDS, CacheEntry
from vltrain.errors import VltrainError


def test_a_draft_takes_the_place_of_the_entry_when_it_is_kept(tmp_path):
    entry = CacheEntry(tmp_path, "a")
    for text in ("old", "new"):
        with entry.draft() as folder:
            (folder / "file").write_text(text)
            entry.keep()

    assert (entry.folder / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_draft_that_is_not_kept_leaves_the_entry_as_it_was(tmp_path):
    entry = CacheEntry(tmp_path, "a")
    with entry.draft():
        entry.keep()

    with entry.draft() as folder:
        (folder / "file").write_text("half")

    assert list(entry.folder.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_entries_that_were_not_used_for_a_month_are_removed(tmp_path):
    long_ago = time.time() - UNUSED_SECONDS - 60
    old, used = CacheEntry(tmp_path, "old"), CacheEntry(tmp_path, "used")
    for entry in (old, used):
        with entry.draft():
            entry.keep()
        os.utime(entry.folder, (long_ago, long_ago))

    used.touch()

    assert used.folder.is_dir()
    assert not old.folder.exists()


HOLD = """
import sys, time
from pathlib import Path
from vltrain.data.cache import CacheEntry

with CacheEntry(Path(sys.argv[1]), "a").locked(lambda: None):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    waited: list[bool] = []

    def killed() -> None:
        waited.append(True)
        holder.kill()

    with CacheEntry(tmp_path, "a").locked(killed):
        assert waited == [True]
    holder.wait()


def test_a_cache_that_cannot_be_written_names_the_key_to_set(tmp_path):
    (tmp_path / "file").write_text("")

    with (
        pytest.raises(VltrainError, match=r"cannot be written .*\n.*data\.cache_dir"),
        CacheEntry(tmp_path / "file", "a").locked(lambda: None),
    ):
        pass
