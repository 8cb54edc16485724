"""From a checkpoint's folder to a model: every tensor as its file has it, or an error."""

import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_cases import GOLDEN
from safetensors.torch import load_file, save_file
from tiny import QWEN_VL_CONFIG, write_qwen_vl
from torch import Tensor

from vltrain.errors import VltrainError
from vltrain.models import load_model, load_processor
from vltrain.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration

QUERY = "transformer.visual.attn_pool.query"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_qwen_vl(tmp_path / "base")


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


def split_in_shards(folder: Path, ending: str) -> list[Path]:
    """Lay the weights out in three shards with an index, as the hub has them."""
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(3):
        shard = f"{stem}-{number + 1:05}-of-00003.{ending}"
        part = {name: tensors[name] for name in names[number::3]}
        weight_map |= dict.fromkeys(part, shard)
        if ending == "safetensors":
            save_file(part, folder / shard, metadata={"format": "pt"})
        else:
            torch.save(part, folder / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return [folder / shard for shard in sorted(set(weight_map.values()))]


def assert_equals_file(folder: Path, expected: dict[str, Tensor]) -> None:
    loaded = load_model(folder).state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


def test_every_tensor_equals_its_file(base):
    assert_equals_file(base, load_file(base / "model.safetensors"))


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_every_tensor_equals_its_shard(base, ending):
    expected = load_file(base / "model.safetensors")
    split_in_shards(base, ending)

    assert_equals_file(base, expected)


def test_weights_that_would_run_code_are_refused_and_run_none(base, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(tensors | {"extra": Payload()}, base / "pytorch_model.bin")

    with pytest.raises(VltrainError, match="the weights cannot be read"):
        load_model(base)

    assert not (tmp_path / "ran").exists()


def test_weights_in_an_old_pickle_are_refused(base):
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))

    with pytest.raises(VltrainError, match="the weights cannot be read"):
        load_model(base)


def test_missing_tensors_are_listed(base):
    change_tensors(base, lambda tensors: [tensors.pop(QUERY), tensors.pop("lm_head.weight")])

    with pytest.raises(VltrainError, match=rf"2 missing: lm_head\.weight, {re.escape(QUERY)}"):
        load_model(base)


def test_unexpected_tensors_are_listed(base):
    change_tensors(base, lambda tensors: tensors.update(extra=torch.zeros(3)))

    with pytest.raises(VltrainError, match="1 unexpected: extra"):
        load_model(base)


def test_tensors_of_another_shape_are_listed(base):
    change_tensors(base, lambda tensors: tensors.update({QUERY: torch.zeros(9, 128)}))

    with pytest.raises(VltrainError, match=re.escape(QUERY)):
        load_model(base)


def test_a_long_list_of_missing_tensors_is_cut_and_counted(base):
    def drop_layer(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("transformer.visual.transformer.")]:
            del tensors[name]

    change_tensors(base, drop_layer)

    with pytest.raises(VltrainError, match=r"24 missing: .* and 14 more"):
        load_model(base)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_missing_shard_is_named(base, ending):
    split_in_shards(base, ending)[1].unlink()

    with pytest.raises(VltrainError, match=rf"names \w+-00002-of-00003\.{ending}, which the"):
        load_model(base)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_shard_that_is_cut_off_is_refused(base, ending):
    shard = split_in_shards(base, ending)[1]
    shard.write_bytes(shard.read_bytes()[:-100])

    with pytest.raises(VltrainError, match="the weights cannot be read"):
        load_model(base)


def test_a_folder_without_weights_is_refused(base):
    (base / "model.safetensors").unlink()

    with pytest.raises(VltrainError, match="the weights cannot be read"):
        load_model(base)


def test_auto_is_the_dtype_that_the_config_names(base):
    change_config(base, torch_dtype="bfloat16")

    assert {p.dtype for p in load_model(base).parameters()} == {torch.bfloat16}


def test_a_config_that_names_no_dtype_means_float32(base):
    config = json.loads((base / "config.json").read_text())
    del config["torch_dtype"]
    (base / "config.json").write_text(json.dumps(config))

    assert {p.dtype for p in load_model(base).parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16])
def test_a_dtype_that_is_asked_for_wins_over_the_config(base, dtype):
    assert {p.dtype for p in load_model(base, dtype=dtype).parameters()} == {torch.bfloat16}


def test_an_unknown_dtype_is_refused_with_those_that_there_are(base):
    with pytest.raises(VltrainError, match=r"'int7' is no dtype of weights\n.*bf16, fp16 or fp32"):
        load_model(base, dtype="int7")


