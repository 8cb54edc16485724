"""The section of a recipe that says what is learned from, and what it contradicts itself in."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import ConfigDict

from vltrain.recipe_types import STRICT, Fault, UserPath


@dataclass(frozen=True)
class MixEntry:
    """How many of one file's samples an epoch shows: by `weight` or by `samples`."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    file: UserPath  # one of data.files
    weight: Annotated[float, Ge(0)] | None = None  # times an epoch shows each: 2.0 twice
    samples: Annotated[int, Ge(0)] | None = None  # how many of them an epoch shows

    def shown(self, available: int) -> int:
        """Samples of the file that an epoch shows, where there are so many."""
        if self.weight is None:
            return self.samples or 0
        return math.floor(self.weight * available + 0.5)


@dataclass(frozen=True)
class DataConfig:
    """Which files to learn from and how long a sample may be."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    files: Annotated[tuple[UserPath, ...], MinLen(1)]  # one alone may be written without brackets
    format: Literal["auto", "qwen_vl", "messages", "llava", "sharegpt", "swift"] = "auto"
    eval_files: tuple[UserPath, ...] = ()
    eval_share: Annotated[float, Ge(0), Lt(1)] = 0.0  # of the training samples, kept for evaluation
    image_root: UserPath | None = None  # where relative picture paths start; None: beside the file
    allow_urls: bool = False  # download pictures that are http(s) URLs
    url_timeout: Annotated[float, Gt(0)] = 20.0  # seconds of one try, until the last byte is here
    url_max_bytes: Annotated[int, Ge(1)] = 50_000_000  # of one downloaded picture
    url_retries: Annotated[int, Ge(0)] = 2  # after a timeout, a 5xx and a 429
    url_private: bool = False  # fetch from this machine and networks that are not public, too
    bad_pictures: Literal["error", "drop"] = "error"  # drop: leave out records that show one
    cache_dir: UserPath | None = None  # of downloads and checked data; None: the user's cache
    # Keep what a frozen vision tower makes of each picture. auto: where it is shown more than once,
    # and all of it fits.
    cache_features: Literal["auto"] | bool = False
    features_max_gib: Annotated[float, Gt(0)] = 100.0  # that the features of all runs may take
    max_length: Annotated[int, Ge(1)] = 2048  # tokens, image tokens included
    too_long: Literal["error", "drop"] = "error"  # cutting a sample could cut an image in two
    mix: tuple[MixEntry, ...] = ()  # what an epoch shows of a file; of others, each sample once
    # Rows of up to row_tokens tokens hold several samples each. auto: on a GPU those of a
    # step, which learns from the same samples as without; elsewhere where row_tokens is given.
    packing: Literal["auto"] | bool = "auto"
    # Tokens of a packed row. auto: data.max_length; of a step's samples, on a GPU, at least 8,192
    # or as many as its memory takes.
    row_tokens: Literal["auto"] | Annotated[int, Ge(1)] = "auto"
    streaming: bool = False  # read records as they come, over and over; needs trainer.max_steps
    shuffle_buffer: Annotated[int, Ge(1)] = 10_000  # records that streaming draws the next from
    labels: Literal["assistant", "reference"] = "assistant"  # reference: as the original learns

    @property
    def packs(self) -> bool:
        """Whether rows hold several samples; what is left to the machine is settled before."""
        return self.packing is True

    @property
    def has_eval(self) -> bool:
        """Whether the run measures an eval loss."""
        return bool(self.eval_files) or self.eval_share > 0


@dataclass(frozen=True)
class BatchConfig:
    """How much a step learns from, said in samples."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    samples: Annotated[int, Ge(1)] | None = None  # of a step, all processes together; None: by rows


def settled_packing(data: DataConfig, batch: BatchConfig, trainer: dict[str, Any]) -> DataConfig:
    """The section with packing decided, as far as the recipe itself says whether it can be."""
    if data.packing != "auto":
        return data
    if batch.samples is not None:
        return replace(data, packing=not data.streaming)
    as_samples_come = (
        data.streaming
        or trainer.get("train_sampling_strategy", "random") != "random"
        or trainer.get("dataloader_drop_last", False)
        or trainer.get("auto_find_batch_size", False)
        # Its noise is less the longer a row is.
        or (data.row_tokens == "auto" and trainer.get("neftune_noise_alpha") is not None)
    )
    return replace(data, packing=False) if as_samples_come else data


def batch_faults(batch: BatchConfig, data: DataConfig, trainer: dict[str, Any]) -> Iterator[Fault]:
    """Steps that are said in two ways, or that nothing packs."""
    if batch.samples is None:
        return
    if data.streaming:
        what = "batch.samples packs the samples of a step, and streamed ones are not packed"
        yield "batch.samples", what, "say it by trainer.gradient_accumulation_steps"
    elif not data.packing:
        yield (
            "batch.samples",
            "batch.samples packs the samples of a step, and data.packing is false",
            "set data.packing: true, or say it by trainer.gradient_accumulation_steps",
        )
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if trainer.get(key, 1) != 1:
            yield (
                f"trainer.{key}",
                f"batch.samples says how many samples make a step, and trainer.{key} too",
                "keep one of the two",
            )


