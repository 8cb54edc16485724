"""The commands for several GPUs and machines, of the README and of `recipes/slurm`, are read."""

import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.run import parse_args
from typer.testing import CliRunner

import vltrain.training.launch
import vltrain.workflows.train
from vltrain.cli import app
from vltrain.config import Recipe
from vltrain.errors import VltrainError
from vltrain.training.machines import Machines

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "recipes" / "slurm").glob("*.sbatch"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
STARTERS = ("vltrain", "torchrun")
SLURM = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "17"}


def launches(text: str) -> list[list[str]]:
    """The words of every line that starts processes, from `vltrain` or `torchrun` on."""
    lines = re.findall(
        r"^(?:srun (?:--wait=\d+ )?)?((?:vltrain (?:lora|full) .*--gpus|torchrun --).*)$",
        text,
        re.M,
    )
    return [shlex.split(line) for line in lines]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What reaches the training workflow or the launcher, on a machine with eight GPUs."""
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(vltrain.workflows.train, "train", calls.append)
    monkeypatch.setattr(vltrain.training.launch, "launch", lambda *told: calls.append(told) or 0)
    monkeypatch.chdir(ROOT)
    return calls


def test_there_is_a_job_for_one_machine_and_one_for_several():
    assert [script.name for script in SCRIPTS] == ["many_nodes.sbatch", "one_node.sbatch"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_job_is_a_script_that_bash_reads(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize(
    "words",
    [words for text in (README, *(s.read_text() for s in SCRIPTS)) for words in launches(text)],
    ids=" ".join,
)
def test_a_command_starts_a_run(words, started, monkeypatch):
    for name, value in SLURM.items():
        words = [word.replace(f"${name}", value) for word in words]
    if words[0] == "torchrun":
        flags = parse_args(words[1:])
        assert (flags.module, flags.training_script) == (True, "vltrain")
        monkeypatch.setenv("WORLD_SIZE", "16")
        monkeypatch.setenv("LOCAL_RANK", "0")
        words = ["vltrain", *flags.training_script_args]

    done = CliRunner().invoke(app, words[1:], catch_exceptions=False)

    assert done.exit_code == 0, done.output
    (call,) = started
    if not isinstance(call, Recipe):
        processes, passed, machines = call
        assert processes == 8
        meeting = words[words.index("--nnodes") :] if "--nnodes" in words else []
        several = Machines("2", rdzv_endpoint=meeting[-1]) if meeting else Machines()
        assert replace(machines, rdzv_id=None) == several
        assert passed == [word for word in words[1:] if word not in ("--gpus", "8", *meeting)]


def test_readme_has_one_machine_and_several_both_ways():
    starts = [(words[0], "--nnodes" in words) for words in launches(README)]

    assert starts == [(word, several) for several in (False, True) for word in STARTERS]


STAND_INS = {
    # Slurm sends the signal of --signal to what srun has started.
    "srun": """echo "srun $*" >> "$CALLS"
[ "${1#--}" = "$1" ] || shift
"$@" &
[ -z "$WARN" ] || { until [ -e ready ]; do sleep 0.01; done; kill -USR1 $!; }
wait $!
""",
    "scontrol": """echo "scontrol $*" >> "$CALLS"
[ "$1" != show ] || printf "first\\nsecond\\n"
""",
    "vltrain": """trap 'exit 75' USR1
touch ready
[ -z "$WARN" ] || while :; do sleep 0.01; done
exit "$CODE"
""",
}


@pytest.fixture
def slurm(tmp_path: Path):
    """Runs a job as Slurm would: its exit code, and what it called."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n')
    for name, text in STAND_INS.items():
        program = tmp_path / ".venv" / "bin" / name
        program.write_text(f"#!/bin/bash\n{text}")
        program.chmod(0o755)

    def run(script: Path, *, code: int = 0, warn: bool = False) -> tuple[int, list[str]]:
        calls = tmp_path / "calls"
        told = {"CALLS": str(calls), "CODE": str(code), "WARN": "1" if warn else ""}
        done = subprocess.run(
            ["bash", str(script)],
            cwd=tmp_path,
            env={**os.environ, **SLURM, **told, "SLURM_JOB_NODELIST": "machine[1-2]"},
            timeout=60,
        )
        return done.returncode, calls.read_text().splitlines()

    return run


