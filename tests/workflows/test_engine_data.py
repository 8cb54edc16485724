"""Several processes with the data, the evaluation and the files of DeepSpeed's that users have."""

import io
import os
from pathlib import Path

import pytest
import torch
from engine_place import Place, eval_losses, losses, make_place, run_together
from group import start_group
from rich.console import Console
from runs import weights
from safetensors.torch import load_file

from vltrain.config import Recipe
from vltrain.training.run_dir import RunDir
from vltrain.workflows.train import train

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

ORIGINAL = Path(__file__).parents[1] / "original"
BY_ONE = "trainer.gradient_accumulation_steps=1"
BY_TWO = "trainer.gradient_accumulation_steps=2"
BY_FOUR = "trainer.gradient_accumulation_steps=4"
BY_EIGHT = "trainer.gradient_accumulation_steps=8"
STREAM = ("data.streaming=true", "data.shuffle_buffer=4")
BEST = (  # the worst of the checkpoints, so that it is not the last
    "trainer.save_steps=2",
    "trainer.max_steps=4",
    "trainer.load_best_model_at_end=true",
    "trainer.metric_for_best_model=eval_loss",
    "trainer.greater_is_better=true",
)
BEST_CELLS = ("lora-ddp", "lora-zero3", "full-ddp", "full-zero2", "full-zero3")
EPOCHS = ("trainer.max_steps=-1", "trainer.num_train_epochs=2", BY_ONE)
PACKED = ("data.packing=true", "data.max_length=200")
SAMPLES = (*PACKED, "batch.samples=4")  # in more rows than one for each process
BF16 = ("dtype=bf16", "trainer.max_steps=2", BY_ONE)
BESIDE = (*BF16, "freeze.vision=false", "lora.embeddings=true", "trainer.save_strategy=steps")
ZERO2_FILE, ZERO3_FILE = (f"deepspeed={ORIGINAL}/ds_config_zero{stage}.json" for stage in (2, 3))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("engines"))


def mix_of(place: Place, samples: int) -> str:
    """So many of the sixteen records an epoch."""
    return f"data.mix=[{{file: {place.data}, samples: {samples}}}]"


def features(place: Place) -> tuple[str, ...]:
    """Settings: pictures are given to the model as what its vision tower once made of them."""
    return ("data.cache_features=true", f"data.cache_dir={place.runs / 'cache'}")


def best(place: Place, cell: str, *settings: str) -> Recipe:
    """A run that evaluates, and goes back to its best checkpoint; `cell`: "method-engine"."""
    return place.recipe(f"best-{cell}", cell[:4], *place.evaluation(2), *BEST, *settings)


