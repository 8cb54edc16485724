"""Two and four processes under each engine learn what one learns of the same batches."""

import io
import json

import pytest
import torch
from engine_place import Place, eval_losses, losses, make_place, run_together
from rich.console import Console
from safetensors.torch import load_file

from vltrain.config import Recipe
from vltrain.models import load_model
from vltrain.training.run_dir import RunDir
from vltrain.workflows.merge import merge
from vltrain.workflows.train import train

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

ENGINES = {
    "ddp": ("engine=ddp",),
    "zero1": ("deepspeed=zero1",),
    "zero2": ("deepspeed=zero2",),
    "zero3": ("deepspeed=zero3",),
}
ARRANGED = {  # gathered layer by layer
    "zero3-lora-fast": ("memory=fast",),
    "zero3-lora-compiled": ("compile=true", "memory=fast"),
    "zero3-full-lean": ("memory=lean",),
    "zero3_offload-full-fast": ("memory=fast",),
}
SEEING = ("freeze.vision=false", "trainer.save_strategy=steps", "trainer.save_steps=3")
PACKED = ("data.packing=true", "data.max_length=200", "trainer.max_steps=2")
IN_ORDER = "trainer.train_sampling_strategy=sequential"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("engines"))


def cells(place: Place) -> list[Recipe]:
    """What two processes run, in one start."""
    made = []
    for method in ("lora", "full"):
        for name, engine in ENGINES.items():
            more = ("trainer.gradient_accumulation_steps=2", *engine)
            made.append(place.recipe(f"{name}-{method}", method, *more))
        for name in ("ddp", "zero3"):  # rank 0 has all the pictures, rank 1 none in any step
            apart = ("trainer.gradient_accumulation_steps=1", IN_ORDER, *ENGINES[name])
            made.append(place.recipe(f"{name}-{method}-apart", method, *apart))
    at_once = ("trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=1")
    made.append(place.recipe("ddp-full-at-once", "full", *at_once, *ENGINES["ddp"]))
    made.append(place.recipe("zero3-full-at-once", "full", *at_once, *ENGINES["zero3"]))
    twice = "trainer.gradient_accumulation_steps=2"
    for name in ("zero2_offload", "zero3_offload"):
        made.append(place.recipe(f"{name}-lora", "lora", twice, f"deepspeed={name}"))
    for name, settings in ARRANGED.items():
        engine, method, _ = name.split("-")
        made.append(place.recipe(name, method, twice, *settings, f"deepspeed={engine}"))
    sees = (twice, *SEEING, "memory=fast", *ENGINES["zero3"])
    made.append(place.recipe("zero3-lora-sees", "lora", *sees))
    packed = (*PACKED, *place.evaluation(2))
    made.append(place.recipe("zero3-full-packed", "full", twice, *packed, *ENGINES["zero3"]))
    uneven = ("trainer.num_train_epochs=2", "trainer.max_steps=-1", IN_ORDER, *ENGINES["ddp"])
    by_one = "trainer.gradient_accumulation_steps=1"
    made.append(place.recipe("ddp-lora-uneven", "lora", by_one, *uneven, data=place.odd))
    return made


@pytest.fixture(scope="module")
def two(place: Place, tmp_path_factory: pytest.TempPathFactory) -> str:
    """All cells, run by two processes; what was shown."""
    return run_together(2, cells(place), tmp_path_factory.mktemp("recipes"))


