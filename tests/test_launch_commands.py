"""The commands for several GPUs and machines, of the README and of `recipes/slurm`, are read."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from torch.distributed.run import parse_args
from typer.testing import CliRunner

import vltrain.training.launch
import vltrain.workflows.train
from vltrain.cli import app
from vltrain.config import Recipe

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "recipes" / "slurm").glob("*.sbatch"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def launches(text: str) -> list[list[str]]:
    """The words of every line that starts processes, from `vltrain` or `torchrun` on."""
    lines = re.findall(
        r"^(?:srun )?((?:vltrain (?:lora|full) .*--gpus|torchrun --).*)$", text, re.M
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
    if words[0] == "torchrun":
        flags = parse_args([word.replace("$SLURM_NNODES", "2") for word in words[1:]])
        assert (flags.module, flags.training_script) == (True, "vltrain")
        monkeypatch.setenv("WORLD_SIZE", "16")
        monkeypatch.setenv("LOCAL_RANK", "0")
        words = ["vltrain", *flags.training_script_args]

    done = CliRunner().invoke(app, words[1:], catch_exceptions=False)

    assert done.exit_code == 0, done.output
    (call,) = started
    if not isinstance(call, Recipe):
        processes, passed, _ = call
        assert processes == 8
        assert passed == [word for word in words[1:] if word not in ("--gpus", "8")]


def test_readme_has_one_machine_both_ways_and_several_machines():
    assert [words[0] for words in launches(README)] == ["vltrain", "torchrun", "torchrun"]


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