def data_faults(data: DataConfig, trainer: dict[str, Any]) -> Iterator[Fault]:
    """Combinations that cannot work, whatever is in the files."""
    yield from _held_out_faults(data)
    if data.streaming:
        yield from _streaming_faults(data, trainer)
    yield from _row_faults(data)
    yield from _mix_faults(data)
    yield from _order_faults(data, trainer)
    yield from _evaluation_faults(data, trainer)


def _held_out_faults(data: DataConfig) -> Iterator[Fault]:
    """What is to be evaluated on, said twice or learned from."""
    if data.eval_files and data.eval_share:
        yield (
            "data.eval_share",
            "both data.eval_files and data.eval_share are given",
            "keep the one that you mean",
        )
    both = [str(file) for file in data.eval_files if file in data.files]
    if both:
        yield (
            "data.eval_files",
            f"{', '.join(both)} is learned from and evaluated on",
            "evaluate on a file of its own, or on data.eval_share of this one",
        )


def _streaming_faults(data: DataConfig, trainer: dict[str, Any]) -> Iterator[Fault]:
    """What a recipe asks of a stream that only files allow which are read before."""
    known = "take it out, or set data.streaming: false"
    if data.cache_features is True:
        what = "pictures of streamed records are not known before they come"
        yield "data.cache_features", what, known
    if trainer.get("max_steps", -1) < 1:
        what = "a stream has no end, and the run no number of steps"
        yield "trainer.max_steps", what, "set trainer.max_steps"
    if data.packing:
        yield "data.packing", "lengths are not known before records are streamed", known
    if data.eval_share:
        what = "a share cannot be held out of records that are not known before"
        yield "data.eval_share", what, "give data.eval_files, or set data.streaming: false"
    if data.mix:
        what = "a mix draws from files whose records are known, and they are streamed"
        yield "data.mix", what, known
    if trainer.get("train_sampling_strategy", "random") != "random":
        what = "the order of a stream is that of its files, through a buffer"
        yield "trainer.train_sampling_strategy", what, known


def _row_faults(data: DataConfig) -> Iterator[Fault]:
    """Rows of a length that nothing has, or that not every sample fits."""
    if data.row_tokens == "auto":
        return
    if not data.packing:
        yield (
            "data.row_tokens",
            "rows are packed samples, and those of this recipe are not packed",
            "take it out" if data.streaming else "take it out, or set data.packing: true",
        )
    elif data.row_tokens < data.max_length:
        yield (
            "data.row_tokens",
            f"a row of {data.row_tokens} tokens does not hold a sample of data.max_length "
            f"({data.max_length})",
            "raise data.row_tokens, or lower data.max_length",
        )


def _mix_faults(data: DataConfig) -> Iterator[Fault]:
    """Entries of `data.mix` that name no file of the run, or say nothing of it."""
    named = [entry.file for entry in data.mix]
    for entry in data.mix:
        if entry.file not in data.files:
            files = ", ".join(map(str, data.files))
            yield (
                "data.mix",
                f"data.mix names {entry.file}, which is none of data.files",
                f"name one of {files}",
            )
        if named.count(entry.file) > 1:
            times = named.count(entry.file)
            yield "data.mix", f"data.mix names {entry.file} {times} times", "name it once"
        if (entry.weight is None) == (entry.samples is None):
            given = "neither weight nor samples" if entry.weight is None else "weight and samples"
            yield "data.mix", f"data.mix gives {given} for {entry.file}", "give one of the two"
    if data.mix and {e.file for e in data.mix if not e.weight and not e.samples} >= {*data.files}:
        yield (
            "data.mix",
            "data.mix shows no sample of any file",
            "raise a weight or `samples` above 0",
        )


def _order_faults(data: DataConfig, trainer: dict[str, Any]) -> Iterator[Fault]:
    """Orders of samples that mixed or packed data cannot have."""
    sampling = trainer.get("train_sampling_strategy", "random")
    if data.mix and sampling not in ("random", "group_by_length"):
        yield (
            "trainer.train_sampling_strategy",
            f"data.mix draws samples at random, and `{sampling}` is asked for",
            "take it out, or take out data.mix",
        )
    if data.packing and sampling != "random":
        yield (
            "trainer.train_sampling_strategy",
            f"packed rows come in random order, and `{sampling}` is asked for",
            "take it out, or set data.packing: false",
        )


def _evaluation_faults(data: DataConfig, trainer: dict[str, Any]) -> Iterator[Fault]:
    """An eval loss that nothing is there for."""
    asked = trainer.get("eval_strategy", "no") not in ("no", False)
    if (trainer.get("load_best_model_at_end") or asked) and not data.has_eval:
        yield (
            "trainer.eval_strategy",
            "an eval loss is asked for and there is nothing to measure it on",
            "give data.eval_files or data.eval_share",
        )
