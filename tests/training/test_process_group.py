"""A process of a run, and the launcher that it dies with."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]

WORKER = """
import pathlib, sys, time
from vltrain.training.processes import tie_to_launcher
tie_to_launcher()
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""

LAUNCHER = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], start_new_session=True)
print(worker.pid, flush=True)
time.sleep(60)
"""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # a dead one is there until its parent has asked for it
    return not (stat.is_file() and ") Z " in stat.read_text())


@pytest.mark.parametrize("said", [{"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, {}])
def test_a_process_of_a_run_dies_with_its_launcher_though_its_session_is_its_own(
    tmp_path: Path, said: dict[str, str]
):
    ready = tmp_path / "ready"
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, WORKER, str(ready)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **said},
    )
    worker = int(launcher.stdout.readline())
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)

    launcher.kill()
    launcher.wait()

    end = time.monotonic() + (5 if said else 0.5)
    while is_alive(worker) and time.monotonic() < end:
        time.sleep(0.01)
    survived = is_alive(worker)
    if survived:
        os.kill(worker, signal.SIGKILL)
    assert survived == (not said)  # one that torchrun did not start lives as long as it likes


MEMBER = """
import sys, time
from vltrain.training import processes
processes.PATIENCE_SECONDS, processes.WATCH_SECONDS = 0.2, 0.05
if sys.argv[1] == "leaves":
    processes.WATCH_SECONDS = 0.0  # so that it is at the store when the process ends
processes.watch_others()
print("ready", flush=True)
if sys.argv[1] == "fails":
    sys.stdin.readline()
    processes.end_after_failure("error: here", code=int(sys.argv[2]))
if sys.argv[1] == "leaves":
    sys.stdin.readline()
    processes.leave_group()
    sys.exit()
time.sleep(60)
"""


@pytest.fixture
def run_of_two(tmp_path: Path):
    """The store of a run, and what starts its processes by their rank."""
    kept = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    members = []

    def start(rank: int, *words: str) -> subprocess.Popen[str]:
        said = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        said |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
        said |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(kept.port)}
        said |= {"VLTRAIN_EXIT_CODE_FILE": str(tmp_path / f"told{rank}")}
        member = subprocess.Popen(
            [sys.executable, "-c", MEMBER, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **said},
        )
        members.append(member)
        assert member.stdout.readline() == "ready\n"
        return member

    yield start
    for member in members:
        member.kill()


@pytest.mark.slow
def test_a_process_that_waits_ends_with_the_one_that_fails_and_by_its_code(
    run_of_two, tmp_path: Path
):
    waiting, failing = run_of_two(0, "waits"), run_of_two(1, "fails", "3")

    said = failing.communicate("go on\n", timeout=30)[1]

    assert failing.returncode == 3
    assert said.endswith("error: here\nexit code 3\n")
    assert waiting.communicate(timeout=30)[1] == ""
    assert waiting.returncode == 3
    assert [(tmp_path / f"told{rank}").read_text() for rank in (0, 1)] == ["3", "3"]


@pytest.mark.slow
def test_a_process_that_fails_after_another_has_its_code_and_is_silent(run_of_two):
    first, second = run_of_two(0, "fails", "4"), run_of_two(1, "fails", "1")

    assert first.communicate("go on\n", timeout=30)[1] == "error: here\nexit code 4\n"
    assert second.communicate("go on\n", timeout=30)[1] == ""
    assert (first.returncode, second.returncode) == (4, 4)


@pytest.mark.slow
def test_a_process_that_waits_for_a_killed_one_ends_too(run_of_two):
    waiting, killed = run_of_two(0, "waits"), run_of_two(1, "waits")

    killed.kill()
    killed.wait()

    assert waiting.communicate(timeout=30)[1] == ""  # of its own machine's the launcher tells
    assert waiting.returncode == 1


@pytest.mark.slow
def test_a_process_that_has_left_in_order_is_not_missed(run_of_two):
    waiting, leaving = run_of_two(0, "waits"), run_of_two(1, "leaves")

    leaving.communicate("go on\n", timeout=30)
    assert leaving.returncode == 0
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(timeout=3)