@pytest.fixture(scope="module")
def four(place: Place, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Both methods under each engine, run by four processes; what was shown."""
    settings = ("trainer.gradient_accumulation_steps=1", *place.evaluation(6))
    recipes = [
        place.recipe(f"four-{name}-{method}", method, *settings, *engine)
        for method in ("lora", "full")
        for name, engine in ENGINES.items()
    ]
    return run_together(4, recipes, tmp_path_factory.mktemp("recipes"))


@pytest.fixture(scope="module")
def one(place: Place) -> Place:
    """What one process makes of the same batches: two thirds of the cells have the same ones."""
    for method in ("lora", "full"):
        quiet = Console(file=io.StringIO())
        settings = ("trainer.gradient_accumulation_steps=4", *place.evaluation(6))
        train(place.recipe(method, method, *settings), quiet)
        apart = ("trainer.gradient_accumulation_steps=2", IN_ORDER)
        train(place.recipe(f"{method}-apart", method, *apart), quiet)
    whole = "trainer.gradient_accumulation_steps=4"
    train(place.recipe("lora-sees", "lora", whole, *SEEING), Console(file=io.StringIO()))
    packed = (*PACKED, *place.evaluation(2))
    train(place.recipe("full-packed", "full", whole, *packed), Console(file=io.StringIO()))
    return place


def reference(name: str) -> str:
    """The run of one process whose batches a cell has."""
    _, method, *more = name.split("-")
    return f"{method}-{more[0]}" if more in (["apart"], ["packed"], ["sees"]) else method


NAMES = [
    *(f"{engine}-{method}" for method in ("lora", "full") for engine in ENGINES),
    *(f"{engine}-{method}-apart" for method in ("lora", "full") for engine in ("ddp", "zero3")),
    "ddp-full-at-once",
    "zero3-full-at-once",
    "zero2_offload-lora",
    "zero3_offload-lora",
    "zero3-full-packed",
    "zero3-lora-sees",
    *ARRANGED,
]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_lose_what_one_loses(place, one, two, name):
    together, alone = losses(place.runs / name), losses(place.runs / reference(name))

    assert len(together) == len(alone) == (2 if name.endswith("packed") else 6)
    assert together == pytest.approx(alone, abs=1e-4)
    assert max(alone) - min(alone) > 0.01


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("engine", ENGINES)
def test_four_processes_lose_and_measure_what_one_does(place, one, four, engine, method):
    run = place.runs / f"four-{engine}-{method}"

    assert losses(run) == pytest.approx(losses(place.runs / method), abs=1e-4)
    assert len(eval_losses(run)) == 1
    assert eval_losses(run) == pytest.approx(eval_losses(place.runs / method), abs=1e-4)
    said = json.loads((run / "environment.json").read_text())
    stage = int(engine[4]) if engine.startswith("zero") else None
    assert (said["zero_stage"], said["world_size"]) == (stage, 4)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_all_processes_are_counted(place, one, two, name):
    counts = [
        [
            row["learned_tokens"]
            for row in RunDir(place.runs / run).read_metrics()
            if "learned_tokens" in row
        ]
        for run in (name, reference(name))
    ]

    assert counts[0] == counts[1]


def test_two_processes_that_pack_measure_what_one_measures(place, one, two):
    together, alone = (eval_losses(place.runs / f"{e}full-packed") for e in ("zero3-", ""))

    assert len(together) == 1
    assert together == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_environment_says_the_engine(place, two, name):
    said = json.loads((place.runs / name / "environment.json").read_text())

    engine, stage = ("ddp", None) if name.startswith("ddp") else ("deepspeed", int(name[4]))
    assert (said["engine"], said["zero_stage"], said["world_size"]) == (engine, stage, 2)


@pytest.mark.parametrize("name", [name for name in NAMES if "-full" in name])
def test_a_model_is_saved_whole_and_answers_like_that_of_one_process(place, one, two, name):
    ours, theirs = (load_model(place.runs / run / "final") for run in (name, reference(name)))

    ids = torch.arange(0, 96)[None]
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-3, rtol=1e-3)
    published = load_file(place.base / "model.safetensors")
    assert load_file(place.runs / name / "final" / "model.safetensors").keys() == published.keys()


@pytest.mark.parametrize("name", [name for name in NAMES if "-lora" in name])
def test_an_adapter_is_saved_whole_and_is_that_of_one_process(place, one, two, name):
    ours, theirs = (
        load_file(place.runs / run / "final" / "adapter_model.safetensors")
        for run in (name, reference(name))
    )

    assert ours.keys() == theirs.keys()
    for tensor in ours:
        torch.testing.assert_close(ours[tensor], theirs[tensor], atol=1e-3, rtol=0)


def test_samples_that_are_left_over_are_made_up_from_the_beginning_of_the_epoch(place, two):
    rows = RunDir(place.runs / "ddp-lora-uneven").read_metrics()

    # 27, 10, 28, 19 and 24 tokens are learned of the five samples, two of which make a step:
    # (0, 1), (2, 3), (4, 0)
    assert [row["learned_tokens"] for row in rows] == [37, 47, 51] * 2


def test_an_adapter_of_zero3_is_merged(place, two, tmp_path):
    merge(place.runs / "zero3-lora" / "final", tmp_path / "m", console=Console(file=io.StringIO()))

    assert (tmp_path / "m" / "config.json").is_file()


def test_one_process_speaks_for_all(place, two):
    for name in NAMES:
        assert two.count(f"done: {place.runs / name / 'final'};") == 1
    assert two.count("2 processes under ddp: the recipe asks for it") == 6
