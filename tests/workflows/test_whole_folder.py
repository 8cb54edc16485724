"""Folders that are made whole: what keeps one from being made, and what a cut-off one leaves."""

import os
import signal
import subprocess
import sys

import pytest

from vltrain.errors import VltrainError
from vltrain.workflows.whole_folder import refuse_existing, whole_folder


def test_what_has_the_name_already_is_refused(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")

    with pytest.raises(VltrainError, match="out: exists already"):
        refuse_existing(tmp_path / "out")


def test_a_place_below_a_file_is_refused_by_the_files_name(tmp_path):
    (tmp_path / "notes").write_text("")

    with pytest.raises(VltrainError, match=r"cannot be made: .*/notes is a file"):
        refuse_existing(tmp_path / "notes" / "merged")


def test_a_place_below_folders_that_are_not_there_yet_is_taken(tmp_path):
    refuse_existing(tmp_path / "new" / "merged")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_may_not_be_written_to_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)

    with pytest.raises(VltrainError, match="closed may not be written to"):
        refuse_existing(tmp_path / "closed" / "merged")


def test_a_folder_is_whole_or_not_there(tmp_path):
    out = tmp_path / "out"

    def write_half() -> None:
        with whole_folder(out) as draft:
            (draft / "half").write_text("")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert list(tmp_path.iterdir()) == []

    with whole_folder(out) as draft:
        (draft / "all").write_text("")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_removed_and_a_running_one_is_left_alone(tmp_path):
    code = "import time; print('up', flush=True); time.sleep(60)"
    killed, running = (
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)
    )
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    for process in (killed, running):
        (tmp_path / f"out.partial-{process.pid}").mkdir()

    with whole_folder(tmp_path / "out"):
        names = {p.name for p in tmp_path.iterdir()}

    running.kill()
    running.wait()
    assert names == {f"out.partial-{running.pid}", f"out.partial-{os.getpid()}"}
