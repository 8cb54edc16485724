"""What a recipe may say, what comes out of it, and how its mistakes are told."""

import subprocess
import sys
from pathlib import Path

import pytest

from vltrain.config import (
    DataConfig,
    FreezeConfig,
    LoraConfig,
    MixEntry,
    Recipe,
    load_recipe,
    read_resolved,
    recipe_to_yaml,
    unknown_key,
)
from vltrain.errors import VltrainError

RECIPES = Path(__file__).parents[1] / "recipes"


def flags_only(*overrides: str, method: str = "lora") -> Recipe:
    """The recipe of `vltrain METHOD --model base --data a.json --output runs/a --set …`."""
    return load_recipe(
        None,
        method=method,
        model="base",
        data=[Path("a.json")],
        output=Path("runs/a"),
        overrides=overrides,
    )


def fault_of(*overrides: str, method: str = "lora") -> str:
    """What `vltrain` says to overrides that it refuses."""
    with pytest.raises(VltrainError) as error:
        flags_only(*overrides, method=method)
    return str(error.value)


def from_file(folder: Path, text: str, *overrides: str, method: str = "lora") -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, method=method, overrides=overrides)


def fault_in_file(folder: Path, text: str, method: str = "lora") -> str:
    with pytest.raises(VltrainError) as error:
        from_file(folder, text, method=method)
    return str(error.value)


SMALLEST = "model: base\noutput: runs/a\ndata:\n  files: a.json\n"


# What comes out


def test_three_flags_are_a_whole_recipe():
    recipe = flags_only()

    assert recipe.model == "base"
    assert recipe.output == Path("runs/a")
    assert recipe.dtype == "auto"
    assert recipe.data == DataConfig(files=(Path("a.json"),))
    assert recipe.lora == LoraConfig(r=64, alpha=16, dropout=0.05, targets=None, embeddings="auto")
    assert recipe.freeze == FreezeConfig(vision=True, projector=None, language=False)


def test_lora_learns_at_1e_4_over_8_steps_and_full_at_1e_5_over_16():
    lora, full = flags_only().trainer, flags_only(method="full").trainer

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
        assert flags_only(method=method).trainer.items() >= expected.items()


def test_evaluation_takes_batches_of_the_training_size():
    two = flags_only("trainer.per_device_train_batch_size=2").trainer
    other = flags_only("trainer.per_device_eval_batch_size=4").trainer

    assert flags_only().trainer["per_device_eval_batch_size"] == 1
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
    from_set = flags_only(f"trainer.learning_rate={written}")
    from_yaml = from_file(tmp_path, SMALLEST + f"trainer:\n  learning_rate: {written}\n")

    assert from_set.trainer["learning_rate"] == number
    assert from_yaml.trainer["learning_rate"] == number


@pytest.mark.parametrize("written", ["'1e-5'", "1e", "e5", "v1.2e3", "2026-11-25"])
def test_what_is_no_number_stays_text(written: str):
    assert flags_only(f"trainer.run_name={written}").trainer["run_name"] == written.strip("'")


def test_a_bare_no_is_the_strategy_of_that_name(tmp_path: Path):
    recipe = from_file(tmp_path, SMALLEST + "trainer:\n  save_strategy: no\n")

    assert recipe.trainer["save_strategy"] == "no"


def test_set_reaches_into_sections_of_sections():
    recipe = flags_only("trainer.lr_scheduler_kwargs.min_lr=1e-6")

    assert recipe.trainer["lr_scheduler_kwargs"] == {"min_lr": 1e-6}


def test_data_that_is_held_out_is_measured_after_each_epoch():
    assert flags_only("data.eval_share=0.1").trainer["eval_strategy"] == "epoch"
    assert "eval_strategy" not in flags_only().trainer


def test_keeping_the_best_checkpoint_measures_with_every_checkpoint():
    trainer = flags_only(
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
    recipe = flags_only(*overrides)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(recipe), encoding="utf-8")

    assert load_recipe(path, method="lora") == recipe
    assert read_resolved(path) == recipe


def test_a_written_full_recipe_loads_as_it_was(tmp_path: Path):
    recipe = flags_only(method="full")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(recipe), encoding="utf-8")

    assert "lora" not in path.read_text()
    assert read_resolved(path) == recipe


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_loads(path: Path):
    method = next((m for m in ("qlora", "lora") if m in path.stem), "full")

    load_recipe(path, method=method, model="base", data=[Path("a.json")], output=Path("runs/a"))


