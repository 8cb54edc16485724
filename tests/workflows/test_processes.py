"""Processes of one run start, speak, fail and stop together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from group import group_environment, start_group
from tiny import write_conversations, write_qwen_vl

from vltrain.config import load_recipe, recipe_to_yaml
from vltrain.training.run_dir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

LAUNCH = "import sys; from vltrain.training.launch import launch; sys.exit(launch(2, sys.argv[1:]))"
LAUNCH_ONE = (
    "import sys; from vltrain.training.launch import launch; "
    "from vltrain.training.machines import Machines"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("processes") / "base")


def words(base: Path, data: Path, out: Path, *settings: str) -> list[str]:
    """The command line of a small run that takes its samples in order."""
    values = [
        "trainer.per_device_train_batch_size=1",
        "trainer.gradient_accumulation_steps=1",
        "trainer.train_sampling_strategy=sequential",
        "trainer.report_to=none",
        "trainer.learning_rate=1e-3",
        "lora.r=4",
        *settings,
    ]
    flags = ["--model", str(base), "--data", str(data), "--output", str(out)]
    return ["lora", *flags, *(word for value in values for word in ("--set", value))]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in RunDir(run).read_metrics() if "loss" in row]


@pytest.mark.parametrize("place", [3, 11])  # of the first step, and of one that is read ahead
def test_a_broken_picture_of_the_last_of_four_processes_ends_all_with_one_error(
    base, tmp_path, place
):
    data = write_conversations(tmp_path)
    records = json.loads(data.read_text())
    lone = {**records[1], "id": "lone"}
    lone["conversations"] = json.loads(
        json.dumps(records[1]["conversations"]).replace("green.png", "lone.png")
    )
    shown = [records[number % 3] for number in range(16)]
    shown[place] = lone
    data.write_text(json.dumps(shown))
    raw = bytearray((tmp_path / "images" / "green.png").read_bytes())
    middle = raw.index(b"IDAT") + 20
    raw[middle : middle + 12] = bytes(12)  # header and end stay whole, so no check finds it
    (tmp_path / "images" / "lone.png").write_bytes(raw)  # which process 3 opens
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=4", "-m", "vltrain"]

    process = subprocess.Popen(
        [*command, *words(base, data, tmp_path / "run")],
        stderr=subprocess.PIPE,
        text=True,
        env=group_environment(),
    )
    said, named = [], None
    for line in process.stderr:
        said.append(line)
        if named is None and line.startswith(f"error: train.json#{place}"):
            named = time.monotonic()
    process.wait(60)
    ended = time.monotonic()

    text = "".join(said)
    assert process.returncode == 1
    assert named is not None, text
    assert ended - named < 30
    assert text.count(f"error: train.json#{place}") == 1
    ours = text.partition("Traceback")[0]  # torchrun's report of it follows
    assert "lone.png" in ours
    assert "[rank" not in text  # where torch says that a process misses another
    assert "exitcode  : 1 " in text  # what torchrun says of the process itself


def test_what_is_wrong_for_all_is_said_once(base, tmp_path):
    done = start_group(2, "-m", "vltrain", *words(base, tmp_path / "none.json", tmp_path / "run"))

    assert done.returncode == 1
    assert (done.stdout + done.stderr).count("none.json cannot be read") == 1


def test_the_launcher_starts_the_run_that_torchrun_starts_and_a_killed_one_goes_on(base, tmp_path):
    data = write_conversations(tmp_path)
    steps = ("trainer.max_steps=12", "trainer.save_steps=3")
    whole = start_group(2, "-m", "vltrain", *words(base, data, tmp_path / "whole", *steps))
    assert whole.returncode == 0, whole.stderr[-3000:]
    command = [sys.executable, "-c", LAUNCH, *words(base, data, tmp_path / "cut", *steps)]

    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=group_environment(), cwd=tmp_path
    )
    deadline = time.monotonic() + 200
    while process.poll() is None and len(losses(tmp_path / "cut")) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(rank_of(process.pid, 1), signal.SIGKILL)
    killed = time.monotonic()
    said = process.communicate(timeout=60)[1]

    assert time.monotonic() - killed < 30
    assert process.returncode == 128 + 9
    assert said.count("error: ") == 1
    assert "was ended by SIGKILL" in said
    again = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=group_environment(), cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resuming from" in again.stdout
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def rank_of(launcher: int, rank: int) -> int:
    """The process of a run that has a rank, below its launcher."""
    found = [launcher]
    for parent in found:
        for file in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in file.read_text().split()]
    own = f"\0RANK={rank}\0".encode()
    return next(p for p in found if own in b"\0" + Path(f"/proc/{p}/environ").read_bytes())


def test_a_usage_errors_exit_code_passes_through_the_launcher(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, "lora", "--rank", "8"],
        capture_output=True,
        text=True,
        timeout=120,
        env=group_environment(),
    )

    assert done.returncode == 2


def test_torchrun_and_the_launcher_meet_as_two_machines_of_one_run(base, tmp_path):
    data = write_conversations(tmp_path)
    recipe = load_recipe(
        None,
        method="lora",
        model=str(base),
        data=[data],
        output=tmp_path / "run",
        overrides=["trainer.max_steps=2", "trainer.report_to=none", "lora.r=4"],
    )
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"nnodes": "2", "rdzv_id": "test", "rdzv_endpoint": f"127.0.0.1:{port}"}
    flags = [f"--{name}={value}" for name, value in meeting.items()]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=1", "--rdzv-backend=c10d", *flags]
    launcher = f"{LAUNCH_ONE}; sys.exit(launch(1, sys.argv[1:], Machines(**{meeting})))"

    machines = [
        subprocess.Popen(
            [sys.executable, *command, "lora", str(tmp_path / "recipe.yaml")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=group_environment(),
        )
        for command in ([*torchrun, "-m", "vltrain"], ["-c", launcher])
    ]
    said = [machine.communicate(timeout=200) for machine in machines]

    assert [machine.returncode for machine in machines] == [0, 0], said
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (environment["engine"], environment["world_size"]) == ("ddp", 2)
    assert sum("done: " in out for out, _ in said) == 1
