"""How the mistakes of a recipe are told."""

import subprocess
import sys
from pathlib import Path

import pytest
from recipe_files import SMALLEST, fault_in_file, fault_of, from_file

from vltrain.config import (
    MixEntry,
    load_recipe,
    recipe_to_yaml,
    unknown_key,
)
from vltrain.errors import VltrainError


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