@pytest.fixture(scope="module")
def two(place: Place, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Runs of two processes, in one start; what was shown."""
    four_at_once = "trainer.per_device_train_batch_size=4"
    runs = [
        place.recipe("file2-lora", "lora", BY_TWO, ZERO2_FILE),
        place.recipe("file3-full", "full", BY_TWO, ZERO3_FILE),
        place.recipe("one_by_four", "lora", BY_FOUR, "engine=ddp"),
        place.recipe("four_by_one", "lora", BY_ONE, four_at_once, "engine=ddp"),
        place.recipe("one_by_four-zero2", "lora", BY_FOUR, "deepspeed=zero2"),
        place.recipe("four_by_one-zero2", "lora", BY_ONE, four_at_once, "deepspeed=zero2"),
        place.recipe("stream", "lora", BY_TWO, *STREAM, "engine=ddp"),
        place.recipe("stream-zero3", "lora", BY_TWO, *STREAM, "deepspeed=zero3"),
        place.recipe("features", "lora", BY_TWO, *features(place), "engine=ddp"),
        place.recipe("features-zero2", "full", BY_TWO, *features(place), "deepspeed=zero2"),
        place.recipe("mix", "lora", BY_TWO, mix_of(place, 12), "engine=ddp"),
        place.recipe("mix-epochs", "lora", *EPOCHS, mix_of(place, 13), "deepspeed=zero3"),
        place.recipe("packed-epochs", "lora", *EPOCHS, *PACKED, "engine=ddp"),
        place.recipe("samples", "lora", *SAMPLES, "engine=ddp"),
        place.recipe("samples-zero2", "lora", *SAMPLES, "deepspeed=zero2"),
        place.recipe("samples-zero3", "lora", *SAMPLES, "deepspeed=zero3"),
        best(place, "lora-ddp", BY_TWO, "engine=ddp"),
        best(place, "lora-zero3", BY_TWO, "deepspeed=zero3"),
        best(place, "full-ddp", BY_TWO, "engine=ddp"),
        best(place, "full-zero2", BY_TWO, "deepspeed=zero2"),
        best(place, "full-zero3", BY_TWO, "deepspeed=zero3"),
        place.recipe("bf16-zero2", "lora", *BF16, "deepspeed=zero2"),
        place.recipe("bf16-zero3", "lora", *BF16, "deepspeed=zero3"),
        place.recipe("beside-zero2", "lora", *BESIDE, "trainer.save_steps=1", "deepspeed=zero2"),
        place.recipe("beside-zero3", "lora", *BESIDE, "trainer.save_steps=1", "deepspeed=zero3"),
    ]
    return run_together(2, runs, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def one(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """What one process makes of the same batches; with DeepSpeed only where its file is used."""

    def alone(name: str, *settings: str) -> Recipe:
        return place.recipe(name, "lora", *settings)

    for recipe in (
        alone("whole", BY_FOUR),
        alone("whole-eight", BY_EIGHT),
        alone("whole-stream", BY_FOUR, *STREAM),
        place.recipe("whole-full", "full", BY_FOUR),
        alone("whole-mix", BY_FOUR, mix_of(place, 12)),
        best(place, "lora", BY_FOUR),
        best(place, "full", BY_FOUR),
    ):
        train(recipe, Console(file=io.StringIO()))
    files = [
        place.recipe(f"whole-file-{method}", method, BY_FOUR, ZERO2_FILE)
        for method in ("lora", "full")
    ]
    run_together(1, files, tmp_path_factory.mktemp("one"))
    return place


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("file2-lora", "whole-file-lora"),
        ("file3-full", "whole-file-full"),
        ("one_by_four", "whole-eight"),
        ("four_by_one", "whole-eight"),
        ("one_by_four-zero2", "whole-eight"),
        ("four_by_one-zero2", "whole-eight"),
        ("stream", "whole-stream"),
        ("stream-zero3", "whole-stream"),
        ("features", "whole"),
        ("features-zero2", "whole-full"),
        ("mix", "whole-mix"),
        ("samples", "whole"),
        ("samples-zero2", "whole"),
        ("samples-zero3", "whole"),
        *((f"best-{cell}", f"best-{cell[:4]}") for cell in BEST_CELLS),
    ],
)
def test_two_processes_lose_what_one_loses(place, one, two, name, reference):
    together, alone = losses(place.runs / name), losses(place.runs / reference)

    assert len(together) == len(alone) == (4 if name.startswith("best") else 6)
    assert together == pytest.approx(alone, abs=1e-4)
    assert max(alone) - min(alone) > 0.01


def test_the_originals_files_say_what_they_decide(place, two):
    for line in (
        "the optimizer is the DeepSpeed file's: torch's AdamW, on a CPU",
        "the learning rate follows the DeepSpeed file's WarmupLR",
    ):
        assert two.count(line) == 2
    rates = [row["learning_rate"] for row in RunDir(place.runs / "file2-lora").read_metrics()]
    assert rates == [0, *[1e-3] * 5]  # of the next step: WarmupLR begins with two of zero


def test_nothing_is_compiled_on_a_cpu(two):
    assert not (Path(os.environ["XDG_CACHE_HOME"]) / "torch_extensions").exists()


def test_epochs_of_a_mix_end_alike_on_every_process(place, two):
    # 13 samples an epoch, 2 a step
    assert len(losses(place.runs / "mix-epochs")) == 2 * 7


def test_epochs_of_packed_rows_end_alike_on_every_process(place, two):
    rows = RunDir(place.runs / "packed-epochs").read_metrics()

    assert len(rows) % 2 == 0
    assert rows[-1]["epoch"] == pytest.approx(2)


@pytest.mark.parametrize("cell", BEST_CELLS)
def test_two_processes_measure_what_one_measures(place, one, two, cell):
    together, alone = (eval_losses(place.runs / f"best-{name}") for name in (cell, cell[:4]))

    assert len(together) == 2
    assert together == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("cell", BEST_CELLS)
def test_the_best_checkpoint_of_two_processes_is_that_of_one(place, one, two, cell):
    alone = place.runs / f"best-{cell[:4]}"
    ours, theirs, untaken = (
        weights(folder)
        for folder in (
            place.runs / f"best-{cell}" / "final",
            alone / "final",
            alone / "checkpoint-4",
        )
    )

    assert ours.keys() == theirs.keys() == untaken.keys()
    for tensor in ours:
        torch.testing.assert_close(ours[tensor], theirs[tensor], atol=1e-3, rtol=0)
    assert any((ours[name] - untaken[name]).abs().max() > 1e-3 for name in ours)


@pytest.mark.parametrize("stage", [2, 3])
def test_an_adapter_learned_in_bf16_is_saved_from_deepspeeds_float32(place, two, stage):
    adapter = load_file(place.runs / f"bf16-zero{stage}" / "final" / "adapter_model.safetensors")

    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert any((tensor != tensor.bfloat16()).any() for tensor in adapter.values())


def test_in_bf16_whole_modules_learn_beside_adapters_under_zero3_as_under_zero2(place, two):
    ours, theirs = (losses(place.runs / f"beside-zero{stage}") for stage in (3, 2))
    assert len(ours) == 2
    assert ours == pytest.approx(theirs, rel=1e-2)

    saved = [
        load_file(folder / "adapter_model.safetensors")
        for run in (place.runs / f"beside-zero{stage}" for stage in (3, 2))
        for folder in (run / "checkpoint-1", run / "final")
    ]
    assert all(tensors.keys() == saved[0].keys() for tensors in saved)
    for final in saved[1::2]:  # what rests of the vision side is the base's, in 16 bits
        learned = [final[name] for name in final if "lora_B" in name or "resblocks" in name]
        assert {tensor.dtype for tensor in learned} == {torch.float32}
        assert all(tensor.any() for tensor in learned)


def test_two_processes_share_out_the_pictures_whose_features_they_make(place: Place, tmp_path):
    words = ["-m", "vltrain", "cache", "--model", str(place.base), "--data", str(place.data)]

    done = start_group(2, *words, "--set", f"data.cache_dir={tmp_path}")

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("features: computing 4 ") == 1
    assert len(list((tmp_path / "features").glob("*/pictures/*/*"))) == 4
