"""Q-LoRA from a recipe to its end: from a plain base, from a packed one, and what is refused."""

import io
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from runs import metrics, quick, refused, run, weights
from tiny import write_conversations, write_gptq, write_qwen_vl

from vltrain.models import load_model
from vltrain.training.arguments import training_arguments
from vltrain.workflows.merge import merge

LONGER = ("trainer.max_steps=20", "trainer.warmup_steps=0", "lora.r=8")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("qlora") / "base")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qlora") / "packed"
    write_gptq(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("vision", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_a_base_in_nf4_learns_and_its_adapter_merges_into_the_plain_base(
    base, data, tmp_path, vision
):
    shown = run(
        quick(base, data, tmp_path / "run", *LONGER, f"quantize.vision={vision}", method="qlora")
    )

    losses = [loss for _, loss in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.3
    kept = "kept as it is" if vision == "false" else "quantized too"
    assert f"4-bit layers: NF4, the vision tower {kept}" in shown
    merge(tmp_path / "run" / "final", tmp_path / "merged", console=Console(file=io.StringIO()))
    before, after = weights(base), weights(tmp_path / "merged")
    assert before.keys() == after.keys()
    assert not torch.equal(
        before["transformer.h.0.attn.c_attn.weight"], after["transformer.h.0.attn.c_attn.weight"]
    )


@pytest.mark.slow
def test_a_packed_base_learns_and_its_adapter_stands_beside_it_again(packed, data, tmp_path):
    shown = run(quick(packed, data, tmp_path / "run", *LONGER, method="qlora"))

    losses = [loss for _, loss in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.3
    assert "4-bit layers: packed by GPTQ, as published" in shown
    ids = torch.tensor([[*b"What?"]])
    adapted = PeftModel.from_pretrained(load_model(packed), str(tmp_path / "run" / "final"))
    with adapted.disable_adapter():
        plain = adapted(input_ids=ids).logits
    assert not torch.equal(adapted(input_ids=ids).logits, plain)


@pytest.mark.slow
def test_a_quantized_run_that_was_cut_off_goes_on_as_if_it_had_not_been(base, data, tmp_path):
    saved = ("trainer.save_steps=3", "trainer.max_steps=6")
    recipe = quick(base, data, tmp_path / "run", *saved, method="qlora")
    run(recipe)
    whole, final = metrics(tmp_path / "run"), weights(tmp_path / "run" / "final")
    for name in ("final", "checkpoint-6"):
        (tmp_path / "run" / name).rename(tmp_path / name)

    shown = run(recipe)

    assert "resuming from" in shown
    assert metrics(tmp_path / "run") == whole
    again = weights(tmp_path / "run" / "final")
    assert all(torch.equal(again[name], tensor) for name, tensor in final.items())


def test_moments_of_a_quantized_run_have_8_bits(base, data, tmp_path):
    recipe = quick(base, data, tmp_path / "run", method="qlora")

    paged = "paged_" if torch.cuda.is_available() else ""
    assert training_arguments(recipe).optim == f"{paged}adamw_8bit"
    other = quick(base, data, tmp_path / "run", "trainer.optim=adamw_torch", method="qlora")
    assert training_arguments(other).optim == "adamw_torch"


def test_embeddings_learn_beside_4_bits_only_where_a_recipe_says_so(data, tmp_path):
    base = write_qwen_vl(tmp_path / "base", chat_tuned=False)
    short = ("trainer.max_steps=1",)

    shown = run(quick(base, data, tmp_path / "auto", *short, method="qlora"))
    run(quick(base, data, tmp_path / "asked", *short, "lora.embeddings=true", method="qlora"))

    assert "transformer.wte, lm_head stay as they are" in shown
    assert not any("wte" in name for name in weights(tmp_path / "auto" / "final"))
    assert (
        sum("wte" in name or "lm_head" in name for name in weights(tmp_path / "asked" / "final"))
        == 2
    )


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_packed_base_is_refused_by_the_other_methods(packed, data, tmp_path, method):
    told = refused(quick(packed, data, tmp_path / "run", method=method))

    assert f"is packed to 4 bits, which `vltrain {method}` does not train" in told
    assert "vltrain qlora" in told


@pytest.mark.parametrize("override", ["quantize.vision=true", "lora.dora=true"])
def test_what_a_packed_base_cannot_have_is_refused_before_it_is_read(
    packed, data, tmp_path, override
):
    told = refused(quick(packed, data, tmp_path / "run", override, method="qlora"))

    assert override.partition("=")[0] in told
    assert "bf16 checkpoint" in told


def test_the_recipe_of_a_quantized_run_says_what_was_quantized(base, data, tmp_path):
    run(quick(base, data, tmp_path / "run", "trainer.max_steps=1", method="qlora"))

    text = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "method: qlora" in text
    assert "quantize:\n  vision: false\n" in text
    origin = json.loads((tmp_path / "run" / "final" / "vltrain.json").read_text())
    assert origin["base"]["path"] == str(base)
    assert origin["base"]["nf4"] == {"vision": False}
