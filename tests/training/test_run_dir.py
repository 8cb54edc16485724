"""A run's directory: whose it is, what of it is whole, what its files say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vltrain.config import Recipe, load_recipe
from vltrain.errors import VltrainError
from vltrain.training.checkpoints import publish
from vltrain.training.run_dir import RunDir, environment


def lora_recipe(output: Path, *overrides: str) -> Recipe:
    return load_recipe(
        None,
        method="lora",
        model="base",
        data=[Path("train.json")],
        output=output,
        overrides=overrides,
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.begin(lora_recipe(run.path), {})
    return run


def test_a_run_that_begins_makes_its_directory_and_writes_its_recipe(tmp_path: Path):
    run = RunDir(tmp_path / "runs" / "a")
    recipe = lora_recipe(run.path)

    run.begin(recipe, {"dtype": "fp32"})

    assert load_recipe(run.recipe_file, method="lora") == recipe
    assert json.loads(run.environment_file.read_text()) == {"dtype": "fp32"}


def test_asking_for_the_state_of_a_new_run_writes_nothing(tmp_path: Path):
    run = RunDir(tmp_path / "runs" / "a")

    assert run.state(lora_recipe(run.path)) == "new"
    assert not run.path.exists()


def test_an_empty_directory_is_taken_for_a_new_run(tmp_path: Path):
    assert RunDir(tmp_path).state(lora_recipe(tmp_path)) == "new"


def test_a_kill_during_the_first_write_does_not_spoil_the_directory(tmp_path: Path):
    (tmp_path / "recipe.yaml.partial").write_text("method: lo")

    assert RunDir(tmp_path).state(lora_recipe(tmp_path)) == "new"


def test_the_same_recipe_resumes(run: RunDir):
    assert run.state(lora_recipe(run.path)) == "resumable"


def test_the_same_run_called_by_another_path_resumes(run: RunDir):
    assert run.state(lora_recipe(run.path / ".." / "run")) == "resumable"


def test_a_run_is_finished_once_its_final_weights_have_their_name(run: RunDir):
    run.final_draft.mkdir()
    assert not run.is_finished

    run.mark_finished()

    assert run.is_finished
    assert run.state(lora_recipe(run.path)) == "finished"


def test_final_weights_that_were_cut_off_are_thrown_away(run: RunDir):
    run.final_draft.mkdir()
    (run.final_draft / "adapter_model.safetensors").write_bytes(b"half")

    run.begin(lora_recipe(run.path), {})

    assert run.state(lora_recipe(run.path)) == "resumable"
    assert not run.final_draft.exists()


def test_another_recipe_is_refused_with_the_keys_that_differ(run: RunDir):
    other = lora_recipe(run.path, "lora.r=8", "trainer.learning_rate=3e-4")

    with pytest.raises(VltrainError) as error:
        run.state(other)

    assert "lora.r (64 there, 8 here)" in str(error.value)
    assert "trainer.learning_rate (0.0001 there, 0.0003 here)" in str(error.value)
    assert "data.max_length" not in str(error.value)


def test_another_method_is_another_recipe(run: RunDir):
    full = replace(lora_recipe(run.path), method="full")

    with pytest.raises(VltrainError, match=r"method \(lora there, full here\)"):
        run.state(full)


def test_a_key_that_only_one_recipe_has_is_named_as_unset(run: RunDir):
    with pytest.raises(VltrainError, match=r"trainer.max_steps \(unset there, 5 here\)"):
        run.state(lora_recipe(run.path, "trainer.max_steps=5"))


def test_a_directory_with_files_of_others_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").touch()

    with pytest.raises(VltrainError, match=r"not empty and holds no run \(thesis.tex\)"):
        RunDir(tmp_path).state(lora_recipe(tmp_path))


def test_a_file_is_no_run_directory(tmp_path: Path):
    path = tmp_path / "run"
    path.touch()

    with pytest.raises(VltrainError, match="is a file"):
        RunDir(path).state(lora_recipe(path))


def test_metrics_read_back_to_the_last_bit(run: RunDir):
    loss = 0.1 + 0.2  # 0.30000000000000004

    run.append_metrics({"step": 1, "loss": loss})

    assert run.metrics_file.read_text() == '{"step": 1, "loss": 0.30000000000000004}\n'
    assert run.read_metrics() == [{"step": 1, "loss": loss}]


def test_checkpoints_of_another_stage_are_refused(run: RunDir):
    run.begin(lora_recipe(run.path), {"engine": "deepspeed", "zero_stage": 3, "world_size": 4})
    (run.path / "checkpoint-2").mkdir()
    publish(run.path / "checkpoint-2", run.path / "checkpoint-4")

    run.refuse_another_engine("deepspeed", 3)
    with pytest.raises(VltrainError, match=r"its checkpoints are of deepspeed \(ZeRO-3\)"):
        run.refuse_another_engine("deepspeed", 2)


def test_a_loss_that_is_no_number_is_written_as_null(run: RunDir):
    run.append_metrics({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})

    assert run.metrics_file.read_text() == '{"step": 1, "loss": null, "grad_norm": null}\n'
    assert run.read_metrics() == [{"step": 1, "loss": None, "grad_norm": None}]


def test_the_data_that_a_run_began_with_are_written_down_once(run: RunDir):
    assert run.read_data_fingerprint() is None

    run.keep_data_fingerprint({"files": {"a.json": 1}, "stamps": {"a.json": [3]}})
    run.keep_data_fingerprint({"files": {"a.json": 2}, "stamps": {"a.json": [4]}})

    kept = {"files": {"a.json": 1}, "stamps": {"a.json": [4]}}  # only a stamp is renewed
    assert run.read_data_fingerprint() == kept


def test_a_lock_alone_makes_no_directory_a_runs(tmp_path: Path):
    (tmp_path / "run.lock").touch()

    assert RunDir(tmp_path).state(lora_recipe(tmp_path)) == "new"


def test_a_run_that_resumes_drops_the_lines_after_its_checkpoint(run: RunDir):
    for step in (1, 2, 3, 4, 5):
        run.append_metrics({"step": step, "loss": 1.0 / step})

    run.cut_metrics(last_step=3)

    assert [row["step"] for row in run.read_metrics()] == [1, 2, 3]


def test_a_line_that_was_cut_off_is_dropped(run: RunDir):
    run.append_metrics({"step": 1, "loss": 2.5})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 2, "lo')

    run.cut_metrics(last_step=2)

    assert run.metrics_file.read_text() == '{"step": 1, "loss": 2.5}\n'


def test_the_environment_names_versions_hardware_and_the_base(run: RunDir):
    values = environment(
        dtype="fp32",
        base={"path": "models/qwen", "revision": None, "hash": "ab12"},
        epoch="4 samples, each once",
    )
    run.begin(lora_recipe(run.path), values)

    read = json.loads(run.environment_file.read_text())
    assert read["base"] == {"path": "models/qwen", "revision": None, "hash": "ab12"}
    assert (read["engine"], read["zero_stage"], read["world_size"]) == ("none", None, 1)
    assert (read["dtype"], read["epoch"]) == ("fp32", "4 samples, each once")
    assert read["packages"]["torch"].startswith("2.")
    assert read["hardware"]["cores"] >= 1
    assert read["hardware"]["memory_bytes"] > 2**30
