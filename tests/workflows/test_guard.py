"""What surrounds a run: its data, its memory, its disk."""

import errno
import json
from pathlib import Path

import pytest
import torch
from tiny import write_conversations, write_qwen_vl

from vltrain.config import Recipe, load_recipe
from vltrain.data.dataset import SampleDataset
from vltrain.data.sources import read_records
from vltrain.errors import GpuMemoryError, VltrainError
from vltrain.models import load_processor
from vltrain.training.run_dir import RunDir
from vltrain.workflows.guard import (
    advised,
    data_fingerprint,
    guarded,
    in_steps_of_before,
    refuse_changed_data,
    samples_per_step,
)


def recipe_of(out: Path, *settings: str, method: str = "lora") -> Recipe:
    return load_recipe(
        None,
        method=method,
        model="base",
        data=[Path("train.json")],
        output=out,
        overrides=settings,
    )


@pytest.fixture
def samples(tmp_path: Path) -> SampleDataset:
    base = write_qwen_vl(tmp_path / "base")
    return SampleDataset.of_records(
        read_records(write_conversations(tmp_path)), load_processor(base)
    )


# --- the data of a run that resumes ---


def begun(tmp_path: Path, samples: SampleDataset) -> tuple[RunDir, Recipe, Path]:
    """A run that began with the four conversations, its recipe, and its data file."""
    file = tmp_path / "train.json"
    recipe = recipe_of(tmp_path / "run", f"data.files=[{file}]")
    run = RunDir(recipe.output)
    run.begin(recipe, {})
    run.keep_data_fingerprint(data_fingerprint(recipe.data, samples))
    return run, recipe, file


def test_a_run_goes_on_with_the_data_that_it_began_with(tmp_path: Path, samples):
    run, recipe, _ = begun(tmp_path, samples)

    refuse_changed_data(run, data_fingerprint(recipe.data, samples))


def test_a_file_with_other_contents_is_refused_by_its_name(tmp_path: Path, samples):
    run, recipe, file = begun(tmp_path, samples)
    size = file.stat().st_size
    file.write_text(file.read_text(encoding="utf-8").replace("Hello!", "Howdy!"), encoding="utf-8")

    with pytest.raises(VltrainError) as error:
        refuse_changed_data(run, data_fingerprint(recipe.data, samples))

    assert f"{file} ({size:,} bytes then, {size:,} bytes now)" in str(error.value)
    assert "start anew with another --output" in str(error.value)


def test_the_same_files_read_as_other_samples_are_refused(tmp_path: Path, samples):
    run, recipe, file = begun(tmp_path, samples)
    fewer = SampleDataset.of_records(list(read_records(file))[:3], samples.processor)

    told = "the samples: 4 samples of 482 tokens then, 3 of 349 now"
    with pytest.raises(VltrainError, match=told):
        refuse_changed_data(run, data_fingerprint(recipe.data, fewer))


def test_a_folder_of_data_that_got_another_file_is_refused(tmp_path: Path, samples):
    folder = tmp_path / "parquet"
    folder.mkdir()
    (folder / "a.parquet").write_bytes(b"12345")
    recipe = recipe_of(tmp_path / "run", f"data.files=[{folder}]")
    run = RunDir(recipe.output)
    run.begin(recipe, {})
    run.keep_data_fingerprint(data_fingerprint(recipe.data, samples))

    (folder / "b.parquet").write_bytes(b"123")

    with pytest.raises(VltrainError, match=r"parquet \(5 bytes then, 8 bytes now\)"):
        refuse_changed_data(run, data_fingerprint(recipe.data, samples))


def test_a_run_of_which_nobody_wrote_its_data_down_is_let_be(tmp_path: Path, samples):
    recipe = recipe_of(tmp_path / "run")
    run = RunDir(recipe.output)
    run.begin(recipe, {})

    refuse_changed_data(run, data_fingerprint(recipe.data, samples))


# --- a run that resumes on other processes ---


def began_in_steps_of(samples: int, tmp_path: Path) -> tuple[RunDir, Recipe]:
    recipe = recipe_of(tmp_path / "run", "trainer.gradient_accumulation_steps=8")
    run = RunDir(recipe.output)
    run.begin(recipe, {})
    run.keep_data_fingerprint({"files": {}, "samples": {}, "samples_per_step": samples})
    return run, recipe


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 8), (1, 16), (4, 4), (16, 1)])
def test_a_step_takes_as_many_samples_whatever_the_processes(tmp_path, processes, accumulation):
    run, recipe = began_in_steps_of(16, tmp_path)  # on 2 processes

    resumed = in_steps_of_before(recipe, run, processes)

    assert resumed.trainer["gradient_accumulation_steps"] == accumulation
    assert samples_per_step(resumed, processes) == 16


def test_a_number_of_processes_that_cannot_take_such_steps_is_refused(tmp_path):
    run, recipe = began_in_steps_of(16, tmp_path)

    with pytest.raises(VltrainError, match="a step of this run takes 16 samples, and 3 processes"):
        in_steps_of_before(recipe, run, 3)


def test_a_new_run_steps_as_its_recipe_says(tmp_path):
    recipe = recipe_of(tmp_path / "run")

    assert in_steps_of_before(recipe, RunDir(recipe.output), 3) == recipe


# --- memory and disk ---


def test_a_gpu_without_memory_is_an_error_with_what_to_change(tmp_path: Path):
    settings = ("trainer.per_device_train_batch_size=4", "memory=null")
    recipe = recipe_of(tmp_path / "run", *settings)
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB"

    with pytest.raises(GpuMemoryError) as error, advised(recipe, None):
        raise torch.OutOfMemoryError(
            f"{said}. Of the allocated memory 5 GiB is allocated by PyTorch"
        )

    assert str(error.value).startswith(
        f"vltrain lora: {said}\n  fix: trainer.per_device_train_batch_size: 2 and "
        "trainer.gradient_accumulation_steps: 16; the losses stay\n"
    )
    assert error.value.exit_code == 3


def test_a_full_disk_is_an_error_whoever_wrote(tmp_path: Path):
    with (
        pytest.raises(VltrainError, match=r"the disk is full: .*No space left"),
        guarded(RunDir(tmp_path / "run")),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_other_errors_stay_what_they_are(tmp_path: Path):
    with pytest.raises(RuntimeError, match="a bug"), guarded(RunDir(tmp_path / "run")):
        raise RuntimeError("a bug")


def test_the_data_are_written_down_as_sizes_and_hashes(tmp_path: Path, samples):
    run, _, file = begun(tmp_path, samples)

    written = json.loads((run.path / "data.json").read_text())

    assert written["files"][str(file)]["bytes"] == file.stat().st_size
    assert (written["samples"]["count"], written["samples"]["tokens"]) == (4, 482)
