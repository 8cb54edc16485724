"""A process of a run, and the launcher that it dies with."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
