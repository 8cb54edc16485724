"""`vltrain quantize`: the published layout, what reads it, and what is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import QWEN_VL_CONFIG, write_conversations, write_gptq, write_qwen_vl
from typer.testing import CliRunner

import vltrain.workflows.quantize as workflow
from vltrain.cli import app
from vltrain.errors import VltrainError
from vltrain.models import load_model
from vltrain.models.gptq import packed_weight
from vltrain.workflows.quantize import Calibration, drawn, quantize

LAYER = "transformer.h.1.mlp.w1"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in base/ and conversations in data/."""
    folder = tmp_path_factory.mktemp("quantize")
    write_qwen_vl(folder / "base")
    write_conversations(folder / "data")
    return folder


@pytest.fixture(scope="module")
def packed(place: Path) -> Path:
    """The base, packed."""
    quantize(str(place / "base"), place / "packed", calibration(place))
    return place / "packed"


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fresh process reads what was written: that takes most of the time."""
    monkeypatch.setattr(workflow, "reload_in_a_fresh_process", lambda *_: None)


def calibration(place: Path, **values) -> Calibration:
    return Calibration((place / "data" / "train.json",), **values)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a model fails the test."""
    monkeypatch.setattr(workflow, "load_model", lambda *_: pytest.fail("a model was read"))


def type_in(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.slow
def test_the_tensors_have_the_published_names_shapes_and_dtypes(packed, tmp_path):
    write_gptq(tmp_path)
    published = load_file(tmp_path / "model.safetensors")

    found = load_file(packed / "model.safetensors")

    def forms(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
        return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}

    assert forms(found) == forms(published)


@pytest.mark.slow
def test_what_is_not_packed_is_that_of_the_base_to_the_bit(packed, place):
    base = load_file(place / "base" / "model.safetensors")
    found = load_file(packed / "model.safetensors")

    kept = [name for name in base if name in found]

    assert len(kept) == len(base) - 10
    assert all(found[name].equal(base[name]) for name in kept)


@pytest.mark.slow
def test_the_settings_are_those_of_the_published_model(packed, place):
    settings = json.loads((packed / "quantize_config.json").read_text())
    config = json.loads((packed / "config.json").read_text())

    assert config.pop("quantization_config") == settings
    assert config == json.loads((place / "base" / "config.json").read_text())
    expected = {"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False}
    assert {key: settings[key] for key in expected} == expected
    assert (settings["sym"], settings["quant_method"]) == (True, "gptq")
    for name in ("qwen.tiktoken", "tokenizer_config.json", "generation_config.json"):
        assert (packed / name).read_bytes() == (place / "base" / name).read_bytes()


@pytest.mark.slow
def test_the_report_tells_of_each_layer_and_of_perplexity(packed, place):
    report = json.loads((packed / "quantize.json").read_text())

    assert report["data"]["calibrated_on"] == 3
    assert report["data"]["held_out"] == 1
    assert [layer["layer"] for layer in report["layers"]] == [0, 1]
    assert all(
        layer["linear"]["mlp.w1"] < layer["rounding"]["mlp.w1"] for layer in report["layers"]
    )
    assert 0 < report["logits"] < 0.3
    assert report["perplexity"]["after"] == pytest.approx(report["perplexity"]["before"], rel=0.05)
    assert str(place) not in json.dumps(report)


@pytest.mark.slow
def test_it_is_read_as_weights_near_to_the_base(packed, place):
    weight = packed_weight(load_model(packed).get_submodule(LAYER))
    plain = load_model(place / "base").get_submodule(LAYER).weight

    assert 0.01 < (weight.float() - plain).norm() / plain.norm() < 0.2
    assert type_in("verify", packed).exit_code == 0


@pytest.mark.slow
def test_it_answers_questions(packed, place):
    picture = place / "data" / "images" / "red.png"

    result = type_in("chat", packed, "--prompt", "Where?", "--image", picture)

    assert result.exit_code == 0
    assert result.output.strip()


@pytest.mark.slow
def test_an_adapter_trains_on_it(packed, place, tmp_path):
    result = type_in(
        *("qlora", "--model", packed, "--data", place / "data" / "train.json"),
        *("--output", tmp_path / "run", "--set", "trainer.max_steps=2", "--set", "lora.r=4"),
    )

    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("unproven")
def test_a_base_in_bfloat16_keeps_its_dtype(place, tmp_path):
    write_qwen_vl(tmp_path / "base", config=QWEN_VL_CONFIG | {"torch_dtype": "bfloat16"})

    quantize(str(tmp_path / "base"), tmp_path / "out", calibration(place, samples=1))

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors[f"{LAYER}.bias"].dtype is torch.bfloat16
    assert tensors[f"{LAYER}.scales"].dtype is torch.float16
    assert load_model(tmp_path / "out").dtype is torch.bfloat16


@pytest.mark.slow
@pytest.mark.usefixtures("unproven")
def test_the_same_seed_packs_the_same(packed, place, tmp_path):
    quantize(str(place / "base"), tmp_path / "out", calibration(place))

    found, again = (load_file(p / "model.safetensors") for p in (packed, tmp_path / "out"))
    assert all(found[name].equal(again[name]) for name in found)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("adapter", "is an adapter"),
        ("packed", "packed to 4 bits already"),
        ("narrow", "do not fit"),
    ],
)
def test_a_model_that_cannot_be_packed_is_refused_before_it_is_read(place, tmp_path, kind, message):
    folder = tmp_path / kind
    if kind == "adapter":
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
    elif kind == "packed":
        write_gptq(folder)
    else:
        write_qwen_vl(folder, config=QWEN_VL_CONFIG | {"intermediate_size": 192})

    with pytest.raises(VltrainError, match=message):
        quantize(str(folder), tmp_path / "out", calibration(place))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("unread")
