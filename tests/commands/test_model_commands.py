"""Which words reach the workflows that train, measure, ask and write models."""

import os
from pathlib import Path

import pytest
from command_line import type_in

from vltrain.config import load_recipe
from vltrain.data.pictures import Pictures
from vltrain.errors import VltrainError
from vltrain.evaluation.generation import Decoding
from vltrain.workflows.quantize import Calibration


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_training_gets_the_recipe_of_file_flags_and_overrides(
    called: list[tuple], method: str, tmp_path: Path
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("trainer:\n  max_steps: 3\n")

    code = type_in(
        *(method, str(recipe), "--model", "base", "--data", "a.json", "--data", "b.json"),
        *("--output", "runs/a", "--set", "data.max_length=64", "--set", "trainer.seed=1"),
    )

    expected = load_recipe(
        recipe,
        method=method,
        model="base",
        data=[Path("a.json"), Path("b.json")],
        output=Path("runs/a"),
        overrides=["data.max_length=64", "trainer.seed=1"],
    )
    assert code == 0
    assert called == [("train", (expected,), {})]


def test_cache_gets_what_a_run_would(called: list[tuple], tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    words = ("--method", "full", "--model", "base", "--data", "a.json", "--set", "dtype=bf16")

    assert type_in("cache", str(file), *words) == 0

    given = {"method": "full", "model": "base", "data": [Path("a.json")]}
    assert called == [("cache_features", (file,), given | {"overrides": ["dtype=bf16"]})]


def test_estimate_gets_recipe_method_and_gpu(called: list[tuple], tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    words = ("--method", "full", "--set", "data.max_length=512", "--memory-gib", "24", "--json")

    assert type_in("estimate", str(file), *words) == 0
    given = {
        "method": "full",
        "model": None,
        "data": (),
        "overrides": ["data.max_length=512"],
        "pictures": 1,
        "memory_gib": 24.0,
        "gpus": 1,
        "probe": True,
        "as_json": True,
    }
    assert called == [("estimate_run", (file,), given)]


def test_profile_gets_method_lengths_and_model(called: list[tuple]):
    words = ("--method", "full", "--model", "base", "--random", "--lengths", "384,2048")
    more = ("--steps", "3", "--output", "p.json", "--set", "compile=auto")

    assert type_in("profile", *words, *more) == 0

    given = {"method": "full", "model": "base", "random": True, "lengths": [384, 2048], "steps": 3}
    given |= {"overrides": ["compile=auto"], "output": Path("p.json")}
    assert called == [("profile_steps", (None,), given)]


def test_profile_without_words_measures_the_lengths_of_the_original(called: list[tuple]):
    assert type_in("profile") == 0

    assert called[0][2]["lengths"] == [384, 512, 1024, 2048, "mixed"]
    assert called[0][2]["model"] is None


def test_profile_refuses_what_is_no_length(called: list[tuple]):
    with pytest.raises(VltrainError, match="is no list of numbers"):
        type_in("profile", "--lengths", "a,b")
    assert called == []


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "is no device"),
        ("cuda:x", "is no device"),
        ("cuda:99", "this machine has no such GPU"),
    ],
)
@pytest.mark.parametrize(
    "words", [("profile",), ("quantize", "org/name", "out", "--data", "a.json")], ids=lambda w: w[0]
)
def test_a_device_that_is_not_there_is_refused(
    called: list[tuple], monkeypatch: pytest.MonkeyPatch, words, device, message
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    with pytest.raises(VltrainError, match=f"--device {device}: {message}"):
        type_in(*words, "--device", device)
    assert called == []


def test_on_the_cpu_no_gpu_is_seen(called: list[tuple], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    type_in("quantize", "org/name", "out", "--data", "a.json", "--device", "cpu")

    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_merge_gets_adapter_out_and_base(called: list[tuple]):
    type_in("merge", "runs/a/final", "merged", "--base", "elsewhere", "--with", "runs/b=final=0.5")

    assert called == [
        (
            "merge",
            (Path("runs/a/final"), Path("merged")),
            {
                "base": "elsewhere",
                "others": [(Path("runs/b=final"), 0.5)],
                "into": "auto",
                "low_memory": False,
            },
        ),
    ]


def test_export_gets_model_out_and_layout(called: list[tuple]):
    type_in("export", "runs/a", "out", "--to", "original", "--max-shard-size", "500MB")

    assert called == [
        ("export", ("runs/a", Path("out"), "original"), {"max_shard_size": "500MB"}),
    ]


def test_quantize_gets_model_and_data(called: list[tuple]):
    words = ("--data", "a.json", "--data", "b.jsonl", "--samples", "64")

    assert type_in("quantize", "org/name", "out", *words, "--image-root", "pics") == 0
    data = Calibration(
        (Path("a.json"), Path("b.jsonl")), samples=64, pictures=Pictures(Path("pics"))
    )
    assert called == [("quantize", ("org/name", Path("out"), data), {})]


def test_chat_gets_model_input_and_output(called: list[tuple]):
    type_in("chat", "org/name@v1", "--input", "q.json", "--output", "a.jsonl", "--batch-size", "4")

    assert called == [
        (
            "answer_file",
            ("org/name@v1", Path("q.json"), Path("a.jsonl")),
            {
                "adapter": None,
                "batch_size": 4,
                "decoding": Decoding(512),
                "seed": 0,
                "format": "auto",
                "pictures": Pictures(),
            },
        )
    ]
