"""Merging: what is written, that it equals base + adapter, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import write_qwen_vl

import vltrain.models.saving
from vltrain.config import FreezeConfig
from vltrain.errors import VltrainError
from vltrain.models import load_model, load_processor
from vltrain.models.adapters import Adapter, add_lora
from vltrain.models.catalog import QWEN_VL
from vltrain.models.fingerprint import weights_hash
from vltrain.models.saving import Origin, save_adapter
from vltrain.workflows.merge import compare, merge, whole_folder

ATTENTION = "transformer.h.0.attn.c_attn.weight"


@pytest.fixture
def base(tmp_path):
    return write_qwen_vl(tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path):
    return write_adapter(base, tmp_path / "run" / "final")


def write_adapter(base: Path, out: Path, *, scale: float = 0.1, **options) -> Path:
    """An adapter whose second matrices, and whole modules beside them, are moved at random."""
    freeze = FreezeConfig(projector=options.pop("projector", None))
    model = add_lora(load_model(base), QWEN_VL, freeze, Adapter(r=4, alpha=8, **options), seed=1)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data += scale * torch.randn_like(parameter)
    out.mkdir(parents=True)
    save_adapter(model, Origin(str(base), base, None, weights_hash(base)), out)
    return out


def in_dtype(folder: Path, dtype: torch.dtype) -> Path:
    """The same checkpoint with its weights and its config in another dtype."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def change_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[ATTENTION] = tensors[ATTENTION] + 0.1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_merged_weights_are_those_of_base_plus_low_rank_product(base, adapter, tmp_path):
    merge(adapter, tmp_path / "merged")

    learned = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model." + ATTENTION.removesuffix("weight")
    low, high = learned[prefix + "lora_A.weight"], learned[prefix + "lora_B.weight"]
    expected = weights(base)[ATTENTION] + 8 / 4 * high @ low
    assert torch.allclose(weights(tmp_path / "merged")[ATTENTION], expected, atol=1e-6)


def test_names_are_the_published_ones_and_what_did_not_learn_is_untouched(base, adapter, tmp_path):
    merge(adapter, tmp_path / "merged")

    before, after = weights(base), weights(tmp_path / "merged")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    parts = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.w1.weight", "mlp.w2.weight")
    assert moved == {f"transformer.h.{layer}.{part}" for layer in (0, 1) for part in parts}


