"""Runs that are killed, stopped or out of space, and go on as if nothing had been."""

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from killing import Killer
from safetensors.torch import load_file
from tiny import write_conversations, write_gptq, write_qwen_vl

from vltrain.config import load_recipe, recipe_to_yaml
from vltrain.training.checkpoints import checkpoint_fault, checkpoint_step, checkpoints
from vltrain.training.run_dir import RunDir

pytestmark = pytest.mark.slow
MATRIX = pytest.mark.matrix  # several processes

PACKED = ("data.packing=true", "data.max_length=270", "trainer.gradient_accumulation_steps=1")
SAMPLES = (
    "data.packing=true",
    "data.max_length=270",
    "batch.samples=3",
    "trainer.gradient_accumulation_steps=1",
    "trainer.save_steps=3",
)
# Checkpoints in the middle of an epoch of two steps, also on two processes.
MIDWAY = ("trainer.gradient_accumulation_steps=1", "trainer.save_steps=3")
FEATURES = ("data.cache_features=true",)
WORKERS = ("trainer.dataloader_num_workers=2",)
WORST = (
    "trainer.eval_strategy=steps",
    "trainer.eval_steps=2",
    "trainer.load_best_model_at_end=true",
    "trainer.metric_for_best_model=eval_loss",
    "trainer.greater_is_better=true",
)
# A line for every third step, a checkpoint after every second, an evaluation an epoch.
SPARSE = ("trainer.logging_steps=3", "data.eval_share=0.25")


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    killer = Killer()
    yield killer
    killer.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with a plain base and one that GPTQ has packed, and data."""
    folder = tmp_path_factory.mktemp("resume")
    write_qwen_vl(folder / "plain")
    write_gptq(folder / "packed")
    return folder, write_conversations(folder)


def write_recipe(made: tuple[Path, Path], out: Path, *settings: str, method: str = "lora") -> Path:
    """The file of a recipe; method "qlora-packed" is Q-LoRA on the packed base."""
    folder, data = made
    method, _, base = method.partition("-")
    quick = ["trainer.gradient_accumulation_steps=2", "trainer.learning_rate=1e-2"]
    quick += ["trainer.report_to=none", "trainer.save_steps=2", "trainer.save_total_limit=2"]
    if method != "full":
        quick.append("lora.r=4")
    recipe = load_recipe(
        None,
        method=method,
        model=str(folder / (base or "plain")),
        data=[data],
        output=out,
        overrides=[*quick, *settings],
    )
    file = out.with_suffix(".yaml")
    file.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    return file


def whole_run(
    killer: Killer,
    made: tuple[Path, Path],
    out: Path,
    *settings: str,
    method: str,
    processes: int = 1,
) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The rows and final weights of a run that nobody disturbs."""
    recipe = write_recipe(made, out, *settings, method=method)
    code, said = killer.run(recipe, out, processes=processes)
    assert code == 0, said
    return rows_of(out), weights_of(out / "final")


