"""The memory of runs that read what a frozen vision tower makes of pictures from the disk."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from tiny import write_conversations

from vltrain.config import Method, load_recipe
from vltrain.training.arguments import training_arguments
from vltrain.training.engines import NO_ENGINE
from vltrain.training.features import BATCH_ON_GPU
from vltrain.training.moments import Features
from vltrain.workflows.base import memory_of, read_base, read_halves
from vltrain.workflows.estimate import estimate_run
from vltrain.workflows.memory import RunMemory
from vltrain.workflows.settle import settled

TOKENS = Features(("vision", "projector"), BATCH_ON_GPU)
PATCHES = Features(("vision",), BATCH_ON_GPU)
KEPT = "data.cache_features=true"
AUTO = "data.cache_features=auto"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four conversations with five pictures, each of 4 image tokens of 128 numbers."""
    return write_conversations(tmp_path_factory.mktemp("data"))


def memory(bare: Path, data: Path, *settings: str, method: Method = "lora") -> RunMemory:
    given = ("trainer.report_to=none", "dtype=fp32", *settings)
    recipe = load_recipe(
        None, method=method, model=str(bare), data=[data], output=Path("out"), overrides=given
    )
    recipe = settled(recipe, NO_ENGINE, on_gpu=True)
    arguments, base = training_arguments(recipe), read_base(recipe.model)
    halves = read_halves(Console(file=io.StringIO()), recipe, base, arguments)
    return memory_of(recipe, base, arguments, NO_ENGINE, halves, gpu_bytes=None)[1]


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("lora", (), None),
        ("lora", (KEPT,), TOKENS),
        ("lora", (KEPT, "freeze.projector=false"), PATCHES),
        ("full", (KEPT,), PATCHES),
        ("full", (KEPT, "freeze.projector=true"), TOKENS),
        ("lora", (KEPT, "lora.targets=['c_attn', 'c_fc']"), None),
        ("lora", (AUTO,), TOKENS),
        ("lora", (AUTO, "trainer.num_train_epochs=1"), None),
        ("lora", (AUTO, "freeze.vision=false"), None),
        ("lora", (AUTO, "data.streaming=true", "trainer.max_steps=5"), None),
        ("lora", (KEPT, "trainer.max_steps=1"), TOKENS),
    ],
    ids=str,
)
def test_an_estimate_has_the_features_that_the_run_will_read(
    bare: Path, data: Path, method: Method, settings: tuple[str, ...], expected: Features | None
):
    assert memory(bare, data, *settings, method=method).work.features == expected


def test_where_not_all_features_fit_the_tower_is_counted_in_each_step(bare: Path, data: Path):
    five = 5 * 4 * 128 * 4 / 2**30

    for gib, expected in ((five, TOKENS), (0.99 * five, None)):
        run = memory(bare, data, KEPT, f"data.features_max_gib={gib}")
        assert run.work.features == expected


def test_kept_features_leave_the_towers_weights_on_the_gpu(bare: Path, data: Path):
    pixels, kept = (memory(bare, data, *setting).estimate for setting in ((), (KEPT,)))

    assert kept.weights == pixels.weights
    seeing = {m.name: m.vision for m in kept.moments}["the vision tower's forward"]
    assert seeing == 2 * 4 * 128 * 4  # the image tokens of the sample with two pictures


@pytest.mark.parametrize(
    ("settings", "said"),
    [((), False), ((KEPT,), True), ((AUTO,), True), ((AUTO, "trainer.max_steps=9"), False)],
    ids=str,
)
def test_without_data_an_estimate_says_whether_features_are_kept(
    bare: Path, capsys, settings: tuple[str, ...], said: bool
):
    estimate_run(None, model=str(bare), overrides=settings)

    assert ("pictures: their features are kept" in capsys.readouterr().out) is said
