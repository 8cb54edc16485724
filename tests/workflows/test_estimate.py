"""`vltrain estimate`, as the user sees it; and what a run shows and refuses by the same numbers."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

import vltrain.workflows.estimate
import vltrain.workflows.guard
from vltrain.config import Method, Recipe, load_recipe
from vltrain.data.collation import Collator
from vltrain.errors import VltrainError
from vltrain.training.activations import BatchSizes
from vltrain.training.arguments import training_arguments
from vltrain.training.engines import NO_ENGINE, Engine
from vltrain.training.memory import CONTEXT_BYTES, WORKSPACE_BYTES
from vltrain.training.sharing import Sharing, sharing_of
from vltrain.training.trainer import Trainer
from vltrain.workflows.base import memory_of, read_base, read_halves
from vltrain.workflows.estimate import (
    can_be_probed,
    draft,
    epoch_steps,
    estimate_run,
    probe_epoch,
)
from vltrain.workflows.memory import (
    RunMemory,
    packed_batch,
    padded_batch,
)
from vltrain.workflows.prepare import hold_weights, prepare_model
from vltrain.workflows.settle import settled
from vltrain.workflows.train import train

NO_CONSOLE = Console(file=io.StringIO())


def a_recipe(base: Path, data: Path, out: Path, *settings: str, method: Method = "lora") -> Recipe:
    quick = ("trainer.max_steps=1", "trainer.report_to=none", "trainer.save_strategy=no")
    return load_recipe(
        None,
        method=method,
        model=str(base),
        data=[data],
        output=out,
        overrides=[*quick, *settings],
    )


def test_neither_weights_nor_data_are_needed(bare: Path, capsys):
    estimate_run(None, model=str(bare), memory_gib=8)

    out = capsys.readouterr().out
    assert f"lora · {bare} · Qwen-VL v1" in out.replace("\n", "")
    for part in ("weights: decoder layers", "weights: adapter", "optimizer", "gradients"):
        assert part in out
    assert "with 1 x 8,192 tokens (8,168 learned) and 4 pictures" in out
    assert "the GPU has 8.0: it fits" in out.replace("\n", " ")
    assert "time: it is measured, on a GPU, and there is none here" in out


def test_the_figures_of_the_json_add_up(bare: Path, capsys):
    estimate_run(None, model=str(bare), memory_gib=1, as_json=True)

    found = json.loads(capsys.readouterr().out)
    assert sum(found["parts"].values()) == found["allocated_bytes"]
    assert found["needed_bytes"] == found["allocated_bytes"] + CONTEXT_BYTES
    assert found["batch"] == {
        "rows": 1,
        "row_tokens": 8192,
        "learned_tokens": 8168,
        "pictures": 4,
    }
    assert (found["method"], found["dtype"], found["gpu_bytes"]) == ("lora", "bf16", 2**30)
    assert found["fits"] is True
    assert found["seconds_per_epoch"] is None


def test_the_batch_is_the_largest_that_the_data_has(bare: Path, data: Path, capsys):
    estimate_run(
        None,
        model=str(bare),
        data=[data],
        overrides=["trainer.per_device_train_batch_size=3", "data.packing=false"],
        as_json=True,
    )

    batch = json.loads(capsys.readouterr().out)["batch"]
    assert (batch["rows"], batch["pictures"]) == (3, 6)  # one record has two pictures
    assert batch["row_tokens"] < 2048


STEPS = ("data.packing=true", "batch.samples=12", "data.max_length=2000")


def test_a_step_of_packed_samples_is_taken_to_fill_the_rows_that_a_gpu_has(bare: Path, capsys):
    estimate_run(None, model=str(bare), overrides=STEPS, as_json=True)

    batch = json.loads(capsys.readouterr().out)["batch"]
    # 4 samples of 2,000 tokens fit 8,192; each has a picture of 4 tokens and two marks.
    assert batch == {"rows": 1, "row_tokens": 8_000, "learned_tokens": 7_976, "pictures": 4}


def test_the_row_of_a_step_is_as_long_as_its_samples(bare: Path, data: Path, capsys):
    estimate_run(None, model=str(bare), data=[data], overrides=STEPS, as_json=True)

    batch = json.loads(capsys.readouterr().out)["batch"]
    assert batch["row_tokens"] == 482, "all four samples"
    assert batch["pictures"] == 5


@pytest.mark.parametrize(("gib", "said"), [(80, "no layer"), (0.5, "every layer")])
def test_memory_auto_recomputes_what_the_gpu_asks_for(bare: Path, capsys, gib, said):
    estimate_run(None, model=str(bare), overrides=["memory=auto"], memory_gib=gib)

    assert f"recomputed on the way back: {said} (memory: auto)" in capsys.readouterr().out


def test_streamed_samples_are_taken_to_be_as_long_as_they_may_be(bare: Path, data: Path, capsys):
    estimate_run(
        None,
        model=str(bare),
        data=[data],
        overrides=["data.streaming=true", "trainer.max_steps=5"],
        as_json=True,
    )

    batch = json.loads(capsys.readouterr().out)["batch"]
    assert (batch["row_tokens"], batch["learned_tokens"], batch["pictures"]) == (2048, 2042, 1)


def test_the_recipes_method_holds_and_needs_no_output(tmp_path: Path, bare: Path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"method: full\nmodel: {bare}\n")

    estimate_run(file, as_json=True)

    assert json.loads(capsys.readouterr().out)["method"] == "full"
    with pytest.raises(VltrainError, match="the recipe is for `vltrain full`"):
        estimate_run(file, method="lora")


def test_a_recipe_without_a_model_is_refused():
    with pytest.raises(VltrainError, match="no `model`"):
        estimate_run(None)


def test_pictures_that_leave_no_room_are_refused(bare: Path):
    with pytest.raises(VltrainError, match="400 take 2400 tokens, and a sample has 2048"):
        estimate_run(None, model=str(bare), pictures=400)


def test_a_draft_keeps_what_is_given(data: Path, tmp_path: Path):
    recipe = draft(
        None,
        method="full",
        model="m",
        data=[data],
        overrides=[f"output={tmp_path}", "data.max_length=7"],
    )

    assert (recipe.method, recipe.data.files, recipe.output) == ("full", (data,), tmp_path)
    assert recipe.data.max_length == 7


def test_q_lora_counts_packed_layers_and_moments_that_are_paged(bare: Path, capsys):
    estimate_run(None, method="qlora", model=str(bare), overrides=["lora.r=4"], as_json=True)

    found = json.loads(capsys.readouterr().out)
    # Of two layers: five matrices, packed; a bias of 384 and two norms; and the last norm.
    packed = 2 * (128 * 384 + 4 * 128 * 128)
    assert found["parts"]["weights: decoder layers"] == packed * 33 // 64 + 2 * (2 * 640 + 128)
    # c_attn, attn.c_proj, w1 and w2 of two layers, at rank 4.
    adapter = 2 * 4 * (128 + 384 + 3 * (128 + 128))
    assert found["parts"]["weights: adapter"] == 4 * adapter
    assert found["parts"]["optimizer"] == 0
    assert found["host_bytes"] == 2 * (adapter + adapter * 4 // 256)


def test_full_weights_in_bf16_halve_weights_and_gradients(bare: Path, capsys):
    found = []
    for weights in ("fp32", "residual"):
        settings = [f"full.weights={weights}"]
        estimate_run(None, method="full", model=str(bare), overrides=settings, as_json=True)
        found.append(json.loads(capsys.readouterr().out)["parts"])

    wide, narrow = found
    assert narrow["gradients"] * 2 == wide["gradients"]
    assert narrow["weights: head"] * 2 == wide["weights: head"]
    assert narrow["optimizer"] * 2 < wide["optimizer"] * 1.02  # 2 bytes, two of 1 and their scales


def test_what_a_full_run_decides_by_the_gpus_size_is_said(bare: Path, capsys):
    estimate_run(None, method="full", model=str(bare), memory_gib=1)  # too small for fp32

    out = capsys.readouterr().out.replace("\n", " ")
    assert "(full.weights: stochastic)" in out
    assert "GPUs:" not in out  # one process shares nothing out


def test_several_gpus_share_the_model_as_the_recipe_says(bare: Path, capsys):
    found = {}
    for engine in ("ddp", "fsdp2"):
        settings = [f"engine={engine}"]
        estimate_run(None, method="full", model=str(bare), overrides=settings, gpus=4, memory_gib=8)
        found[engine] = capsys.readouterr().out

    assert "GPUs: 4, each as said, under ddp: the recipe asks for it" in found["ddp"]
    assert "GPUs: 4, each as said, under fsdp2" in found["fsdp2"]


def test_an_engine_that_cannot_share_what_there_is_is_refused(bare: Path):
    with pytest.raises(VltrainError, match="those of 4 bits cannot be"):
        estimate_run(
            None,
            method="qlora",
            model=str(bare),
            overrides=["deepspeed=zero3"],
            gpus=2,
            memory_gib=8,
        )


def test_the_choice_of_an_engine_needs_the_gpus_size(bare: Path):
    with pytest.raises(VltrainError, match="--memory-gib 80"):
        estimate_run(None, model=str(bare), gpus=8)


def test_deepspeeds_settings_say_what_is_offloaded():
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1000}
    engine = Engine("deepspeed", "", config={"zero_optimization": zero})

    assert sharing_of(engine, 4) == Sharing("deepspeed", 2, 4, True, False, 1000)
    assert sharing_of(NO_ENGINE, 1) == Sharing()


def test_deepspeeds_defaults_count_where_its_settings_say_nothing():
    zero3, zero2 = (
        Engine("deepspeed", "", config={"zero_optimization": {"stage": stage}}) for stage in (3, 2)
    )
    found = sharing_of(zero3, 2)
    assert (found.bucket, found.ahead, found.most_ahead) == (5 * 10**8, 5 * 10**7, 10**9)
    assert (sharing_of(zero2, 2).bucket, sharing_of(zero2, 2).ahead) == (5 * 10**8, 0)

    written = {"stage": 3, "reduce_bucket_size": 2e8, "stage3_prefetch_bucket_size": "auto"}
    found = sharing_of(Engine("deepspeed", "", config={"zero_optimization": written}), 2)
    assert (found.bucket, found.ahead) == (2 * 10**8, 0)


def test_padded_rows_are_as_long_as_the_longest_sample():
    batch = padded_batch([10, 30, 20], [5, 1, 7], [0, 1, 2], 4)

    assert batch == BatchSizes(rows=4, row_tokens=30, learned_tokens=28, pictures=8)


def test_packed_rows_have_the_pictures_of_all_their_samples():
    batch = packed_batch([(0, 2), (1,)], [5, 9, 7], [1, 1, 2], row_tokens=40, rows=2)

    assert batch == BatchSizes(rows=2, row_tokens=40, learned_tokens=24, pictures=6)


class Held(TrainerCallback):
    """Bytes of weights, gradients and optimizer's states, before gradients are dropped."""

    def on_optimizer_step(self, *_, model: torch.nn.Module, optimizer, **__) -> None:
        parameters = list(model.parameters())
        self.weights = sum(p.numel() * p.element_size() for p in parameters)
        self.gradients = sum(
            p.grad.numel() * p.grad.element_size() for p in parameters if p.grad is not None
        )
        states = [v for state in optimizer.state.values() for v in state.values()]
        self.states = sum(v.numel() * v.element_size() for v in states if v.numel() > 1)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [("full", ()), ("lora", ("lora.r=4",)), ("lora", ("lora.r=4", "lora.embeddings=true"))],
    ids=["full", "lora", "lora and embeddings"],
)
def test_weights_gradients_and_states_are_those_that_torch_allocates(
    base: Path, data: Path, tmp_path: Path, method: Method, settings: tuple[str, ...], dtype: str
):
    recipe = a_recipe(base, data, tmp_path, f"dtype={dtype}", *settings, method=method)
    recipe = settled(recipe, NO_ENGINE)
    arguments, read = training_arguments(recipe), read_base(recipe.model)
    halves = read_halves(NO_CONSOLE, recipe, read, arguments)
    memory = memory_of(recipe, read, arguments, NO_ENGINE, halves, gpu_bytes=None)[1].estimate
    held = Held()
    model = prepare_model(recipe, read.family, read.folder, device=arguments.device, seed=0)
    hold_weights(model, recipe, gpu_bytes=None)
    Trainer(
        model=model,
        args=arguments,
        train_dataset=halves.train,
        data_collator=Collator(read.processor.pad_id),
        callbacks=[held],
    ).train()

    assert held.weights == sum(memory.weights.values())
    assert held.gradients == memory.moments[-1].gradients
    assert held.states == memory.optimizer