def rows_of(out: Path) -> list[dict]:
    """What was logged, without the times that nobody can repeat."""
    rows = RunDir(out).read_metrics()
    timed = ("per_second", "runtime")
    return [{k: v for k, v in row.items() if not k.endswith(timed)} for row in rows]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize(
    ("method", "settings", "kills", "processes"),
    [
        pytest.param("lora", (), 20, 1, id="lora-padded"),
        pytest.param("lora", (*PACKED, *MIDWAY, *WORKERS), 2, 1, id="lora-packed-workers"),
        pytest.param("lora", (*SAMPLES, *WORKERS), 2, 1, id="lora-packed-steps-workers"),
        pytest.param("lora", SAMPLES, 2, 2, id="lora-packed-steps-ddp", marks=MATRIX),
        pytest.param("lora", (*SPARSE, *WORKERS), 2, 1, id="lora-sparse-logs-eval-workers"),
        pytest.param("lora", ("data.streaming=true", *MIDWAY), 2, 1, id="lora-streamed"),
        pytest.param("lora", (*FEATURES, *WORKERS), 2, 1, id="lora-features-workers"),
        pytest.param("full", (*PACKED, *FEATURES), 2, 1, id="full-packed-features"),
        pytest.param("full", WORKERS, 2, 1, id="full-padded-workers"),
        pytest.param("full", PACKED, 2, 1, id="full-packed"),
        pytest.param("qlora", PACKED, 2, 1, id="qlora-nf4-packed-rows"),
        pytest.param("qlora-packed", (), 2, 1, id="qlora-gptq-padded"),
        pytest.param("lora", MIDWAY, 2, 2, id="lora-padded-ddp", marks=MATRIX),
        pytest.param("full", PACKED, 2, 2, id="full-packed-ddp", marks=MATRIX),
        pytest.param(
            "full",
            ("deepspeed=zero3", *MIDWAY),
            2,
            2,
            id="full-padded-zero3",
            marks=MATRIX,
        ),
        pytest.param("lora", ("deepspeed=zero3",), 2, 2, id="lora-padded-zero3", marks=MATRIX),
    ],
)
def test_a_run_that_was_killed_goes_on_to_the_bit(
    killer: Killer,
    made,
    tmp_path: Path,
    method: str,
    settings: tuple[str, ...],
    kills: int,
    processes: int,
):
    steps = 4 * kills + 9
    settings = (*settings, f"trainer.max_steps={steps}")
    rows, weights = whole_run(
        killer, made, tmp_path / "whole", *settings, method=method, processes=processes
    )
    out = tmp_path / "killed"
    recipe = write_recipe(made, out, *settings, method=method)
    every = 3 if MIDWAY[1] in settings else 2
    chance = random.Random(int.from_bytes(os.urandom(4)))

    for kill in range(kills):
        there = checkpoints(out)
        step = (checkpoint_step(there[-1]) if there else 0) + every + chance.choice((1, 2))
        saving = kill % 2 == 1
        code, said = killer.run(
            recipe,
            out,
            step=step,
            while_saving=saving,
            delay_seconds=chance.uniform(0, 0.03),
            processes=processes,
        )
        assert code == -signal.SIGKILL, (code, said)
        assert all(checkpoint_fault(checkpoint) is None for checkpoint in checkpoints(out))
        assert not (out / "final").exists()

    code, said = killer.run(recipe, out, processes=processes)
    assert code == 0, said
    assert "resuming from" in said
    assert rows_of(out) == rows
    assert_same_weights(weights_of(out / "final"), weights)
    assert [p.name for p in out.glob("*.partial")] == []
    assert len(checkpoints(out)) == 2


# --- signals ---


STOPPED = (*SPARSE, *WORKERS, "trainer.save_steps=100", "trainer.max_steps=9")


@pytest.fixture(scope="module")
def undisturbed(killer: Killer, made, tmp_path_factory: pytest.TempPathFactory):
    """The rows and final weights of a run that nobody asked to stop."""
    out = tmp_path_factory.mktemp("undisturbed") / "whole"
    return whole_run(killer, made, out, *STOPPED, method="lora")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_run_that_was_asked_to_stop_saves_the_step_and_goes_on_to_the_bit(
    killer: Killer, made, undisturbed, tmp_path: Path, name: str
):
    # Ctrl-C reaches the processes that read data as well: all of its group get the signal.
    rows, weights = undisturbed
    out = tmp_path / "stopped"
    recipe = write_recipe(made, out, *STOPPED)

    code, said = killer.run(recipe, out, send=signal.Signals[name], step=3)

    assert code == 75, said
    (saved,) = checkpoints(out)
    assert f"stopped after step {checkpoint_step(saved)} of 9, saved in {saved}\n" in said
    assert "to go on: give the same command again" in said
    code, said = killer.run(recipe, out)
    assert code == 0, said
    assert f"resuming from {saved}" in said
    assert rows_of(out) == rows
    assert_same_weights(weights_of(out / "final"), weights)


