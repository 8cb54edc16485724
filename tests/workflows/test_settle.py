"""What a recipe leaves to the machine: the fast way where it is known to work."""

import numpy as np
import pytest
from recipe_files import recipe_of

from vltrain.config import Recipe
from vltrain.data.step_rows import StepRows
from vltrain.errors import VltrainError
from vltrain.training.engines import NO_ENGINE, Engine
from vltrain.workflows import prepare, settle
from vltrain.workflows.run_data import Halves
from vltrain.workflows.settle import (
    in_rows_of_at_most,
    leaves_rows_open,
    settled,
    shorter_rows,
)

DDP, FSDP2 = (Engine(name, "asked for") for name in ("ddp", "fsdp2"))
ZERO2, ZERO3 = (
    Engine("deepspeed", "asked for", {"zero_optimization": {"stage": stage}}) for stage in (2, 3)
)
IN_BF16 = "dtype=bf16"


@pytest.fixture(autouse=True)
def compiler(monkeypatch) -> None:
    monkeypatch.setattr(prepare, "has_compiler", lambda: True)


def on_gpu(*settings: str, method: str = "lora", engine: Engine = NO_ENGINE) -> Recipe:
    return settled(recipe_of(IN_BF16, *settings, method=method), engine, on_gpu=True)


def ways_of(recipe: Recipe) -> tuple[object, ...]:
    return (recipe.compile, recipe.memory, recipe.data.packing, recipe.batch.samples)


PLAIN = (False, None, False, None)


@pytest.mark.parametrize(("method", "samples"), [("lora", 8), ("qlora", 8), ("full", 16)])
def test_on_one_gpu_the_samples_of_a_step_share_rows_and_layers_run_by_its_memory(method, samples):
    recipe = on_gpu(method=method)

    assert ways_of(recipe) == (method != "qlora", "auto", True, samples)
    assert recipe.data.row_tokens == 8192
    at_once = ("per_device_train_batch_size", "gradient_accumulation_steps")
    assert [recipe.trainer[key] for key in at_once] == [1, 1]


def test_a_step_has_the_samples_that_the_recipe_says():
    recipe = on_gpu(
        "trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=3"
    )

    assert recipe.batch.samples == 12
    assert recipe.trainer["per_device_eval_batch_size"] == 4


def test_on_several_gpus_too_under_every_engine():
    recipe = recipe_of(IN_BF16)

    for engine in (DDP, ZERO2, ZERO3, FSDP2):
        there = settled(recipe, engine, processes=2, on_gpu=True)
        assert ways_of(there) == (True, "auto", True, 16)


def test_a_file_of_deepspeeds_that_says_what_a_step_is_is_taken_at_its_word():
    zero = {"zero_optimization": {"stage": 2}}
    for key in ("gradient_accumulation_steps", "train_batch_size"):
        engine = Engine("deepspeed", "asked for", {**zero, key: 8})
        assert on_gpu(engine=engine).data.packing is False
    auto = Engine("deepspeed", "asked for", {**zero, "train_batch_size": "auto"})
    assert on_gpu(engine=auto).data.packing is True


def test_a_file_of_deepspeeds_that_replaces_linear_layers_is_not_compiled():
    zero = {"stage": 3, "memory_efficient_linear": True}
    engine = Engine("deepspeed", "asked for", {"zero_optimization": zero})

    assert ways_of(on_gpu(engine=engine)) == (False, "auto", True, 8)


def test_rows_of_a_length_that_is_given_are_packed_under_neftune_too():
    settings = ("trainer.neftune_noise_alpha=5.0", "data.row_tokens=4096")

    assert on_gpu(*settings).data.packing is True


def test_on_cpus_a_run_is_as_plain_as_can_be():
    recipe = recipe_of(IN_BF16)

    assert ways_of(settled(recipe, NO_ENGINE, on_gpu=False)) == PLAIN
    assert recipe.trainer["gradient_checkpointing"] is True


@pytest.mark.parametrize("engine", [ZERO3, FSDP2])
def test_layers_that_are_not_compiled_run_by_the_memory_all_the_same(engine):
    there = settled(recipe_of(IN_BF16, "compile=false"), engine, processes=2, on_gpu=True)

    assert ways_of(there) == (False, "auto", True, 16)


@pytest.mark.parametrize(
    "setting",
    [
        "trainer.gradient_checkpointing=true",
        "trainer.gradient_checkpointing=false",
        "trainer.gradient_checkpointing_kwargs={use_reentrant: false}",
        "trainer.torch_compile=true",
        "trainer.torch_compile_mode=default",
    ],
)
def test_a_recipe_that_says_how_layers_are_recomputed_is_taken_at_its_word(setting):
    assert ways_of(on_gpu(setting)) == (False, None, True, 8)


