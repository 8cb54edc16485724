"""Whether a run keeps what its frozen vision tower makes of pictures, and where."""

import logging
from dataclasses import replace
from functools import partial
from math import prod

import PIL
import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from vltrain import __version__
from vltrain.config import Recipe
from vltrain.data.dataset import SampleDataset
from vltrain.data.feature_store import FEATURES_FOLDER, FeatureStore, feature_key, no_room
from vltrain.data.pictures import default_cache_dir
from vltrain.data.streaming import SampleStream
from vltrain.errors import VltrainError
from vltrain.models.family import Family, FeatureStage
from vltrain.models.features import compute_features, frozen_stage, stage_fingerprint
from vltrain.models.loading import DTYPES
from vltrain.training.activations import SEEING
from vltrain.training.agreement import from_all
from vltrain.training.arguments import run_dtype
from vltrain.training.engines import Engine
from vltrain.training.features import BATCH_ON_GPU, fill, look_through
from vltrain.training.memory import GIB
from vltrain.training.moments import Features
from vltrain.workflows.run_data import Halves

logger = logging.getLogger(__name__)

FEATURE_FORMAT = 1  # raised when pictures are opened, or values computed or written, otherwise
SPARE_BYTES = GIB  # that stay free on the disk


def keep_features(
    console: Console,
    recipe: Recipe,
    family: Family,
    model: PreTrainedModel | PeftModel,
    halves: Halves,
    arguments: TrainingArguments,
    engine: Engine,
) -> None:
    """Let a run's samples give features in the place of pixels, where its recipe says so.

    What is not kept yet is computed first, up to the recipe's limit and the disk's.

    Raises:
        VltrainError: the recipe wants it, and it cannot be.
    """
    wanted = recipe.data.cache_features
    if wanted is False:
        return
    say = partial(console.print, soft_wrap=True, highlight=False)
    stage = frozen_stage(model, family)
    against = reason_against(stage, halves, engine)
    if against is not None and wanted is True:
        raise VltrainError.at(
            "data.cache_features", what=f"cannot be: {against}", fix="set data.cache_features: auto"
        )
    if against is None and wanted == "auto" and epochs(arguments, halves) <= 1:
        against = "each picture is shown once"
    if against is not None or stage is None:
        say(f"features: computed in each step; {against}")
        return
    autocast = autocast_of(arguments, engine)
    store = store_of(recipe, family, model, stage, halves, autocast)
    store.open()
    datasets = datasets_of(halves)
    lacking, shown = look_through(store, datasets)
    room = room_for(recipe, store, len(lacking))
    lacked, shown, room = from_all([(len(lacking), shown, room)])[0]
    if room < lacked and wanted == "auto":
        say(f"features: computed in each step; those of {lacked:,} pictures do not fit")
        return
    size = room * store.bytes_each / GIB
    say(f"features: {shown:,} pictures, {shown - lacked:,} of them kept before")
    if room:
        say(f"features: computing {room:,} ({size:,.2f} GiB), to keep in {store.folder}")
    if room < lacked:
        logger.warning(
            "features of %s pictures do not fit data.features_max_gib (%s): they are computed "
            "each time",
            f"{lacked - room:,}",
            f"{recipe.data.features_max_gib:g}",
        )
    if not getattr(model, "is_quantized", False):  # quantized ones are read onto their device
        model.to(arguments.device)
    dtype = getattr(torch, store.dtype)
    compute = partial(compute_features, model, stage, dtype=dtype, autocast=autocast)
    fill(store, datasets, lacking[:room], compute, arguments, say)
    for half in datasets:
        half.reader = replace(half.reader, features=store)


def features_of(
    recipe: Recipe,
    config: PreTrainedConfig,
    stage: FeatureStage | None,
    engine: Engine,
    arguments: TrainingArguments,
    halves: Halves | None,
) -> Features | None:
    """The features that a run's steps will read, as far as that shows before its weights do.

    Where other runs' features or a full disk leave no room, a run computes its own in each step
    all the same.

    Args:
        config: of the model.
        stage: the last on a picture's way up to which nothing learns.
        halves: the run's data; None where it is not known, and then takes no more than it may.

    Returns:
        None where pictures come as pixels.
    """
    wanted = recipe.data.cache_features
    if wanted is False or stage is None or reason_against(stage, halves, engine) is not None:
        return None
    if wanted == "auto" and (recipe.data.streaming or epochs(arguments, halves) <= 1):
        return None
    if halves is not None:
        shown = sum(int(half.image_counts.sum()) for half in datasets_of(halves))
        each = prod(stage.shape(config)) * DTYPES[run_dtype(recipe)].itemsize
        if shown * each > recipe.data.features_max_gib * GIB:
            return None
    return Features(tuple(part for part in SEEING if part in stage.fed_by), BATCH_ON_GPU)


def datasets_of(halves: Halves) -> list[SampleDataset]:
    """What a run shows pictures of, as far as it is known before."""
    return [h for h in (halves.train, halves.evaluation) if isinstance(h, SampleDataset)]


def reason_against(stage: FeatureStage | None, halves: Halves | None, engine: Engine) -> str | None:
    """Why features cannot be kept; None: they can."""
    if stage is None:
        return "the vision tower learns"
    if engine.shards_weights:
        return f"{engine} shares out the weights that they follow from"
    if halves is not None and isinstance(halves.train, SampleStream):
        return "records are streamed"
    return None


def epochs(arguments: TrainingArguments, halves: Halves | None) -> float:
    """How many times a run shows each sample, about; 0 where that depends on its data, and they
    are not known."""
    if arguments.max_steps <= 0:
        return arguments.num_train_epochs
    if halves is None:
        return 0.0
    step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return arguments.max_steps * step * arguments.world_size / halves.epoch_units[0]


def autocast_of(arguments: TrainingArguments, engine: Engine) -> torch.dtype | None:
    """The dtype of a step's matrix products, where it is not that of the weights by itself."""
    if engine.name == "deepspeed":  # it computes in the weights' dtype
        return None
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None


def store_of(
    recipe: Recipe,
    family: Family,
    model: PreTrainedModel | PeftModel,
    stage: FeatureStage,
    halves: Halves,
    autocast: torch.dtype | None,
) -> FeatureStore:
    """Where the features of a run's pictures are kept; all that feeds them names the folder."""
    dtype = DTYPES[run_dtype(recipe)]
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    parts = (
        f"{FEATURE_FORMAT} {__version__} Pillow {PIL.__version__}",
        halves.train.reader.processor.pixels_fingerprint,
        f"{stage.input_name} {stage_fingerprint(model, family, stage)}",
        f"{dtype} {autocast}",
        "cuda" if torch.cuda.is_available() else "cpu",
    )
    root = recipe.data.cache_dir or default_cache_dir()
    return FeatureStore(
        root.absolute() / FEATURES_FOLDER / feature_key(parts),
        stage.input_name,
        stage.shape(base.config),
        str(dtype).removeprefix("torch."),
    )


def room_for(recipe: Recipe, store: FeatureStore, lacking: int) -> int:
    """How many of the lacking pictures fit the recipe's limit.

    Raises:
        VltrainError: the recipe wants them kept, and the disk has no room.
    """
    data = recipe.data
    allowed = min(lacking, store.room(int(data.features_max_gib * GIB)))
    on_disk = store.disk_room(SPARE_BYTES)
    if allowed > on_disk and data.cache_features is True:
        raise no_room(store.folder, allowed * store.bytes_each, on_disk * store.bytes_each)
    return min(allowed, on_disk)