@pytest.mark.parametrize(
    ("method", "engine", "began_on", "goes_on_on"),
    [
        ("lora", (), 2, 1),
        ("lora", (), 1, 2),
        ("lora", ("deepspeed=zero2",), 1, 2),
        ("full", ("deepspeed=zero1",), 2, 1),
        ("full", ("deepspeed=zero3",), 2, 1),
        ("full", ("deepspeed=zero3",), 1, 2),
    ],
)
@pytest.mark.matrix
def test_a_run_goes_on_on_another_number_of_processes(
    killer: Killer,
    made,
    tmp_path: Path,
    method: str,
    engine: tuple[str, ...],
    began_on: int,
    goes_on_on: int,
):
    settings = ["trainer.max_steps=7", "trainer.learning_rate=1e-3"]
    if method == "lora":
        settings.append("lora.dropout=0")  # each process draws its own
    else:  # the best is the first, which the processes of before have written
        held_out = made[1].with_name("held_out.json")
        shutil.copy(made[1], held_out)
        settings += [f"data.eval_files=[{held_out}]", *WORST]
    by_four, accumulated = (
        f"trainer.gradient_accumulation_steps={count}" for count in (4, 4 // began_on)
    )
    rows, weights = whole_run(killer, made, tmp_path / "whole", *settings, by_four, method=method)
    out = tmp_path / "moved"
    recipe = write_recipe(made, out, *settings, *engine, accumulated, method=method)
    code, said = killer.run(
        recipe, out, send=signal.SIGTERM, step=2, processes=began_on, grouped=bool(engine)
    )
    assert code == 75, said

    code, said = killer.run(recipe, out, processes=goes_on_on, grouped=bool(engine))

    assert code == 0, said
    assert "resuming from" in said
    moved, rows = ([row for row in logged if "loss" in row] for logged in (rows_of(out), rows))
    for key, tolerance in (("step", 0), ("epoch", 0), ("learned_tokens", 0), ("loss", 1e-4)):
        one, other = ([row[key] for row in logged] for logged in (moved, rows))
        assert one == pytest.approx(other, rel=tolerance), key
    for name, tensor in weights_of(out / "final").items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-4, rtol=0)
    assert [p.name for p in out.glob("*.partial")] == []


# --- a disk that is full ---


def assert_goes_on_from(saved: Path, killer: Killer, recipe: Path) -> None:
    code, said = killer.run(recipe, saved.parent)
    assert code == 0, said
    assert f"resuming from {saved}" in said


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_one_before(
    killer: Killer, made, tmp_path: Path
):
    settings = ("trainer.max_steps=6", "trainer.save_total_limit=1")
    out = tmp_path / "run"
    recipe = write_recipe(made, out, *settings)
    code, said = killer.run(recipe, out, send=signal.SIGTERM, step=2)
    assert code == 75, said
    (saved,) = checkpoints(out)
    limit = (saved / "optimizer.pt").stat().st_size - 1

    code, said = killer.run(recipe, out, file_limit=limit)

    assert code == 1, said
    assert "the checkpoint cannot be written, the disk is full" in said
    assert "the checkpoints of before are whole" in said
    assert checkpoints(out) == [saved]
    assert checkpoint_fault(saved) is None
    assert [p.name for p in out.glob("*.partial")] == []
    assert_goes_on_from(saved, killer, recipe)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 12 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, after: Path) -> None:
    """Take all space of a disk when `after` is there."""
    while not after.exists():
        time.sleep(0.001)
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def test_a_disk_that_is_filled_during_a_run_costs_no_checkpoint(
    killer: Killer, made, small_disk: Path
):
    out = small_disk / "run"
    recipe = write_recipe(made, out, "trainer.max_steps=8")
    filler = threading.Thread(target=fill, args=(small_disk, out / "checkpoint-2"))
    filler.start()

    code, said = killer.run(recipe, out)

    filler.join()
    assert code == 1, said
    assert "the disk is full" in said
    saved = checkpoints(out)[-1]
    assert checkpoint_fault(saved) is None
    (small_disk / "ballast").unlink()
    assert_goes_on_from(saved, killer, recipe)


def test_a_run_whose_checkpoints_will_not_fit_does_not_begin(
    killer: Killer, made, small_disk: Path
):
    out = small_disk / "run"
    recipe = write_recipe(made, out, "trainer.save_total_limit=200", "trainer.max_steps=999")

    code, said = killer.run(recipe, out)

    assert code == 1
    # 10,240 learned weights: 4 bytes each, and 8 of the optimizer
    assert "201 checkpoints of 0.1 MiB and final weights of 0.0 MiB do not fit: 12.0 MiB" in said
    assert "lower trainer.save_total_limit to " in said
    assert not out.exists()
