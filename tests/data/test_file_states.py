"""Sizes and times of files, and what has changed since they were written down."""

import os
from pathlib import Path

import pytest

from vltrain.data import file_states
from vltrain.data.file_states import FileState, StateWriter, first_change, read_states, state_of


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file in files:
        file.write_bytes(b"a picture")
    return files


def test_a_file_that_is_not_there_has_no_state(tmp_path):
    assert state_of(tmp_path / "gone.png") is None


def test_a_state_is_path_size_and_time(pictures):
    os.utime(pictures[0], ns=(5, 1_234_567_891))

    assert state_of(pictures[0]) == FileState(str(pictures[0]), 9, 1_234_567_891)


def test_states_are_read_as_they_were_written_each_once(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(file_states, "BATCH_STATES", 2)
    states = [state_of(file) for file in pictures]

    with StateWriter(tmp_path / "states.arrow") as writer:
        writer.write(states[:2])
        writer.write([states[1], states[2]])

    assert list(read_states(tmp_path / "states.arrow")) == states


def test_no_states_are_read_as_none(tmp_path):
    with StateWriter(tmp_path / "states.arrow"):
        pass

    assert list(read_states(tmp_path / "states.arrow")) == []


def test_another_size_another_time_and_a_missing_file_are_changes(pictures):
    states = [state_of(file) for file in pictures]
    assert first_change(states) is None

    pictures[1].write_bytes(b"another picture")
    assert first_change(states) == str(pictures[1])

    pictures[0].unlink()
    assert first_change(states) == str(pictures[0])

    os.utime(pictures[2], ns=(1, 1))
    assert first_change(states[2:]) == str(pictures[2])
