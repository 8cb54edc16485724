"""What a recipe may say, and what comes out of it."""

from pathlib import Path

import pytest
from recipe_files import SMALLEST, from_file, recipe_of

from vltrain.config import (
    DataConfig,
    FreezeConfig,
    LoraConfig,
    load_recipe,
    read_resolved,
    recipe_to_yaml,
)

RECIPES = Path(__file__).parents[1] / "recipes"


# What comes out


def test_three_flags_are_a_whole_recipe():
    recipe = recipe_of()

    assert recipe.model == "base"
    assert recipe.output == Path("runs/a")
    assert recipe.dtype == "auto"
    assert recipe.data == DataConfig(files=(Path("a.json"),))
    assert recipe.lora == LoraConfig(r=64, alpha=16, dropout=0.05, targets=None, embeddings="auto")
    assert recipe.freeze == FreezeConfig(vision=True, projector=None, language=False)


def test_lora_learns_at_1e_4_over_8_steps_and_full_at_1e_5_over_16():
    lora, full = recipe_of().trainer, recipe_of(method="full").trainer

    assert (lora["learning_rate"], lora["gradient_accumulation_steps"]) == (1e-4, 8)
    assert (full["learning_rate"], full["gradient_accumulation_steps"]) == (1e-5, 16)


def test_both_methods_have_the_originals_other_values():
    expected = {
        "num_train_epochs": 5,
        "per_device_train_batch_size": 1,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.01,
        "gradient_checkpointing": True,
        "logging_steps": 1,
        "save_steps": 1000,
        "save_total_limit": 10,
        "seed": 42,
    }

    for method in ("lora", "full"):
        assert recipe_of(method=method).trainer.items() >= expected.items()


def test_evaluation_takes_batches_of_the_training_size():
    two = recipe_of("trainer.per_device_train_batch_size=2").trainer
    other = recipe_of("trainer.per_device_eval_batch_size=4").trainer

    assert recipe_of().trainer["per_device_eval_batch_size"] == 1
    assert two["per_device_eval_batch_size"] == 2
    assert other["per_device_eval_batch_size"] == 4


def test_the_file_wins_over_defaults_flags_over_the_file_and_set_over_flags(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: file\noutput: file\ndata: {files: [file.json], max_length: 64}\n")

    recipe = load_recipe(
        path,
        method="lora",
        model="flag",
        output=Path("flag"),
        overrides=["output=set", "data.max_length=32"],
    )

    assert recipe.data.files == (Path("file.json"),)
    assert recipe.data.max_length == 32
    assert recipe.model == "flag"
    assert recipe.output == Path("set")


def test_one_path_needs_no_list(tmp_path: Path):
    recipe = from_file(tmp_path, SMALLEST, "data.eval_files=held out.json")

    assert recipe.data.files == (Path("a.json"),)
    assert recipe.data.eval_files == (Path("held out.json"),)


def test_a_section_whose_lines_are_all_comments_is_empty(tmp_path: Path):
    recipe = from_file(tmp_path, SMALLEST + "lora:\n#  r: 8\ntrainer:\n")

    assert recipe.lora.r == 64
    assert recipe.trainer["seed"] == 42


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("1e-5", 1e-5),
        ("1E-5", 1e-5),
        ("1.e-5", 1e-5),
        ("1.5e+3", 1500.0),
        ("-2e3", -2000.0),
        (".5", 0.5),
        ("1_000.5", 1000.5),
    ],
)
def test_numbers_are_read_as_people_write_them(tmp_path: Path, written: str, number: float):
    from_set = recipe_of(f"trainer.learning_rate={written}")
    from_yaml = from_file(tmp_path, SMALLEST + f"trainer:\n  learning_rate: {written}\n")

    assert from_set.trainer["learning_rate"] == number
    assert from_yaml.trainer["learning_rate"] == number


@pytest.mark.parametrize("written", ["'1e-5'", "1e", "e5", "v1.2e3", "2026-11-25"])
def test_what_is_no_number_stays_text(written: str):
    assert recipe_of(f"trainer.run_name={written}").trainer["run_name"] == written.strip("'")


def test_a_bare_no_is_the_strategy_of_that_name(tmp_path: Path):
    recipe = from_file(tmp_path, SMALLEST + "trainer:\n  save_strategy: no\n")

    assert recipe.trainer["save_strategy"] == "no"


def test_set_reaches_into_sections_of_sections():
    recipe = recipe_of("trainer.lr_scheduler_kwargs.min_lr=1e-6")

    assert recipe.trainer["lr_scheduler_kwargs"] == {"min_lr": 1e-6}


def test_data_that_is_held_out_is_measured_after_each_epoch():
    assert recipe_of("data.eval_share=0.1").trainer["eval_strategy"] == "epoch"
    assert "eval_strategy" not in recipe_of().trainer


def test_keeping_the_best_checkpoint_measures_with_every_checkpoint():
    trainer = recipe_of(
        "data.eval_files=[b.json]", "trainer.load_best_model_at_end=true", "trainer.save_steps=50"
    ).trainer

    assert (trainer["eval_strategy"], trainer["eval_steps"]) == ("steps", 50)


# Writing and reading again


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("trainer.learning_rate=1e-5", "trainer.run_name='1e-5'", "trainer.max_steps=7"),
        ("lora.targets=[c_attn, w1]", "lora.embeddings=false", "freeze.projector=false"),
        ("lora.targets='.*attn.*'", "data.image_root=图片", "data.eval_share=0.25"),
        ("trainer.save_strategy=no", "trainer.project='2026-11-25'", "trainer.run_name='off'"),
    ],
)
def test_a_written_recipe_loads_as_it_was(tmp_path: Path, overrides: tuple[str, ...]):
    recipe = recipe_of(*overrides)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(recipe), encoding="utf-8")

    assert load_recipe(path, method="lora") == recipe
    assert read_resolved(path) == recipe


def test_a_written_full_recipe_loads_as_it_was(tmp_path: Path):
    recipe = recipe_of(method="full")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(recipe), encoding="utf-8")

    assert "lora" not in path.read_text()
    assert read_resolved(path) == recipe


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_loads(path: Path):
    method = next((m for m in ("qlora", "lora") if m in path.stem), "full")

    load_recipe(path, method=method, model="base", data=[Path("a.json")], output=Path("runs/a"))


def test_each_methods_recipe_has_its_own_sections_and_no_others():
    texts = {m: recipe_to_yaml(recipe_of(method=m)) for m in ("full", "lora", "qlora")}

    found = {
        method: [name for name in ("lora", "quantize", "full") if f"\n{name}:\n" in text]
        for method, text in texts.items()
    }
    assert found == {"full": ["full"], "lora": ["lora"], "qlora": ["lora", "quantize"]}


def test_the_originals_values_whole_are_recipes_of_their_own():
    for method, accumulation in (("lora", 8), ("full", 16)):
        recipe = load_recipe(
            RECIPES / f"qwen_vl_{method}_original.yaml",
            method=method,
            data=[Path("a.json")],
            output=Path("runs/a"),
        )
        assert recipe.data.labels == "reference"
        assert recipe.trainer["learning_rate"] == 1e-5
        assert recipe.trainer["gradient_accumulation_steps"] == accumulation