def test_what_other_programs_hold_is_left_to_them(base: Path, data: Path, tmp_path: Path):
    recipe = a_recipe(base, data, tmp_path / "run", "dtype=bf16", "compile=false")
    recipe, whole = settled(recipe, NO_ENGINE, on_gpu=True), 2**34
    read, arguments = read_base(recipe.model), training_arguments(recipe)
    halves = read_halves(NO_CONSOLE, recipe, read, arguments)

    def run(taken: int) -> RunMemory:
        given = (recipe, read, arguments, NO_ENGINE, halves)
        return memory_of(*given, gpu_bytes=whole, taken=taken)[1]

    alone = run(0)
    crowded = run(whole - alone.estimate.comfortable + 1)

    assert alone.decisions == ("recomputed on the way back: no layer (memory: auto)",)
    assert crowded.work.compute.checkpointing
    assert crowded.estimate.comfortable < alone.estimate.comfortable


def test_a_run_that_cannot_fit_is_refused_before_its_weights_are_read(
    bare: Path, data: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(vltrain.workflows.guard, "gpu_memory", lambda: WORKSPACE_BYTES)
    console = Console(file=io.StringIO(), width=300)
    settings = ("trainer.gradient_checkpointing=false", "trainer.per_device_train_batch_size=2")

    with pytest.raises(VltrainError) as error:
        train(a_recipe(bare, data, tmp_path / "run", *settings), console)

    assert "the GPU has 0.1: it does not fit" in console.file.getvalue()
    message = str(error.value)
    assert message.startswith("memory: the run needs about 0.8 GiB of GPU memory, and the GPU")
    fixes = ("gradient_checkpointing: true", "batch_size: 1", "lora.r: 32", "memory_check: false")
    places = [message.index(fix) for fix in fixes]
    assert places == sorted(places)


def test_a_run_that_may_fit_shows_its_memory_and_goes_on(
    base: Path, data: Path, tmp_path: Path, monkeypatch
):
    for size, settings in ((2**34, ()), (WORKSPACE_BYTES, ("memory_check=false",))):
        monkeypatch.setattr(vltrain.workflows.guard, "gpu_memory", lambda size=size: size)
        console = Console(file=io.StringIO(), width=300)

        train(a_recipe(base, data, tmp_path / str(size), *settings), console)

        shown = console.file.getvalue()
        assert shown.index("GPU memory, estimated") < shown.index("learned") < shown.index("done")


def test_without_a_gpu_a_run_shows_no_memory(base: Path, data: Path, tmp_path: Path):
    console = Console(file=io.StringIO(), width=300)

    train(a_recipe(base, data, tmp_path / "run"), console)

    assert "GPU memory" not in console.file.getvalue()


def test_steps_are_measured_and_leave_nothing_behind(base: Path, data: Path, tmp_path: Path):
    recipe = a_recipe(base, data, tmp_path / "run", "dtype=fp32", "data.max_length=300")
    recipe = replace(recipe, trainer=recipe.trainer | {"num_train_epochs": 9})
    read = read_base(recipe.model)
    halves = read_halves(NO_CONSOLE, recipe, read, training_arguments(recipe))

    epoch = probe_epoch(recipe, read, halves)

    assert epoch.steps == epoch_steps(recipe, halves) == 1  # 4 samples, 8 to a step
    assert epoch.seconds == epoch.seconds_per_step > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("gpu_bytes", "gpus", "expected"), [(2**34, 1, True), (2**34, 2, False), (2**20, 1, False)]
)
def test_only_a_run_that_fits_the_one_gpu_is_probed(
    base: Path, data: Path, tmp_path: Path, monkeypatch, gpu_bytes: int, gpus: int, expected: bool
):
    recipe = settled(a_recipe(base, data, tmp_path / "run", "dtype=fp32"), NO_ENGINE)
    read, arguments = read_base(recipe.model), training_arguments(recipe)
    halves = read_halves(NO_CONSOLE, recipe, read, arguments)
    _, run = memory_of(recipe, read, arguments, NO_ENGINE, halves, gpu_bytes=None)

    assert not can_be_probed(run, halves, 1)  # without a GPU
    monkeypatch.setattr(vltrain.workflows.estimate, "gpu_memory", lambda: gpu_bytes)
    assert can_be_probed(run, halves, gpus) is expected
