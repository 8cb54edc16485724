"""One run in one directory."""

import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from vltrain.errors import VltrainError
from vltrain.training.lock import locked

FORK = get_context("fork")


def hold(folder: Path, ready) -> None:
    with locked(folder):
        (folder / "recipe.yaml").touch()
        ready.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path):
    """Another process, with a run in tmp_path."""
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(30)
    yield process
    process.kill()
    process.join()


def test_a_second_run_is_refused_by_the_process_of_the_first(holder, tmp_path: Path):
    with (
        pytest.raises(
            VltrainError, match=f"another run is going on in it .process {holder.pid} on"
        ),
        locked(tmp_path, patience_seconds=0.2),
    ):
        pass

    assert (tmp_path / "run.lock").exists()


def test_the_lock_dies_with_its_process(holder, tmp_path: Path):
    os.kill(holder.pid, signal.SIGKILL)

    with locked(tmp_path):
        assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_process_that_the_holder_started_does_not_hold_it_on(tmp_path: Path):
    def hold_and_start(ready) -> None:
        with locked(tmp_path):
            (tmp_path / "recipe.yaml").touch()
            reader = FORK.Process(target=time.sleep, args=(20,))
            reader.start()
            ready.put(reader.pid)
            time.sleep(20)

    ready = FORK.Queue()
    process = FORK.Process(target=hold_and_start, args=(ready,))
    process.start()
    reader = ready.get(timeout=30)
    process.kill()
    process.join()

    with locked(tmp_path, patience_seconds=0):
        os.kill(reader, signal.SIGKILL)  # it was still there


def test_a_directory_that_nothing_was_written_to_is_taken_away_again(tmp_path: Path):
    with locked(tmp_path / "runs" / "a"):
        assert (tmp_path / "runs" / "a").is_dir()

    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_was_there_before_stays(tmp_path: Path):
    with locked(tmp_path):
        pass

    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_was_written_to_stays(tmp_path: Path):
    with locked(tmp_path / "a"):
        (tmp_path / "a" / "recipe.yaml").touch()

    assert (tmp_path / "a" / "recipe.yaml").exists()