@pytest.mark.parametrize(
    ("method", "overrides", "words"),
    [
        ("full", ("lr.vision=1e-5",), "the vision is frozen"),
        ("lora", ("lr.projector=1e-5",), "the projector is frozen"),
        ("full", ("full.weights=residual", "dtype=fp32"), "residual weights are bf16"),
        ("full", ("full.weights=stochastic", "trainer.optim=sgd"), "an optimizer of their own"),
        ("lora", ("full.weights=fp32",), "a lora run does not learn the model's own weights"),
        ("lora", ("quantize.vision=true",), "a lora run quantizes nothing"),
        ("full", ("quantize.vision=true",), "a full run quantizes nothing"),
        ("full", ("lora.r=8",), "a full run has no adapter"),
        ("lora", ("freeze.language=true",), "LoRA adapts the language model"),
        ("lora", ("lora.start=pissa", "lora.dora=true"), "`lora.dora` does not go with"),
        ("lora", ("lora.start=pissa", "lora.rslora=true"), "`lora.rslora` does not go with"),
        ("lora", ("lora.start=pissa", "lora.rank_pattern={w1: 2}"), "`lora.rank_pattern` does"),
        ("lora", ("lora.start=pissa", "lora.continue_from=a"), "`lora.continue_from` does not"),
        ("qlora", ("lora.start=pissa",), "4 bits cannot hold"),
        ("qlora", ("quantize.vision=true", "freeze.vision=false"), "weights of 4 bits cannot"),
        ("lora", ("lora.plus=0.5",), "lora.plus"),
        ("lora", ("lora.rank_pattern={w1: 0}",), "lora.rank_pattern"),
    ],
)
def test_what_cannot_work_together_is_refused_by_its_key(method, overrides, words):
    assert words in fault_of(*overrides, method=method)


def test_each_methods_recipe_has_its_own_sections_and_no_others():
    texts = {m: recipe_to_yaml(flags_only(method=m)) for m in ("full", "lora", "qlora")}

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


# Mistakes


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("data.max_lenght=1", "data.max_length"),
        ("freeze.visoin=true", "freeze.vision"),
        ("lora.rank=8", "lora.r"),
        ("modle=x", "model"),
        ("max_length=1", "data.max_length"),
        ("learning_rate=1", "trainer.learning_rate"),
        ("loar.r=8", "lora"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(override: str, nearest: str):
    key = override.partition("=")[0]

    message = fault_of(override)

    assert f"--set {key}: `" in message
    assert "is no known key" in message
    assert f"did you mean `{nearest}`?" in message


def test_an_unknown_key_of_a_file_names_the_file(tmp_path: Path):
    message = fault_in_file(tmp_path, SMALLEST + "lorra:\n  r: 8\n")

    assert message.startswith(f"{tmp_path / 'recipe.yaml'}: `lorra` is no known key")


def test_whoever_reads_a_section_can_tell_of_an_unknown_key():
    error = unknown_key("here", "trainer.max_step", ["trainer.max_steps", "trainer.seed"])

    assert str(error) == (
        "here: `trainer.max_step` is no known key\n  fix: did you mean `trainer.max_steps`?"
    )


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("data.max_length=many", "a valid integer"),
        ("data.max_length='2048'", "a valid integer"),
        ("data.max_length=1.5", "a valid integer"),
        ("data.max_length=true", "a valid integer"),
        ("data.max_length=", "a valid integer"),
        ("data.max_length=0", "greater than or equal to 1"),
        ("data.eval_share=1", "less than 1"),
        ("data.eval_share=-0.1", "greater than or equal to 0"),
        ("data.too_long=cut", "'error' or 'drop'"),
        ("data.labels=all", "'assistant' or 'reference'"),
        ("data.format=coco", "'sharegpt' or 'swift'"),
        ("data=a.json", "a section"),
        ("lora.r=0", "greater than or equal to 1"),
        ("lora.alpha=0", "greater than 0"),
        ("lora.dropout=1", "less than 1"),
        ("lora.embeddings=maybe", "'auto', or should be a valid boolean"),
        ("lora.targets=3", "a list, or should be a text"),
        ("freeze.vision=1", "a valid boolean"),
        ("dtype=float8", "'auto', 'bf16', 'fp16' or 'fp32'"),
        ("model=", "a text"),
    ],
)
def test_a_value_of_the_wrong_kind_names_its_key_and_what_is_wanted(override: str, wanted: str):
    key = override.partition("=")[0]

    message = fault_of(override)

    assert message.startswith(f"--set {key}: `{key}` is ")
    assert wanted in message


