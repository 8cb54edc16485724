"""Export: a model in another layout, the way there and back, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import QWEN_VL_CONFIG, write_gptq, write_qwen_vl

from vltrain.commands.export import export as export_command
from vltrain.errors import VltrainError
from vltrain.models import load_model, load_processor
from vltrain.models.plain_weights import plain_weights
from vltrain.workflows.export import export, refuse_other_tensors, size_in_bytes
from vltrain.workflows.reload import probe_inputs, probe_logits
from vltrain.workflows.verify import folder_findings
from vltrain.workflows.whole_folder import refuse_small_disk

LAYOUT = json.loads((Path(__file__).parents[1] / "golden" / "layout.json").read_text())
CODE = ("configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py", "visual.py")
TEXTS = ("config.json", "generation_config.json", "tokenizer_config.json", "qwen.tiktoken")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write_published(tmp_path / "published")


def write_published(folder: Path, **options) -> Path:
    """A tiny model whose files have the keys and the form of the published ones, code included."""
    config = LAYOUT["real_config_chat_rev"] | {
        key: QWEN_VL_CONFIG[key] for key in QWEN_VL_CONFIG if key in LAYOUT["real_config_chat_rev"]
    }
    write_qwen_vl(folder, config=config, **options)
    generation = LAYOUT["generation_config_chat_rev"] | {"eos_token_id": 256, "pad_token_id": 256}
    for name, values in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", LAYOUT["tokenizer_config"]),
    ):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")
    for name in CODE:
        (folder / name).write_text(f"# the original's {name}")
    (folder / "LICENSE").write_text("of the weights")
    return folder


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def files_of(folder: Path) -> dict[str, bytes]:
    """All files but those of weights and the report."""
    return {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if "safetensors" not in file.name and file.name != "export.json"
    }


def test_the_way_to_transformers_and_back_changes_nothing(published, tmp_path):
    export(str(published), tmp_path / "there", "transformers")
    export(str(tmp_path / "there"), tmp_path / "back", "original")

    assert files_of(tmp_path / "back") == files_of(published)
    before, after = weights(published), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    inputs = probe_inputs(load_processor(published))
    found = probe_inputs(load_processor(tmp_path / "back"))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(inputs, found, strict=True) for key in a)
    expected = probe_logits(load_model(published), inputs)
    for folder in ("there", "back"):
        assert torch.equal(probe_logits(load_model(tmp_path / folder), inputs), expected)


def test_the_auto_classes_load_what_was_exported_to_transformers(published, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    export(str(published), tmp_path / "out", "transformers")

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = probe_inputs(processor)
    expected = probe_logits(load_model(published), probe_inputs(load_processor(published)))
    assert torch.equal(probe_logits(model, inputs), expected)
    assert tokenizer("é<box>").input_ids == load_processor(published).text_ids("é<box>")
    assert model.generation_config.eos_token_id == [258, 256]  # <|im_end|>, <|endoftext|>


def test_the_layout_of_transformers_leads_to_no_code_of_the_folder(published, tmp_path):
    export(str(published), tmp_path / "out", "transformers")

    config = read(tmp_path / "out", "config.json")
    assert config["model_type"] == "qwen_vl"
    assert config["architectures"] == ["QwenVLForConditionalGeneration"]
    assert config["dtype"] == "float32"
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in read(tmp_path / "out", name)


def test_what_transformers_itself_saved_gets_all_that_a_published_folder_has(published, tmp_path):
    saved = tmp_path / "saved"
    load_model(published).save_pretrained(saved)
    load_processor(published).save_pretrained(saved)

    export(str(saved), tmp_path / "out", "original")

    config, expected = read(tmp_path / "out", "config.json"), read(published, "config.json")
    ours = {"transformers_version", "_name_or_path", "use_flash_attn"}
    assert {k: v for k, v in config.items() if k not in ours} == {
        k: v for k, v in expected.items() if k not in ours
    }
    assert read(tmp_path / "out", "tokenizer_config.json") == LAYOUT["tokenizer_config"]
    generation = read(tmp_path / "out", "generation_config.json")
    assert generation["chat_format"] == "chatml"
    assert generation["max_window_size"] == 6144
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()
    assert weights(tmp_path / "out").keys() == weights(published).keys()


def test_a_folder_of_the_published_layout_is_completed(tmp_path, capsys):
    sparse = write_qwen_vl(tmp_path / "sparse")
    (sparse / "generation_config.json").unlink()
    (sparse / "tokenizer_config.json").unlink()

    export(str(sparse), tmp_path / "out", "original")

    published = LAYOUT["real_config_chat_rev"].keys() - {"_name_or_path", "transformers_version"}
    config = read(tmp_path / "out", "config.json")
    assert config.keys() == published
    assert config["visual"]["image_start_id"] == 470
    assert config["auto_map"] == LAYOUT["real_config_chat_rev"]["auto_map"]
    assert read(tmp_path / "out", "tokenizer_config.json") == LAYOUT["tokenizer_config"]
    generation = read(tmp_path / "out", "generation_config.json")
    assert (generation["chat_format"], generation["eos_token_id"]) == ("chatml", 256)
    said = capsys.readouterr().out
    assert "generation_config.json now has chat_format chatml" in said
    assert "copy the .py files of the published model there" in said


def test_the_code_of_a_base_comes_along_and_no_report_does(published, tmp_path, capsys):
    expected = files_of(published)
    for report in ("merge.json", "vltrain.json"):  # of a merge, of a full run
        (published / report).write_text('{"files": {}}')

    export(str(published), tmp_path / "out", "original")

    assert files_of(tmp_path / "out") == expected
    assert "note:" not in capsys.readouterr().out


def test_a_base_that_was_not_tuned_to_chat_stays_one(tmp_path):
    base = write_qwen_vl(tmp_path / "base", chat_tuned=False)

    export(str(base), tmp_path / "there", "transformers")
    export(str(tmp_path / "there"), tmp_path / "back", "original")

    assert read(tmp_path / "there", "generation_config.json")["eos_token_id"] == 256
    assert read(tmp_path / "back", "generation_config.json")["chat_format"] == "raw"


def test_tensors_keep_the_dtype_of_their_file(published, tmp_path):
    file = published / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()
    save_file(tensors, file, metadata={"format": "pt"})

    export(str(published), tmp_path / "out", "transformers")

    after = weights(tmp_path / "out")
    assert after["lm_head.weight"].dtype is torch.bfloat16
    assert after["transformer.wte.weight"].dtype is torch.float32


def test_weights_are_written_in_shards_of_the_size_that_is_asked_for(published, tmp_path):
    export(str(published), tmp_path / "out", "original", max_shard_size="500KB")

    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 520_000 for shard in shards)
    index = read(tmp_path / "out", "model.safetensors.index.json")["weight_map"]
    assert set(index.values()) == {shard.name for shard in shards}
    assert not list(folder_findings(tmp_path / "out"))


def test_bin_shards_are_exported_as_safetensors(published, tmp_path):
    tensors = load_file(published / "model.safetensors")
    torch.save(tensors, published / "pytorch_model.bin")
    (published / "model.safetensors").unlink()

    export(str(published), tmp_path / "out", "transformers")

    after = weights(tmp_path / "out")
    assert all(torch.equal(after[name], tensors[name]) for name in tensors)
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_what_was_exported_may_be_read_by_all_who_may_read_the_folder(published, tmp_path):
    export(str(published), tmp_path / "out", "transformers")

    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "out").stat().st_mode & 0o666}


def test_verify_holds_an_export_against_its_own_list(published, tmp_path):
    export(str(published), tmp_path / "out", "original")
    assert not list(folder_findings(tmp_path / "out"))

    (tmp_path / "out" / "visual.py").write_text("# the original's visual.pY")

    (found,) = folder_findings(tmp_path / "out")
    assert found.kind == "changed"
    assert "export.json" in found.message


def test_the_report_tells_no_path_of_this_machine(published, tmp_path):
    export(str(published), tmp_path / "out", "original")

    text = (tmp_path / "out" / "export.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["tensors"] == len(weights(published))


def adapter(folder: Path) -> Path:
    write_qwen_vl(folder)
    (folder / "adapter_config.json").write_text("{}")
    return folder


def packed(folder: Path) -> Path:
    write_gptq(folder)
    return folder


def lacking(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (write_qwen_vl(folder) / name).unlink()
        return folder

    return write


@pytest.mark.parametrize(
    ("write", "fault"),
    [
        (adapter, r"is an adapter[\s\S]*vltrain merge"),
        (packed, r"is packed to 4 bits[\s\S]*16-bit checkpoint"),
        (lacking("qwen.tiktoken"), r"no qwen\.tiktoken"),
        (lacking("config.json"), r"config\.json: there is no such file"),
        (lacking("model.safetensors"), "61 missing"),
    ],
)
def test_what_is_no_whole_model_is_refused_with_what_to_do(tmp_path, write, fault):
    folder = write(tmp_path / "model")

    with pytest.raises(VltrainError, match=fault):
        export(str(folder), tmp_path / "out", "original")

    assert not list(tmp_path.glob("out*"))


def test_a_folder_that_exists_is_never_written_to(published, tmp_path):
    (tmp_path / "out").mkdir()

    with pytest.raises(VltrainError, match="exists already"):
        export(str(published), tmp_path / "out", "original")


def test_a_layout_that_the_family_does_not_have_is_refused(published, tmp_path):
    with pytest.raises(VltrainError, match="Qwen-VL v1 has no such layout"):
        export(str(published), tmp_path / "out", "gguf")


def test_the_words_for_4_bits_lead_to_the_command_that_packs_them():
    with pytest.raises(VltrainError, match="fix: vltrain quantize runs/merged out --data"):
        export_command("runs/merged", Path("out"), "gptq-int4")


def test_a_disk_that_is_too_small_is_told_before(tmp_path):
    refuse_small_disk(tmp_path / "a" / "out", 10)

    with pytest.raises(VltrainError, match=r"needs 1,000,000,000\.0 GB"):
        refuse_small_disk(tmp_path / "a" / "out", 10**18)


@pytest.mark.parametrize(("text", "size"), [("2GB", 2 * 10**9), ("2048MB", 2048 * 10**6)])
def test_a_size_is_read_in_bytes(text, size):
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["2", "GB", "-2GB", "0GB", "2 gigabytes"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(VltrainError, match="is no size"):
        size_in_bytes(text)


def test_a_tensor_that_is_not_on_the_disk_as_it_was_read_is_refused(published, tmp_path):
    other = write_published(tmp_path / "other", seed=1)

    with pytest.raises(VltrainError, match="is on the disk not what was read"):
        refuse_other_tensors(plain_weights(published), plain_weights(other))


@pytest.mark.slow
def test_an_export_that_is_killed_leaves_no_folder_and_the_next_one_clears_up(published, tmp_path):
    code = (
        "import sys, time, vltrain.workflows.export as e\n"
        "e.reload_in_a_fresh_process = lambda *a: (print('up', flush=True), time.sleep(60))\n"
        "e.export(sys.argv[1], e.Path(sys.argv[2]), 'original')\n"
    )
    command = [sys.executable, "-c", code, str(published), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while "up" not in process.stdout.readline():
        time.sleep(0)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [path.name for path in tmp_path.glob("out*")] == [f"out.partial-{process.pid}"]

    export(str(published), tmp_path / "out", "original")

    assert [path.name for path in tmp_path.glob("out*")] == ["out"]
    assert files_of(tmp_path / "out") == files_of(published)
