"""Which engine a run gets, why, and how it is told from another."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from vltrain.errors import VltrainError
from vltrain.training import engines
from vltrain.training.engines import (
    CONFIGS,
    Engine,
    Load,
    Machine,
    bytes_per_gpu,
    choose_engine,
    read_deepspeed,
    refuse_other_engine,
)

GIB = 2**30
LAYERS = ("DecoderLayer", "VisionBlock")
ADAPTER = Load(learned=110_000_000, frozen=9_657_000_000, weight_bytes=2)
WHOLE = Load(learned=7_797_000_000, frozen=1_860_000_000, weight_bytes=2)


def chosen(
    choice: str = "auto",
    deepspeed: str | None = None,
    *,
    processes: int = 2,
    grouped: bool = True,
    gib: int | None = None,
    load: Load = ADAPTER,
) -> Engine:
    machine = Machine(processes, grouped, None if gib is None else gib * GIB)
    return choose_engine(choice, deepspeed, machine, lambda: load, LAYERS)


def fault_of(*arguments: str, **machine: object) -> str:
    with pytest.raises(VltrainError) as error:
        chosen(*arguments, **machine)
    return str(error.value)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_every_file_of_ds_configs_is_found_by_its_name(name):
    engine = chosen("deepspeed", name)

    assert (engine.name, engine.zero_stage) == ("deepspeed", int(name[4]))
    offloaded = "offload_optimizer" in engine.config["zero_optimization"]
    assert offloaded == name.endswith("_offload")


def test_ds_configs_hold_nothing_but_these_files():
    root = Path(__file__).parents[2] / "ds_configs"

    names = {"zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"}
    assert {file.stem for file in root.iterdir()} == names
    assert CONFIGS.samefile(root)


def test_what_the_trainer_knows_is_left_to_it_in_every_file():
    for file in CONFIGS.iterdir():
        config = json.loads(file.read_text())
        for key in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"):
            assert config[key] == "auto"
        assert config["bf16"] == config["fp16"] == {"enabled": "auto"}


def test_a_file_of_the_users_own_is_read_by_its_path(tmp_path):
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 1}}')

    assert chosen("auto", str(tmp_path / "mine.json")).zero_stage == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is neither a file nor one of zero1, zero2, zero2_offload, zero3, zero3_offload"),
        ("{", "not valid JSON"),
        ("[]", "holds no JSON object"),
    ],
)
def test_a_file_that_is_none_of_deepspeeds_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "mine.json").write_text(text)

    with pytest.raises(VltrainError, match=message):
        read_deepspeed(str(tmp_path / "mine.json"))


@pytest.mark.parametrize("choice", ["auto", "ddp"])
def test_one_process_needs_no_engine(choice):
    assert chosen(choice, processes=1, grouped=False).name == "none"


def test_one_process_of_torchruns_is_a_group_of_one():
    assert chosen("auto", processes=1, grouped=True).name == "ddp"


@pytest.mark.parametrize("choice", ["auto", "ddp"])
def test_one_process_of_torchruns_on_a_gpu_needs_no_engine(choice):
    assert chosen(choice, processes=1, gib=80).name == "none"


def test_several_processes_on_cpus_run_ddp():
    engine = chosen()

    assert (engine.name, engine.reason) == ("ddp", "on CPUs the model is held whole")


@pytest.mark.parametrize(
    ("load", "processes", "gib", "expected"),
    [
        (ADAPTER, 2, 80, "ddp"),  # 18.0 GiB of weights and 1.6 of what learns
        (ADAPTER, 2, 24, "deepspeed (ZeRO-2)"),  # 19.0 GiB leave a fifth of 24, 19.6 do not
        (ADAPTER, 2, 16, "deepspeed (ZeRO-3)"),  # 9.8
        (WHOLE, 8, 80, "deepspeed (ZeRO-2)"),  # 3.5 + 14.5 + 12.7
        (WHOLE, 2, 80, "deepspeed (ZeRO-3)"),  # 59.8
        (WHOLE, 2, 40, "zero3_offload"),
    ],
)
def test_auto_shares_out_no_more_than_it_must(load, processes, gib, expected):
    engine = chosen(processes=processes, gib=gib, load=load)

    if expected == "zero3_offload":
        assert engine.config["zero_optimization"]["offload_param"]["device"] == "cpu"
    else:
        assert str(engine) == expected


def test_auto_says_how_much_memory_decided():
    fits, does_not = chosen(gib=80), chosen(gib=24)

    assert fits.reason == "it takes about 19.6 GiB of a GPU's 80 GiB"
    assert does_not.reason == "ddp would take about 19.6 GiB of a GPU's 24 GiB"


def test_auto_takes_fsdp2_where_deepspeed_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    engine = chosen(gib=24)

    assert (engine.name, engine.layers) == ("fsdp2", LAYERS)
    assert engine.reason.endswith("and DeepSpeed is not installed")


def test_deepspeed_without_a_stage_takes_the_lowest_that_fits():
    assert chosen("deepspeed", gib=80).zero_stage == 2
    assert chosen("deepspeed", gib=16).zero_stage == 3
    assert chosen("deepspeed").zero_stage == 2


def test_bytes_of_a_gpu_are_counted_by_hand():
    # 10 learned and 100 frozen weights of 2 bytes, on 2 GPUs
    assert bytes_per_gpu(Load(learned=10, frozen=100, weight_bytes=2), 2) == {
        "ddp": 200 + 160,
        "zero2": 200 + 20 + 70,
        "zero3": (200 + 160) / 2,
    }


def test_fsdp2_on_a_cpu_is_refused_with_the_reason():
    assert "accelerate would quietly run DDP in its place" in fault_of("fsdp2")


@pytest.mark.parametrize(("choice", "gib"), [("deepspeed", None), ("fsdp2", 80)])
def test_a_sharing_engine_needs_processes_that_know_of_each_other(choice, gib):
    assert "torchrun has started" in fault_of(choice, processes=1, grouped=False, gib=gib)


def test_deepspeed_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(engines, "deepspeed_is_there", lambda: False)

    assert "DeepSpeed is not installed" in fault_of("deepspeed")


@pytest.mark.parametrize(
    ("engine", "shards"),
    [
        (Engine("ddp", ""), False),
        (Engine("deepspeed", "", {"zero_optimization": {"stage": 2}}), False),
        (Engine("deepspeed", "", {"zero_optimization": {"stage": 3}}), True),
        (Engine("fsdp2", ""), True),
    ],
)
def test_zero3_and_fsdp2_share_weights_out(engine, shards):
    assert engine.shards_weights is shards


def test_a_model_that_no_engine_has_wrapped_is_told():
    model = nn.Linear(2, 2)

    refuse_other_engine(model, Engine("none", "one process"))
    with pytest.raises(VltrainError, match="ddp was chosen, and the model runs under none"):
        refuse_other_engine(model, Engine("ddp", "asked for"))


def test_between_layers_of_fsdp2_nothing_is_rounded():
    policy = engines.fsdp2_precision(torch.bfloat16)

    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert policy.output_dtype is None
    assert policy.cast_forward_inputs is False


@pytest.mark.parametrize(
    ("said", "compiled", "found"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"memory_efficient_linear": True}, True, True),
        ({"memory_efficient_linear": False}, False, False),
    ],
)
def test_compiled_linear_layers_stay_torchs_own_under_zero3_unless_a_file_says_otherwise(
    said, compiled, found
):
    engine = Engine("deepspeed", "", {"zero_optimization": {"stage": 3, **said}})

    settings = engines.engine_settings(engine, compiled=compiled)["deepspeed"]
    assert settings["zero_optimization"]["memory_efficient_linear"] is found
    assert engine.wraps_linear(compiled=compiled) is found
    assert not Engine("fsdp2", "").wraps_linear(compiled=False)
