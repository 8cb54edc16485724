"""`vltrain --gpus`: exit codes and signals pass through it, and machines meet."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from group import group_environment
from tiny import write_conversations, write_qwen_vl

from vltrain.training.run_dir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

# Without GPUs the command refuses --gpus; what it calls with them does not.
LAUNCH = """
import sys
from unittest import mock
from vltrain.cli import main
with mock.patch("vltrain.training.launch.refuse_wrong_count"):
    main()
"""

# In the place of the training workflow, in every process: what it is told to be.
STAND_IN = """
import os, signal, sys, time, types
from pathlib import Path

def train(recipe):
    from vltrain import errors
    from vltrain.training.stopping import StopSignals

    kind, rank = str(recipe.model), os.environ["RANK"]
    Path(recipe.output, rank).touch()
    if kind == "signals":
        signals = StopSignals()
        with signals.caught(), signals.noted():
            Path(recipe.output, "ready" + rank).touch()
            while not signals.requested():
                time.sleep(0.05)
        raise errors.Stopped(f"stopped by {signals.received.name}")
    if kind == "late":
        time.sleep(2)  # the warning comes while no one listens
        with StopSignals().caught():
            time.sleep(60)
    if rank != "1":
        time.sleep(60)
    raise getattr(errors, kind).at("here", what="went wrong", fix="mend it")

stand_in = types.ModuleType("vltrain.workflows.train")
stand_in.train = train
sys.modules["vltrain.workflows.train"] = stand_in
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A folder for the marks of processes that train nothing."""
    (tmp_path / "sitecustomize.py").write_text(STAND_IN)
    marks = tmp_path / "marks"
    marks.mkdir()
    return marks


def start(*words: str | Path, imports: Path | None = None) -> subprocess.Popen[str]:
    """`vltrain WORDS`, on a machine that seems to have the GPUs."""
    environment = group_environment()
    if imports is not None:
        paths = os.pathsep.join([str(imports), environment["PYTHONPATH"]])
        environment["PYTHONPATH"] = paths
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@contextmanager
def standing_in(kind: str, marks: Path) -> Iterator[subprocess.Popen[str]]:
    words = ("lora", "--model", kind, "--data", "none.json", "--output", marks, "--gpus", "2")
    process = start(*words, imports=marks.parent)
    try:
        yield process
    finally:
        process.kill()


def wait_for(*files: Path, seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, files
        time.sleep(0.02)


@pytest.mark.parametrize(("kind", "code"), [("GpuMemoryError", 3), ("NotFiniteError", 4)])
def test_the_failure_of_one_process_is_the_exit_code_and_is_said_once(
    stand_in: Path, kind: str, code: int
):
    with standing_in(kind, stand_in) as launcher:
        said = launcher.communicate(timeout=100)[1]

    assert launcher.returncode == code, said
    assert said.count("error: here: went wrong\n  fix: mend it") == 1
    assert said.rstrip().endswith(f"exit code {code}")


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT"])
def test_a_signal_to_the_launcher_stops_every_process_with_75(stand_in: Path, name: str):
    with standing_in("signals", stand_in) as launcher:
        wait_for(stand_in / "ready0", stand_in / "ready1")
        launcher.send_signal(signal.Signals[name])
        said = launcher.communicate(timeout=60)[1]

    assert launcher.returncode == 75, said
    assert said.count(f"{name}: stopping after this step") == 2  # each process has heard it
    assert said.count(f"stopped by {name}") == 1


def test_a_warning_waits_for_processes_that_are_not_ready_for_it(stand_in: Path):
    with standing_in("late", stand_in) as launcher:
        wait_for(stand_in / "0", stand_in / "1")
        launcher.send_signal(signal.SIGUSR1)
        said = launcher.communicate(timeout=60)[1]

    assert launcher.returncode == 75, said
    assert said.count("stopped by SIGUSR1 while no step was being taken") == 1


def test_processes_die_with_a_launcher_that_is_killed(stand_in: Path):
    with standing_in("signals", stand_in) as launcher:
        wait_for(stand_in / "ready0", stand_in / "ready1")
        processes = psutil.Process(launcher.pid).children()
        assert len(processes) == 2

        launcher.kill()

        _, alive = psutil.wait_procs(processes, timeout=10)
        for process in alive:
            process.kill()
        assert alive == []


def test_a_launcher_that_waits_for_other_machines_leaves_when_it_is_asked_to(stand_in: Path):
    words = ("lora", "--model", "signals", "--data", "none.json", "--output", stand_in)
    waiting = start(*words, "--gpus", "2", *meeting(), imports=stand_in.parent)
    try:
        deadline = time.monotonic() + 60
        while not psutil.Process(waiting.pid).net_connections():  # it has opened the endpoint
            assert time.monotonic() < deadline
            time.sleep(0.05)
        waiting.send_signal(signal.SIGUSR1)
        said = waiting.communicate(timeout=30)[1]
    finally:
        waiting.kill()

    assert waiting.returncode == 75, said
    assert "stopped before the processes of the run had met" in said
    assert list(stand_in.iterdir()) == []


def meeting() -> tuple[str, ...]:
    """The flags of two machines that meet on this one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return ("--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}")


def test_two_machines_make_one_run_and_a_warning_to_one_of_them_stops_it(tmp_path: Path):
    base = write_qwen_vl(tmp_path / "base")
    data = write_conversations(tmp_path)
    out = tmp_path / "run"
    settings = ("trainer.max_steps=1000", "trainer.report_to=none", "lora.r=4")
    words = ["lora", "--model", base, "--data", data, "--output", out, "--gpus", "1", *meeting()]
    words += [word for setting in settings for word in ("--set", setting)]

    machines = [start(*words) for _ in range(2)]
    try:
        deadline = time.monotonic() + 200
        while len(RunDir(out).read_metrics()) < 3:
            assert time.monotonic() < deadline
            assert all(machine.poll() is None for machine in machines)
            time.sleep(0.05)
        machines[1].send_signal(signal.SIGUSR1)
        said = [machine.communicate(timeout=60) for machine in machines]
    finally:
        for machine in machines:
            machine.kill()

    assert [machine.returncode for machine in machines] == [75, 75], said
    errors = "".join(error for _, error in said)
    assert "2 processes under ddp" in "".join(output for output, _ in said)
    assert errors.count("to go on: give the same command again") == 1
    assert [path.name for path in out.glob("*.partial")] == []
    assert len(list(out.glob("checkpoint-*"))) == 1