REQUEUE = "scontrol requeue 17"


def started_by(calls: list[str]) -> list[str]:
    """What a job handed to srun, without the options of srun itself."""
    (line,) = [call for call in calls if call.startswith("srun ")]
    return [word for word in shlex.split(line)[1:] if not word.startswith("--wait=")]


def test_the_job_for_one_machine_starts_a_run_on_its_gpus(slurm, started):
    code, calls = slurm(ROOT / "recipes" / "slurm" / "one_node.sbatch")

    assert code == 0
    assert REQUEUE not in calls
    CliRunner().invoke(app, started_by(calls)[1:], catch_exceptions=False)
    assert started[0][0] == 8
    assert started[0][2] == Machines()


def test_the_job_for_several_machines_lets_them_meet_at_the_first(slurm, started):
    code, calls = slurm(ROOT / "recipes" / "slurm" / "many_nodes.sbatch")

    assert code == 0
    assert REQUEUE not in calls
    CliRunner().invoke(app, started_by(calls)[1:], catch_exceptions=False)
    assert started[0][0] == 8
    assert started[0][2] == Machines("2", rdzv_endpoint="first:29500", rdzv_id="17")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_job_that_slurm_warns_is_queued_again(slurm, script):
    asked = re.findall(r"^#SBATCH --(\S+)$", script.read_text(), re.M)

    code, calls = slurm(script, warn=True)

    assert code == 75
    assert calls[-1] == REQUEUE
    assert {"signal=USR1@600", "requeue", "open-mode=append"} <= set(asked)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
@pytest.mark.parametrize("code", [1, 3, 4, 137])
def test_a_job_that_fails_is_not_queued_again(slurm, script, code):
    said, calls = slurm(script, code=code)

    assert said == code
    assert REQUEUE not in calls


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--nnodes", "2", "--rdzv-endpoint", "first:1"), "how many GPUs each machine brings"),
        (("--gpus", "8", "--nnodes", "2"), "nothing says where the machines meet"),
        (("--gpus", "8", "--nnodes", "2", "--rdzv_endpoint", "first"), "no machine and port"),
        (("--gpus", "8", "--node-rank", "1"), "is for runs on several machines"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_machines_that_could_not_meet_are_refused_before_anything_else(started, words, said):
    with pytest.raises(VltrainError, match=said):
        CliRunner().invoke(app, ["lora", *words], catch_exceptions=False)
    assert started == []


def test_machines_beside_torchrun_are_refused(started, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "0")

    with pytest.raises(VltrainError, match="torchrun has started this process"):
        CliRunner().invoke(
            app, ["lora", "--nnodes", "2", "--rdzv-endpoint", "a:1"], catch_exceptions=False
        )


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_help_has_the_flags_for_several_machines_under_a_heading_of_their_own(method):
    text = CliRunner().invoke(app, [method, "--help"]).output

    before, _, below = text.partition("\nSeveral machines")
    assert "--gpus" in before
    assert re.findall(r"^  (--[\w-]+)", below, re.M) == [
        *("--nnodes", "--rdzv-endpoint", "--rdzv-id", "--rdzv-backend"),
        *("--node-rank", "--master-addr", "--master-port"),
    ]


def test_one_gpu_on_each_of_two_machines_is_a_run_of_two(started):
    words = ["lora", "recipes/qwen_vl_lora.yaml", "--data", "train.json", "--output", "runs/mine"]
    words += ["--gpus", "1", "--nnodes", "2", "--rdzv-endpoint", "first:29500"]

    CliRunner().invoke(app, words, catch_exceptions=False)

    assert started == [(1, words[:6], Machines("2", rdzv_endpoint="first:29500"))]


def test_gpus_that_are_not_there_are_refused_with_the_way_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    with pytest.raises(Exception, match="has no GPUs that torch can use") as error:
        vltrain.training.launch.refuse_wrong_count(2)
    assert "torchrun --nproc_per_node 2 -m vltrain" in str(error.value)


def test_gpus_beside_torchrun_must_agree_with_it(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)

    vltrain.training.launch.refuse_wrong_count(2)
    with pytest.raises(Exception, match="torchrun has started 2 processes"):
        vltrain.training.launch.refuse_wrong_count(4)