def test_a_folder_that_is_there_is_never_overwritten(place):
    with pytest.raises(VltrainError, match="exists already"):
        quantize(str(place / "base"), place / "data", calibration(place))


@pytest.mark.usefixtures("unread")
def test_faulty_data_is_refused_before_the_model_is_read(place, tmp_path):
    file = tmp_path / "bad.json"
    turns = [{"from": "user", "value": "<img>none.png</img>"}, {"from": "assistant", "value": "A"}]
    file.write_text(json.dumps([{"id": "a", "conversations": turns}]))

    with pytest.raises(VltrainError, match="nothing was packed"):
        quantize(str(place / "base"), tmp_path / "out", Calibration((file,)))


@pytest.mark.usefixtures("unread")
def test_too_few_conversations_are_refused(place, tmp_path):
    with pytest.raises(
        VltrainError, match="0 of 4 conversations that were drawn can be used; 4 have more than 8"
    ):
        quantize(str(place / "base"), tmp_path / "out", calibration(place, max_length=8))


def test_a_weight_that_is_not_finite_leaves_no_folder(place, tmp_path):
    write_qwen_vl(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["transformer.h.0.mlp.c_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(VltrainError, match=r"transformer\.h\.0: cannot be packed: weights are NaN"):
        quantize(str(tmp_path / "base"), tmp_path / "out", calibration(place))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.slow
@pytest.mark.usefixtures("unproven")
def test_a_killed_run_leaves_no_folder_and_the_next_one_clears_up(place, tmp_path):
    code = (
        "import sys, time, vltrain.workflows.quantize as q\n"
        "q.write_packed = lambda *a: (print('up', flush=True), time.sleep(60))\n"
        "q.quantize(sys.argv[1], q.Path(sys.argv[2]), q.Calibration((q.Path(sys.argv[3]),)))\n"
    )
    words = [str(place / "base"), str(tmp_path / "out"), str(place / "data" / "train.json")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True
    )
    assert any("up" in line for line in process.stdout)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [f"out.partial-{process.pid}"]

    quantize(words[0], tmp_path / "out", calibration(place))

    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("unproven")
def test_a_text_only_calibration_is_warned_about(place, tmp_path, capsys):
    file = tmp_path / "text.json"
    records = [
        {
            "id": str(number),
            "conversations": [
                {"from": "user", "value": f"What is {number} + 1?"},
                {"from": "assistant", "value": str(number + 1)},
            ],
        }
        for number in range(12)
    ]
    file.write_text(json.dumps(records))

    quantize(str(place / "base"), tmp_path / "out", Calibration((file,), samples=9))

    said = " ".join(capsys.readouterr().out.split())
    assert "no conversation has a picture" in said
    assert "calibrating on 9 conversations with 0 pictures, 1 more held out" in said


def test_no_more_conversations_are_held_than_are_drawn_and_a_seed_draws_the_same(tmp_path):
    turns = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]
    records = [{"id": str(number), "conversations": turns} for number in range(50)]
    file = tmp_path / "many.json"
    file.write_text(json.dumps(records), encoding="utf-8")

    def names(seed: int) -> list[str]:
        return [record.name for record in drawn(Calibration(files=[file], seed=seed), 7)]

    assert len(set(names(0))) == 7
    assert names(0) == names(0) != names(1)
