"""The recipe: one file, one reading, one frozen section for each part of a run.

A recipe is YAML. `load_recipe` lays four things over each other, the later ones winning: the
method's built-in defaults, the file, `--model|--data|--output`, and every `--set KEY=VALUE`. What
comes out is checked whole and has no gaps; `recipe_to_yaml` writes it so that it loads again as it
was. Relative paths are relative to the working directory, wherever the recipe file lies.

Nothing here imports torch: the `trainer:` section holds `transformers.TrainingArguments`' own names
and is given to it by the workflow that trains.
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import ConfigDict, TypeAdapter, ValidationError

from vltrain.data_config import (
    BatchConfig,
    DataConfig,
    MixEntry,
    batch_faults,
    data_faults,
    settled_packing,
)
from vltrain.errors import VltrainError
from vltrain.method_config import (
    FOREIGN_SECTIONS,
    FreezeConfig,
    FullConfig,
    LearningRates,
    LoraConfig,
    Method,
    QuantizeConfig,
    foreign_sections,
    method_faults,
)
from vltrain.recipe_types import STRICT, Fault, UserPath
from vltrain.recipe_yaml import parse_yaml, read_yaml, to_yaml
from vltrain.trainer_config import (
    METHOD_DEFAULTS,
    TRAINER_DEFAULTS,
    trainer_faults,
    with_defaults,
)

Dtype = Literal["auto", "bf16", "fp16", "fp32"]
EngineChoice = Literal["auto", "ddp", "deepspeed", "fsdp2"]


@dataclass(frozen=True)
class Recipe:
    """One run, whole: what learns, from what, how, and where the result goes."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    method: Method
    model: Annotated[str, MinLen(1)]  # a folder, or a name on the hub with an optional @revision
    output: UserPath
    data: DataConfig
    dtype: Dtype = "auto"  # of the weights; auto: bf16 on a GPU that has it, fp32 on a CPU
    engine: EngineChoice = "auto"  # spreads a run over processes; auto: by size, GPUs and memory
    deepspeed: str | None = None  # a name of ds_configs/ (zero1, zero2, zero3, …) or a file's path
    lora: LoraConfig = field(default_factory=LoraConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    full: FullConfig = field(default_factory=FullConfig)
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    lr: LearningRates = field(default_factory=LearningRates)
    batch: BatchConfig = field(default_factory=BatchConfig)
    # The layers. auto, as where a recipe says nothing of recomputing: on a GPU, if it is known to
    # work there.
    compile: Literal["auto"] | bool = False
    # How layers are run, in the place of trainer.gradient_checkpointing. fast: none is recomputed;
    # lean: all, compiled ones within; auto, as where a recipe says nothing of recomputing: on a GPU
    # as few, or of compiled ones as little, as its memory asks for, by the estimate, and elsewhere
    # all. A number: the share that compiled layers keep, at most, of what they would.
    memory: Literal["fast", "auto", "lean"] | Annotated[float, Gt(0), Lt(1)] | None = None
    memory_check: bool = True  # refuse what cannot fit the GPU, by the estimate, before loading
    stop_after_nonfinite: Annotated[int, Ge(1)] = 3  # steps in a row with a NaN or infinite loss
    trainer: dict[str, Any] = field(default_factory=dict)  # TrainingArguments, its own names

    @property
    def arranges_layers(self) -> bool:
        """Whether the recipe says itself how layers are run, in the place of transformers."""
        return self.compile is not False or self.memory is not None

    @property
    def needs_processes(self) -> bool:
        """Whether the engine wants processes that know of each other, even where it is one."""
        return self.engine in ("deepspeed", "fsdp2") or self.deepspeed is not None


SECTIONS = {
    "data": DataConfig,
    "lora": LoraConfig,
    "quantize": QuantizeConfig,
    "full": FullConfig,
    "freeze": FreezeConfig,
    "lr": LearningRates,
    "batch": BatchConfig,
}

RECOMPUTING = (
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
)
"""Keys of `trainer:` that say how layers are run: a recipe with one of them has its own way."""

NEEDED = {
    "model": "give --model, or `model:` in the recipe: a folder of weights or a name on the hub",
    "output": "give --output, or `output:` in the recipe: the directory the run is written to",
    "data": "give --data, or `data.files` in the recipe: the conversations to learn from",
    "data.files": "give --data, or `data.files` in the recipe: the conversations to learn from",
}


def load_recipe(
    path: Path | None,
    *,
    method: Method,
    model: str | None = None,
    data: Sequence[Path] = (),
    output: Path | None = None,
    overrides: Sequence[str] = (),
) -> Recipe:
    """The checked recipe of one run.

    Args:
        path: the YAML file; None for the method's defaults alone.
        method: the command; a file that states another `method:` is refused.
        model, data, output: short for `model`, `data.files` and `output`; they win over the file.
        overrides: "KEY=VALUE" with a dotted key and a YAML value; they win over everything.

    Raises:
        VltrainError: an unreadable file, an unknown or missing key, a value of the wrong type or
            out of range; all of a recipe's mistakes at once, each with where it was written.
    """
    where = str(path) if path else "the recipe"
    values = read_yaml(path) if path else {}
    origins: dict[str, str] = {}
    stated = values.setdefault("method", method)
    if stated != method:
        raise VltrainError.at(
            where,
            what=f"the recipe is for `vltrain {stated}`, the command is `vltrain {method}`",
            fix=f"run `vltrain {stated}`, or take `method:` out of the recipe",
        )
    given = (
        ("--model", "model", model),
        ("--data", "data.files", [str(file) for file in data] or None),
        ("--output", "output", None if output is None else str(output)),
    )
    for flag, key, value in given:
        if value is not None:
            _place(values, key, value, flag)
            origins[key] = flag
    for override in overrides:
        key, value = _parse_override(override)
        _place(values, key, value, f"--set {key}")
        origins[key] = f"--set {key}"
    return _checked(values, method, where, origins)


def read_resolved(path: Path) -> Recipe:
    """The recipe that a run wrote beside its weights, whatever its method.

    Raises:
        VltrainError: as `load_recipe`; also a file that does not say its method.
    """
    method = read_yaml(path).get("method")
    if method not in METHOD_DEFAULTS:
        known = " or ".join(METHOD_DEFAULTS)
        raise VltrainError.at(
            str(path), what=f"`method` is {method!r}, not {known}", fix="name another directory"
        )
    return load_recipe(path, method=method)


def recipe_to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal one."""
    values = TypeAdapter(Recipe).dump_python(recipe, mode="json")
    for section in foreign_sections(recipe.method):
        del values[section]
    return to_yaml(values)


def unknown_key(where: str, key: str, known: Iterable[str]) -> VltrainError:
    """The error for a key that nothing reads; it names the nearest one that something does."""
    near = _nearest(key, list(known))
    return VltrainError.at(where, what=f"`{key}` is no known key", fix=f"did you mean `{near}`?")


def _nearest(key: str, known: Sequence[str]) -> str:
    """The known dotted key most like `key`: in its own section, else by its last word."""
    section, _, leaf = key.rpartition(".")
    leaves = {name.rpartition(".")[2]: name for name in known}
    siblings = {name.removeprefix(f"{section}."): name for name in known if _lies_in(name, section)}
    for choices, cutoff in ((siblings, 0.6), (leaves, 0.8)):
        if found := difflib.get_close_matches(leaf, choices, n=1, cutoff=cutoff):
            return choices[found[0]]
    return difflib.get_close_matches(key, known, n=1, cutoff=0)[0]


def _lies_in(key: str, section: str) -> bool:
    return key.rpartition(".")[0] == section


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise VltrainError.at(
            f"--set {override}", what="is not KEY=VALUE", fix="write --set data.max_length=1024"
        )
    key = key.strip()
    return key, parse_yaml(text, where=f"--set {key}")


def _place(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Write `value` at a dotted key, making the sections on the way."""
    *sections, leaf = key.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise VltrainError.at(
                where, what=f"`{section}` is a value, not a section", fix="set the key itself"
            )
    values[leaf] = value


def _checked(values: dict[str, Any], method: Method, where: str, origins: dict[str, str]) -> Recipe:
    for section in foreign_sections(method):
        if values.get(section):
            why, instead = FOREIGN_SECTIONS[section]
            fix = f"take out `{section}:`, or {instead}"
            raise VltrainError.at(where, what=f"a {method} run {why}", fix=fix)
    # A section with every line commented out is null in YAML and empty to its writer.
    empty = {key: {} for key in (*SECTIONS, "trainer") if key in values and values[key] is None}
    values = values | empty
    trainer = values.get("trainer", {})
    if not (isinstance(trainer, dict) and any(key in trainer for key in RECOMPUTING)):
        values = {"compile": "auto", "memory": "auto"} | values
    data = values.get("data")
    for key in ("files", "eval_files"):
        if isinstance(data, dict) and isinstance(data.get(key), str):
            data[key] = [data[key]]
    try:
        recipe = TypeAdapter(Recipe).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        problems = _problems(error, where, origins)
        raise VltrainError("\n".join(str(problem) for problem in problems)) from None
    recipe = replace(recipe, data=settled_packing(recipe.data, recipe.batch, recipe.trainer))
    for key, what, fix in _contradictions(recipe):
        raise VltrainError.at(_origin(key, where, origins), what=what, fix=fix)
    trainer = with_defaults(recipe.trainer, recipe.method, recipe.data, recipe.batch)
    return replace(recipe, trainer=trainer)


def _contradictions(recipe: Recipe) -> Iterator[Fault]:
    """Combinations that cannot work, whatever the data, the model and the machine."""
    yield from trainer_faults(recipe.trainer)
    if recipe.deepspeed is not None and recipe.engine in ("ddp", "fsdp2"):
        yield (
            "deepspeed",
            f"engine is {recipe.engine}, and deepspeed: {recipe.deepspeed} is given",
            "take out deepspeed, or set engine: deepspeed",
        )
    if isinstance(recipe.memory, float) and recipe.compile is False:
        yield (
            "memory",
            f"memory: {recipe.memory} is a share of what compiled layers keep, and none is",
            "set compile: true, or memory: fast, auto or lean",
        )
    if recipe.arranges_layers and recipe.trainer.get("gradient_checkpointing_kwargs"):
        yield (
            "trainer.gradient_checkpointing_kwargs",
            "with `compile` or `memory` layers are not recomputed by transformers, whose settings "
            "these are",
            "take them out, or the other two",
        )
    yield from data_faults(recipe.data, recipe.trainer)
    yield from batch_faults(recipe.batch, recipe.data, recipe.trainer)
    if recipe.data.cache_features is True and not recipe.freeze.vision:
        yield (
            "data.cache_features",
            "the vision tower learns (freeze.vision: false): what it makes of a picture changes "
            "with every step",
            "set data.cache_features: false, or freeze.vision: true",
        )
    yield from method_faults(
        recipe.method,
        recipe.dtype,
        recipe.lora,
        recipe.freeze,
        recipe.quantize,
        recipe.full,
        recipe.lr,
        recipe.trainer,
    )


def _known_keys() -> list[str]:
    """Every key of a recipe, dotted; of `trainer:` those that have a default."""
    keys = [f.name for f in fields(Recipe)]
    for name, section in SECTIONS.items():
        keys += [f"{name}.{f.name}" for f in fields(section)]
    keys += [f"data.mix.{f.name}" for f in fields(MixEntry)]
    return keys + [f"trainer.{name}" for name in TRAINER_DEFAULTS | METHOD_DEFAULTS["full"]]


def _origin(key: str, where: str, origins: dict[str, str]) -> str:
    """The flag that wrote a key, its section or something in it; else the recipe itself."""
    for written, flag in reversed(origins.items()):  # the last to write wins
        if f"{key}.".startswith(f"{written}.") or written.startswith(f"{key}."):
            return flag
    return where


def _problems(error: ValidationError, where: str, origins: dict[str, str]) -> list[VltrainError]:
    """pydantic's findings in the words of the recipe: one error for each key."""
    known = _known_keys()
    wanted: dict[str, list[str]] = {}
    problems: dict[str, VltrainError] = {}
    for finding in error.errors(include_url=False):
        names = [part for part in finding["loc"] if isinstance(part, str)]  # no list's index
        key = ".".join(names)
        if finding["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            problems[key] = unknown_key(_origin(key, where, origins), key, known)
            continue
        while key not in known and names:  # the name of a union's branch
            names.pop()
            key = ".".join(names)
        if key in NEEDED and finding["type"] in ("missing", "too_short"):
            problems[key] = problems.get(key) or VltrainError.at(
                where, what=f"no `{key}`", fix=NEEDED[key]
            )
            continue
        wanted.setdefault(key, []).append(_in_words(finding["msg"]))
        value = json.dumps(finding["input"], ensure_ascii=False)
        problems[key] = VltrainError.at(
            _origin(key, where, origins),
            what=f"`{key}` is {value}",
            fix="it " + ", or ".join(dict.fromkeys(wanted[key])),
        )
    return list(problems.values())


def _in_words(message: str) -> str:
    words = {"Input ": "", "valid array": "list", "valid string": "text", "an object": "a section"}
    for theirs, ours in words.items():
        message = message.replace(theirs, ours)
    return message