def test_all_mistakes_of_a_recipe_are_told_together(tmp_path: Path):
    message = fault_in_file(tmp_path, "data:\n  max_length: few\nlora:\n  rr: 8\n")

    for key in ("`model`", "`output`", "`data.files`", "`data.max_length`", "`lora.rr`"):
        assert key in message


@pytest.mark.parametrize(
    ("missing", "advice"),
    [("model", "give --model"), ("output", "give --output"), ("data", "give --data")],
)
def test_what_is_missing_is_asked_for_by_its_flag(missing: str, advice: str):
    given = {"model": "base", "data": [Path("a.json")], "output": Path("runs/a")}
    del given[missing]

    with pytest.raises(VltrainError) as error:
        load_recipe(None, method="lora", **given)

    assert advice in str(error.value)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("trainer.output_dir=x", "set output instead"),
        ("trainer.remove_unused_columns=true", "hold the pictures"),
        ("trainer.resume_from_checkpoint=x", "start it again"),
        ("trainer.deepspeed=zero2.json", "set deepspeed: zero2"),
        ("trainer.label_smoothing_factor=0.1", "labels that are not shifted"),
    ],
)
def test_what_vltrain_sets_itself_is_refused_with_the_reason(override: str, reason: str):
    assert reason in fault_of(override)


def test_two_ways_to_hold_data_out_contradict_each_other():
    assert "keep the one that you mean" in fault_of("data.eval_files=b.json", "data.eval_share=0.1")


def test_a_file_to_learn_from_is_none_to_evaluate_on():
    fault = fault_of("data.files=[a.json, b.json]", "data.eval_files=b.json")

    assert "b.json is learned from and evaluated on" in fault


@pytest.mark.parametrize("key", ["load_best_model_at_end=true", "eval_strategy=steps"])
def test_an_eval_loss_needs_data_to_measure_it_on(key: str):
    assert "give data.eval_files or data.eval_share" in fault_of(f"trainer.{key}")


def test_packed_rows_have_no_other_order_than_their_own():
    fault = fault_of("data.packing=true", "trainer.train_sampling_strategy=group_by_length")

    assert "`group_by_length` is asked for" in fault
    assert "data.packing: false" in fault


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("batch.samples=8", "data.packing=false"), "set data.packing: true"),
        (
            ("batch.samples=8", "data.packing=true", "trainer.gradient_accumulation_steps=8"),
            "and trainer.gradient_accumulation_steps too",
        ),
        (("data.row_tokens=4096", "data.packing=false"), "this recipe are not packed"),
        (("batch.samples=8", "data.streaming=true", "trainer.max_steps=9"), "are not packed"),
        (
            ("data.row_tokens=1024", "data.packing=true"),
            "a row of 1024 tokens does not hold a sample of data.max_length (2048)",
        ),
    ],
)
def test_steps_and_rows_that_contradict_each_other_are_refused(overrides, words):
    assert words in fault_of(*overrides)


def test_a_step_said_in_samples_comes_whole(tmp_path: Path):
    recipe = from_file(tmp_path, SMALLEST + "  packing: true\nbatch: {samples: 8}\n")

    assert recipe.batch.samples == 8
    assert recipe.trainer["gradient_accumulation_steps"] == 1
    assert from_file(tmp_path, recipe_to_yaml(recipe)) == recipe


