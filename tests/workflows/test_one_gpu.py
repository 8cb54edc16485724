"""What only a GPU can show of a run: 4-bit bases, measured epochs, memory that is at an end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import metrics, quick, run, weights
from tiny import write_gptq, write_qwen_vl

from vltrain.workflows.estimate import estimate_run

pytestmark = pytest.mark.gpu

PLAIN = ("compile=false", "memory=null", "data.packing=false")
LONGER = ("trainer.max_steps=20", "trainer.warmup_steps=0", "lora.r=8")


def command(
    base: Path, data: Path, folder: Path, *settings: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`vltrain lora` in a process of its own, with variables of the environment."""
    words = ["lora", "--model", base, "--data", data, "--output", folder / "run"]
    words += [word for setting in settings for word in ("--set", setting)]
    return subprocess.run(
        [sys.executable, "-m", "vltrain", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("kind", ["nf4", "gptq"])
def test_a_quantized_base_learns_and_every_adapter_moves(kind, data, tmp_path):
    if kind == "gptq":
        pytest.importorskip("gptqmodel")
    base = tmp_path / "base"
    (write_qwen_vl if kind == "nf4" else write_gptq)(base)

    run(quick(base, data, tmp_path / "run", *LONGER, method="qlora"))

    losses = [loss for _, loss in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.3
    learned = {k: v for k, v in weights(tmp_path / "run" / "final").items() if "lora_B" in k}
    assert learned  # they begin as zeros
    assert all(tensor.any() for tensor in learned.values())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_packed_base_learns_in_both_16_bit_dtypes(dtype, data, tmp_path):
    pytest.importorskip("gptqmodel")
    write_gptq(tmp_path / "base")

    settings = (*LONGER, f"dtype={dtype}")
    run(quick(tmp_path / "base", data, tmp_path / "run", *settings, method="qlora"))

    losses = [loss for _, loss in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("compiled", ["true", "false"])
def test_a_base_in_fp8_loses_what_one_in_bf16_loses(compiled, data, tmp_path):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not multiply fp8")
    base = write_qwen_vl(tmp_path / "base")
    settings = (*LONGER, "lora.dropout=0", f"compile={compiled}", "memory=fast")

    run(quick(base, data, tmp_path / "bf16", *settings))
    run(quick(base, data, tmp_path / "fp8", *settings, "lora.base=fp8"))

    wide, narrow = ([loss for _, loss in metrics(tmp_path / name)] for name in ("bf16", "fp8"))
    assert narrow == pytest.approx(wide, rel=0.02)
    assert narrow[-1] < narrow[0] - 0.3


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", ()),
        ("lora", ("lora.weights=bf16",)),
        ("lora", ("lora.embeddings=true",)),
        ("lora", ("lora.dora=true",)),
        ("lora", ("freeze.vision=false", "freeze.projector=false")),
        ("lora", ("memory=lean",)),
        ("qlora", ()),
        ("full", ()),
        ("full", ("full.weights=residual",)),
    ],
    ids=str,
)
def test_by_itself_a_run_takes_the_fast_way_and_loses_what_a_plain_one_does(
    method, settings, data, tmp_path
):
    base = write_qwen_vl(tmp_path / "base")
    settings = (*settings, "trainer.learning_rate=1e-3", "trainer.warmup_steps=0")
    settings += () if method == "full" else ("lora.dropout=0",)

    fast = quick(base, data, tmp_path / "fast", *settings, method=method)
    shown = run(fast)
    plain = [word for word in PLAIN if word.partition("=")[0] not in " ".join(settings)]
    run(quick(base, data, tmp_path / "plain", *settings, *plain, method=method))

    assert "the 2 samples of each step are packed into rows" in shown
    compiles = method != "qlora" and "lora.dora=true" not in settings
    assert ("layers are compiled" in shown) is compiles
    ours, theirs = ([loss for _, loss in metrics(tmp_path / name)] for name in ("fast", "plain"))
    assert ours == pytest.approx(theirs, rel=0.02)
    assert ours[-1] < ours[0]


def test_where_nothing_can_be_compiled_a_run_says_so_and_goes_on(data, tmp_path):
    base = write_qwen_vl(tmp_path / "base")
    caches = {f"{name}_CACHE_DIR": str(tmp_path / name) for name in ("TRITON", "TORCHINDUCTOR")}
    settings = ("trainer.max_steps=2", "lora.r=4")

    done = command(base, data, tmp_path, *settings, CC="/bin/false", CXX="/bin/false", **caches)

    assert done.returncode == 0, done.stderr[-3000:]
    assert "layers are not compiled, for nothing can be on this machine" in done.stderr
    assert "layers are compiled" not in done.stdout
    assert len(metrics(tmp_path / "run")) == 2


def test_on_the_fast_way_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(data, tmp_path):
    base, out = write_qwen_vl(tmp_path / "base"), tmp_path / "run"
    recipe = quick(base, data, out, "trainer.save_steps=3", "trainer.learning_rate=1e-3")
    run(recipe)
    whole, made = metrics(out), weights(out / "final")

    for folder in ("final", "checkpoint-6"):
        shutil.rmtree(out / folder)
    assert "resuming from" in run(recipe)

    assert metrics(out) == whole
    assert all(torch.equal(tensor, made[name]) for name, tensor in weights(out / "final").items())


def test_memory_that_runs_out_ends_a_run_with_its_own_code_and_what_to_change(data, tmp_path):
    base = write_qwen_vl(tmp_path / "base")
    fraction = 48 * 2**20 / torch.cuda.get_device_properties(0).total_memory
    settings = ("trainer.per_device_train_batch_size=256", "data.packing=false")
    limit = f"per_process_memory_fraction:{fraction}"

    done = command(base, data, tmp_path, *settings, PYTORCH_CUDA_ALLOC_CONF=limit)

    assert done.returncode == 3, done.stderr[-3000:]
    assert "error: " in done.stderr
    assert "fix: " in done.stderr
    assert "trainer.per_device_train_batch_size" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_an_estimate_measures_the_time_of_an_epoch(method, data, tmp_path, capsys):
    base = write_qwen_vl(tmp_path / "base")
    settings = ("trainer.gradient_accumulation_steps=1", "trainer.per_device_train_batch_size=1")

    estimate_run(
        None, method=method, model=str(base), data=[data], overrides=settings, as_json=True
    )

    told = json.loads(capsys.readouterr().out)
    assert told["fits"]
    assert told["steps_per_epoch"] == 4
    assert 0 < told["seconds_per_step"] < 30
    assert told["seconds_per_epoch"] == pytest.approx(4 * told["seconds_per_step"])