def test_every_file_of_the_base_comes_along(base, adapter, tmp_path):
    (base / "modeling_qwen.py").write_text("# the original's code")

    merge(adapter, tmp_path / "merged")

    for name in ("qwen.tiktoken", "tokenizer_config.json", "config.json", "modeling_qwen.py"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert load_processor(tmp_path / "merged").pad_id == 256


def test_modules_that_learned_whole_are_merged_too(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "final", projector=False, embeddings=True)

    merge(adapter, tmp_path / "merged")

    learned = load_file(adapter / "adapter_model.safetensors")
    after = weights(tmp_path / "merged")
    for name in ("transformer.wte.weight", "lm_head.weight", "transformer.visual.attn_pool.query"):
        assert torch.equal(after[name], learned[f"base_model.model.{name}"])
        assert not torch.equal(after[name], weights(base)[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_stays_in_its_dtype(tmp_path, dtype):
    base = in_dtype(write_qwen_vl(tmp_path / "base"), dtype)
    adapter = write_adapter(base, tmp_path / "final")

    merge(adapter, tmp_path / "merged")

    after = weights(tmp_path / "merged")
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    wide = load_model(base, dtype=torch.float32)
    exact = PeftModel.from_pretrained(wide, str(adapter)).merge_and_unload().state_dict()
    step = 2**-8 if dtype is torch.bfloat16 else 2**-11  # of rounding once
    assert torch.allclose(after[ATTENTION].float(), exact[ATTENTION], rtol=step, atol=1e-7)


def test_a_base_in_bin_shards_becomes_safetensors_shards(base, tmp_path, monkeypatch):
    tensors = load_file(base / "model.safetensors")
    torch.save(tensors, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    adapter = write_adapter(base, tmp_path / "final")
    monkeypatch.setattr(vltrain.models.saving, "MAX_SHARD", "500KB")

    merge(adapter, tmp_path / "merged")

    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert len(set(index["weight_map"].values())) > 1
    assert not list((tmp_path / "merged").glob("*.bin"))
    assert weights(tmp_path / "merged").keys() == tensors.keys()


def test_a_checkpoint_of_a_run_is_merged_by_what_the_run_says_of_its_base(base, adapter, tmp_path):
    checkpoint = adapter.parent / "checkpoint-3"
    adapter.rename(checkpoint)
    origin = (checkpoint / "vltrain.json").read_text()
    (checkpoint / "vltrain.json").unlink()
    (adapter.parent / "environment.json").write_text(origin)

    merge(checkpoint, tmp_path / "merged")

    assert weights(tmp_path / "merged").keys() == weights(base).keys()


def test_a_base_that_has_moved_is_named(base, adapter, tmp_path):
    moved = base.rename(tmp_path / "elsewhere")
    with pytest.raises(VltrainError, match=r"its base is not in .*base any more"):
        merge(adapter, tmp_path / "merged")

    merge(adapter, tmp_path / "merged", base=str(moved))

    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_another_base_is_refused(base, adapter, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    change_a_weight(other)

    with pytest.raises(VltrainError, match=r"not those that .* was trained on"):
        merge(adapter, tmp_path / "merged", base=str(other))

    assert not (tmp_path / "merged").exists()


def test_a_base_that_was_changed_in_its_place_is_refused(base, adapter, tmp_path):
    change_a_weight(base)

    with pytest.raises(VltrainError, match=r"not those that .* was trained on"):
        merge(adapter, tmp_path / "merged")


def test_a_folder_that_exists_is_never_written_to(adapter, tmp_path):
    (tmp_path / "merged").mkdir()

    with pytest.raises(VltrainError, match="exists already"):
        merge(adapter, tmp_path / "merged")


def test_a_folder_that_is_no_adapter_is_refused(base, tmp_path):
    with pytest.raises(VltrainError, match=r"no adapter_config\.json"):
        merge(base, tmp_path / "merged")


def test_an_adapter_without_its_origin_is_refused(adapter, tmp_path):
    (adapter / "vltrain.json").unlink()

    with pytest.raises(VltrainError, match=r"vltrain\.json is missing"):
        merge(adapter, tmp_path / "merged")


def test_an_adapter_that_lacks_a_tensor_is_refused(adapter, tmp_path):
    file = adapter / "adapter_model.safetensors"
    learned = load_file(file)
    lost = next(name for name in learned if "h.1.mlp.w2.lora_B" in name)
    save_file({k: v for k, v in learned.items() if k != lost}, file)

    with pytest.raises(VltrainError, match=r"h\.1\.mlp\.w2\.lora_B"):
        merge(adapter, tmp_path / "merged")


def test_an_adapter_that_changes_nothing_is_refused(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "final", scale=0.0)

    with pytest.raises(VltrainError, match="changes nothing"):
        merge(adapter, tmp_path / "merged")

    assert not list(tmp_path.glob("merged*"))


def test_logits_that_differ_or_are_no_numbers_are_refused():
    expected, unchanged = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 0.0]])
    options = {"dtype": torch.float32, "adapter": Path("a")}

    near = compare(torch.tensor([[1.00005, -1.0]]), expected, unchanged, **options)

    assert near.merged == pytest.approx(3.5e-5, rel=0.05)
    assert near.base == pytest.approx(1.0)
    for wrong in (torch.tensor([[1.01, -1.0]]), torch.tensor([[float("nan"), -1.0]])):
        with pytest.raises(VltrainError, match=r"by (0\.71%|nan%) of the logits"):
            compare(wrong, expected, unchanged, **options)


def test_a_merge_says_how_near_it_came(adapter, tmp_path, capsys):
    merge(adapter, tmp_path / "merged")

    said = capsys.readouterr().out
    assert "differ from those of base + adapter by 0.00%" in said
    assert "warning" not in said


def test_a_merge_warns_when_rounding_weighs_as_much_as_what_was_learned(tmp_path, capsys):
    base = in_dtype(write_qwen_vl(tmp_path / "base"), torch.bfloat16)
    adapter = write_adapter(base, tmp_path / "final", scale=2e-4)

    merge(adapter, tmp_path / "merged")

    assert "rounding to bfloat16 weighs as much" in capsys.readouterr().out


def test_a_folder_is_whole_or_not_there(tmp_path):
    out = tmp_path / "out"

    def write_half() -> None:
        with whole_folder(out) as draft:
            (draft / "half").write_text("")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert list(tmp_path.iterdir()) == []

    with whole_folder(out) as draft:
        (draft / "all").write_text("")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_removed_and_a_running_one_is_left_alone(tmp_path):
    code = "import time; print('up', flush=True); time.sleep(60)"
    killed, running = (
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)
    )
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    for process in (killed, running):
        (tmp_path / f"out.partial-{process.pid}").mkdir()

    with whole_folder(tmp_path / "out"):
        names = {p.name for p in tmp_path.iterdir()}

    running.kill()
    running.wait()
    assert names == {f"out.partial-{running.pid}", f"out.partial-{os.getpid()}"}