def test_a_mix_names_files_with_weights_or_numbers_of_samples(tmp_path: Path):
    text = SMALLEST.replace("a.json", "[a.json, b.json]") + (
        "  mix:\n  - {file: a.json, weight: 2}\n  - {file: b.json, samples: 100}\n"
    )

    recipe = from_file(tmp_path, text)

    assert recipe.data.mix == (
        MixEntry(Path("a.json"), weight=2.0),
        MixEntry(Path("b.json"), samples=100),
    )
    assert from_file(tmp_path, recipe_to_yaml(recipe)) == recipe


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ("[{file: c.json, weight: 1}]", "names c.json, which is none of data.files"),
        ("[{file: a.json}]", "gives neither weight nor samples for a.json"),
        ("[{file: a.json, weight: 1, samples: 2}]", "gives weight and samples for a.json"),
        ("[{file: a.json, weight: 1}, {file: a.json, weight: 2}]", "names a.json 2 times"),
        ("[{file: a.json, weight: 0}, {file: b.json, samples: 0}]", "shows no sample of any file"),
        ("[{file: a.json, weight: -1}]", "`data.mix.weight` is -1"),
        ("[{file: a.json, samples: 1.5}]", "`data.mix.samples` is 1.5"),
        ("[{file: a.json, wieght: 1}]", "did you mean `data.mix.weight`?"),
        ("[{weight: 1}]", "`data.mix.file`"),
        ("{a.json: 2}", "`data.mix` is"),
    ],
)
def test_a_mix_that_cannot_be_meant_is_refused(entries: str, words: str):
    assert words in fault_of("data.files=[a.json, b.json]", f"data.mix={entries}")


def test_a_mix_has_no_order_of_its_own():
    fault = fault_of(
        "data.files=[a.json]",
        "data.mix=[{file: a.json, weight: 2}]",
        "trainer.train_sampling_strategy=sequential",
    )

    assert "`sequential` is asked for" in fault


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.max_steps=-1", "set trainer.max_steps"),
        ("data.packing=true", "lengths are not known before"),
        ("data.eval_share=0.1", "cannot be held out of records"),
        ("data.mix=[{file: train.json, weight: 2}]", "a mix draws from files"),
        ("trainer.train_sampling_strategy=group_by_length", "the order of a stream"),
    ],
)
def test_what_needs_records_that_are_known_is_refused_of_a_stream(override: str, words: str):
    streamed = ("data.files=train.json", "data.streaming=true", "trainer.max_steps=10")

    assert words in fault_of(*streamed, override)


def test_a_full_run_with_every_part_frozen_is_refused():
    parts = [f"freeze.{part}=true" for part in ("vision", "projector", "language")]

    assert "nothing would learn" in fault_of(*parts, method="full")


def test_a_full_run_refuses_the_settings_of_an_adapter():
    assert "a full run has no adapter" in fault_of("lora.r=8", method="full")


def test_a_recipe_for_another_command_is_refused(tmp_path: Path):
    message = fault_in_file(tmp_path, SMALLEST + "method: full\n")

    assert "the recipe is for `vltrain full`, the command is `vltrain lora`" in message


@pytest.mark.parametrize("override", ["data.max_length", "=3", ""])
def test_an_override_is_a_key_and_a_value(override: str):
    assert "is not KEY=VALUE" in fault_of(override)


def test_an_override_below_a_value_is_refused():
    assert "`output` is a value, not a section" in fault_of("output.x=1")


def test_a_tilde_in_a_recipe_is_the_home_directory(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")

    written = "model: a\noutput: ~/run\ndata:\n  files: ~/train.json\n  image_root: ~/pictures\n"
    recipe = from_file(tmp_path, written)

    assert recipe.output == Path("/home/ann/run")
    assert recipe.data.files == (Path("/home/ann/train.json"),)
    assert recipe.data.image_root == Path("/home/ann/pictures")


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path: Path):
    message = fault_in_file(tmp_path, "model: a\noutput: b\nmodel: c\n")

    assert message.startswith(
        f"{tmp_path / 'recipe.yaml'}:3: is not YAML: `model` is written twice"
    )


def test_a_placeholder_that_nobody_filled_in_is_told_with_its_line(tmp_path: Path):
    assert "recipe.yaml:1: is not YAML" in fault_in_file(tmp_path, "model: {{MODEL}}\n")


def test_broken_yaml_is_told_with_its_line(tmp_path: Path):
    assert "recipe.yaml:2: is not YAML" in fault_in_file(tmp_path, "model: a\ndata: ]\n")


@pytest.mark.parametrize("text", ["- model\n", "just words\n", "3\n"])
def test_a_recipe_is_a_mapping(tmp_path: Path, text: str):
    assert "a recipe is a mapping" in fault_in_file(tmp_path, text)


def test_a_recipe_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(VltrainError, match=r"nowhere.yaml: the recipe cannot be read"):
        load_recipe(tmp_path / "nowhere.yaml", method="lora")


def test_reading_a_recipe_imports_nothing_heavy():
    program = (
        "import sys, vltrain.config\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.stdout == "[]\n"