def test_a_model_is_loaded_to_answer(base):
    assert not load_model(base).training


def test_positions_of_the_resampler_take_no_gradient_after_loading(base):
    model = load_model(base)

    fixed = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert fixed == ["transformer.visual.attn_pool.pos_embed"]


@pytest.mark.slow
def test_a_folder_that_brings_code_is_read_without_asking_to_run_it(base):
    published = json.loads((GOLDEN / "layout.json").read_text())["real_config_chat_rev"]
    change_config(base, auto_map=published["auto_map"])
    code = (
        "import sys; from vltrain.models import load_model, load_processor; "
        "load_model(sys.argv[1]); load_processor(sys.argv[1])"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, str(base)],
        stdin=subprocess.DEVNULL,  # a question would fail at the end of its input
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    assert "trust_remote_code" not in done.stdout + done.stderr


@pytest.mark.parametrize("load", [load_model, load_processor])
def test_a_text_only_qwen_is_refused_with_the_families_that_are_known(base, load):
    config = {key: value for key, value in QWEN_VL_CONFIG.items() if key != "visual"}
    (base / "config.json").write_text(json.dumps(config))

    with pytest.raises(VltrainError, match=r"Qwen-VL v1 \(qwen / qwen_vl\).*`visual` section"):
        load(base)


def test_an_unknown_model_type_is_refused_with_the_families_that_are_known(base):
    change_config(base, model_type="llama")

    with pytest.raises(VltrainError, match=r"model_type 'llama'(.|\n)*Qwen-VL v1"):
        load_model(base)


def test_the_real_size_has_the_published_tensors():
    layout = json.loads((GOLDEN / "layout.json").read_text())
    published = QwenVLConfig.from_published(layout["real_config_chat_rev"])
    with torch.device("meta"):
        model = QwenVLForConditionalGeneration(published)

    shapes: dict[str, list[int]] = {}
    counts: Counter[str] = Counter()
    for name, tensor in model.state_dict().items():
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        shapes[pattern] = list(tensor.shape)
        counts[pattern] += 1

    assert shapes == layout["fp_state_dict"]["pattern_shapes"]
    assert counts == layout["fp_state_dict"]["pattern_counts"]
    assert counts.total() == 853
    assert sum(p.numel() for p in model.parameters()) == 9_656_935_168
    assert list(model.buffers()) == []


def test_the_built_in_sizes_are_the_published_ones():
    layout = json.loads((GOLDEN / "layout.json").read_text())
    with torch.device("meta"):
        model = QwenVLForConditionalGeneration(QwenVLConfig())

    assert sum(p.numel() for p in model.parameters()) == 9_656_935_168
    assert QwenVLConfig().vision.image_pad_id == 151859
    assert QwenVLConfig().seq_length == layout["real_config_chat_rev"]["seq_length"]


def test_what_transformers_saves_loads_again_as_it_was(base, tmp_path):
    model = load_model(base)
    ids = torch.arange(100, 110)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits

    model.save_pretrained(tmp_path / "saved")
    load_processor(base).save_pretrained(tmp_path / "saved")

    again = load_model(tmp_path / "saved")
    assert_equals_file(tmp_path / "saved", model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, expected)
    assert load_processor(tmp_path / "saved").text_ids("é") == [195, 169]


@pytest.mark.parametrize("auto_class", ["AutoModelForCausalLM", "AutoModelForImageTextToText"])
def test_the_auto_classes_know_the_model(base, tmp_path, auto_class):
    import transformers

    load_model(base).save_pretrained(tmp_path / "saved")

    model = getattr(transformers, auto_class).from_pretrained(tmp_path / "saved")

    assert type(model) is QwenVLForConditionalGeneration


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, vltrain; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"

    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"hidden_size": "128"}, "hidden_size is '128'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"kv_channels": True}, "kv_channels is True"),
        ({"use_logn_attn": "yes"}, "use_logn_attn is 'yes'"),
        ({"visual": {**QWEN_VL_CONFIG["visual"], "width": None}}, "width is None"),
        ({"visual": {"n_queries": 4}}, "`visual` lacks image_size, `visual` lacks patch_size"),
    ],
)
def test_a_config_that_describes_no_model_is_refused_by_its_keys(values, fault):
    with pytest.raises(VltrainError, match=f"describe a Qwen-VL: {fault}"):
        QwenVLConfig.from_published(QWEN_VL_CONFIG | values)