def test_each_way_has_a_switch():
    assert ways_of(on_gpu("compile=false")) == (False, "auto", True, 8)
    assert ways_of(on_gpu("memory=lean")) == (True, "lean", True, 8)
    assert ways_of(on_gpu("memory=null")) == (True, None, True, 8)
    assert ways_of(on_gpu("data.packing=false")) == (True, "auto", False, None)
    assert ways_of(on_gpu("data.packing=true")) == (True, "auto", True, None)


@pytest.mark.parametrize("size", ["0", "-2", "2.5", "null", "'4'"])
@pytest.mark.parametrize("key", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_steps_of_no_size_are_refused_by_the_name_that_was_written(key, size):
    with pytest.raises(VltrainError, match=f"`trainer.{key}` is"):
        on_gpu(f"trainer.{key}={size}")


def test_what_is_to_run_on_the_cpu_is_plain_beside_a_gpu_too():
    assert ways_of(on_gpu("trainer.use_cpu=true")) == PLAIN


def test_dora_is_not_compiled_by_itself(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true}')
    assert on_gpu(f"lora.continue_from={tmp_path}").compile is False
    assert on_gpu("lora.dora=true").compile is False
    assert on_gpu("lora.dora=true", "compile=true").compile is True


@pytest.mark.parametrize(
    "settings",
    [
        ("trainer.train_sampling_strategy=group_by_length",),
        ("trainer.dataloader_drop_last=true",),
        ("trainer.auto_find_batch_size=true",),
        ("trainer.neftune_noise_alpha=5.0",),
        ("data.streaming=true", "trainer.max_steps=9"),
    ],
    ids=str,
)
def test_what_needs_samples_as_they_come_is_not_packed(settings):
    assert ways_of(on_gpu(*settings)) == (True, "auto", False, None)


def test_neither_is_what_no_kernel_attends_to(monkeypatch):
    in_float32 = settled(recipe_of("dtype=fp32"), NO_ENGINE, on_gpu=True)
    monkeypatch.setattr(settle, "gpus_have_kernels", lambda: False)

    assert in_float32.data.packing is False
    assert on_gpu().data.packing is False


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize(("engine", "processes"), [(NO_ENGINE, 1), (DDP, 2)])
def test_rows_of_a_length_that_is_given_are_packed_anywhere(gpu, engine, processes):
    recipe = recipe_of("data.row_tokens=4096")
    packed = settled(recipe, engine, processes=processes, on_gpu=gpu)

    assert (packed.data.packing, packed.batch.samples) == (True, 8 * processes)
    assert packed.data.row_tokens == 4096
    assert not leaves_rows_open(recipe)


def test_rows_are_as_long_as_a_sample_may_be_where_no_kernel_is():
    in_steps = ("batch.samples=4", "data.max_length=512")

    assert settled(recipe_of(*in_steps), NO_ENGINE, on_gpu=False).data.row_tokens == 512
    assert on_gpu(*in_steps).data.row_tokens == 8192
    assert on_gpu("data.max_length=9000").data.row_tokens == 9000


def test_what_is_settled_stays_so():
    recipe = on_gpu()

    assert settled(recipe, NO_ENGINE, on_gpu=True) == recipe


def test_packed_samples_of_a_step_need_no_second_word():
    assert recipe_of("batch.samples=4").data.packing is True
    with pytest.raises(VltrainError, match=r"data\.packing is false"):
        recipe_of("batch.samples=4", "data.packing=false")


class Lengths:
    lengths = np.array([700, 300, 300, 300])

    def __len__(self) -> int:
        return len(self.lengths)


def test_rows_get_shorter_down_to_the_longest_sample():
    rows = StepRows(Lengths(), step_samples=4, row_tokens=8192)
    ways = list(shorter_rows(on_gpu(), Halves(Lengths(), None, rows=rows)))

    tokens = [8192, 4096, 2048, 1024, 700]
    assert [recipe.data.row_tokens for recipe, _ in ways] == tokens
    assert [halves.rows.row_tokens for _, halves in ways] == tokens
    steps = {halves.rows.steps for _, halves in ways}
    assert steps == {1}
    order = range(4)
    assert [len(next(halves.rows.shares(order))) for _, halves in ways] == [1, 1, 1, 2, 3]


def test_rows_are_no_longer_than_those_of_another_process():
    halves = Halves(Lengths(), None, rows=StepRows(Lengths(), step_samples=4, row_tokens=8192))

    assert in_rows_of_at_most(halves, lambda own: min(own, 1024)).rows.row_tokens == 1024
    assert in_rows_of_at_most(halves, lambda own: own) is halves
    plain = Halves(Lengths(), None)
    assert in_rows_of_at_most(plain, lambda own: 1) is plain


def test_without_data_they_hold_what_a_sample_may_have():
    ways = shorter_rows(on_gpu("data.max_length=3000"), None)

    assert [recipe.data.row_tokens for recipe, _ in ways] == [8192, 4096, 3000]


def test_rows_that_no_step_fills_are_left_as_they_are():
    packed = on_gpu("data.packing=true")

    assert list(shorter_rows(packed, None)) == [(packed, None)]
