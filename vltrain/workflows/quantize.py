"""A 16-bit model -> one of 4 bits that GPTQ packed: `vltrain quantize MODEL OUT --data FILE`."""

import heapq
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

from vltrain import __version__
from vltrain.data.checks import check_files
from vltrain.data.encoding import Sample, encode
from vltrain.data.formats import Format
from vltrain.data.parallel import worker_count
from vltrain.data.pictures import LOCAL_PICTURES, Pictures
from vltrain.data.records import Record
from vltrain.data.sources import read_records
from vltrain.errors import VltrainError
from vltrain.models.catalog import family_of, read_json
from vltrain.models.census import skeleton
from vltrain.models.family import Family
from vltrain.models.gptq import SETTINGS_FILE, is_packed
from vltrain.models.gptq_decoder import LayerErrors, PackedDecoder, pack_decoder
from vltrain.models.gptq_solver import BITS, DAMP, GROUP_SIZE, PER_WORD
from vltrain.models.hub import ResolvedModel, resolve_model
from vltrain.models.loading import (
    checkpoint_dtype,
    foreign_id_error,
    load_model,
    load_processor,
    refuse_missing_shards,
)
from vltrain.models.manifest import QUANTIZE_REPORT, file_list, write_report
from vltrain.models.saving import copy_companions, save_shards
from vltrain.workflows.bars import counting_bar
from vltrain.workflows.dialogue import pixel_loader
from vltrain.workflows.inspect import checking_bar, print_report, refuse_errors
from vltrain.workflows.quiet import hide_weight_bars
from vltrain.workflows.reload import reload_in_a_fresh_process
from vltrain.workflows.whole_folder import refuse_existing, refuse_small_disk, whole_folder

SETTINGS = {
    "bits": BITS,
    "group_size": GROUP_SIZE,
    "damp_percent": DAMP,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
}
"""Those that Qwen-VL-Chat-Int4 is published with."""

SPARE = 8  # records are drawn for each one that is wanted: some will be too long
HELD_OUT = 8  # one conversation is held out for so many that are calibrated on


@dataclass(frozen=True)
class Chosen:
    """The conversations of a run, and what of the data is not among them."""

    calibration: list[dict[str, Tensor]]
    held_out: list[dict[str, Tensor]]
    pictures: int
    too_long: int  # records that were passed over


@dataclass(frozen=True)
class Calibration:
    """What a model is calibrated on."""

    files: Sequence[Path]
    samples: int = 128
    max_length: int = 2048  # tokens; longer conversations are passed over, never cut
    seed: int = 0  # of the choice among more conversations than are wanted
    format: Format = "auto"
    pictures: Pictures = LOCAL_PICTURES


def quantize(
    model: str,
    out: Path,
    data: Calibration,
    console: Console | None = None,
) -> None:
    """Pack a model's decoder to 4 bits, in the layout of Qwen-VL-Chat-Int4.

    A part of the conversations is held out: on them the error behind each layer, that of the
    logits, and the perplexity before and after are measured. What was written is read by a fresh
    process before the folder gets its name; a run that is cut off leaves no `out`.
    `quantize.json` in it has all of this, and the hash of every file. One layer at a time is on
    the GPU, where there is one.

    Args:
        model: a folder of a 16- or 32-bit model, or a name on the hub.
        out: the folder to make.
        data: the user's own conversations, with pictures.
        console: where to report; default the terminal.

    Raises:
        VltrainError: before the model is read: `out` exists or the disk is too small for it; the
            model is an adapter, is packed already or has layers that do not divide into groups;
            the data has errors, or too few conversations. Later: inputs that are not finite.
    """
    console = console or Console()
    hide_weight_bars()
    refuse_existing(out)
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = resolve_model(model)
    family = family_of(source.path)
    refuse_packed(source.path)
    config = family.read_config(read_json(source.path / "config.json"))
    shapes = skeleton(family, config, checkpoint_dtype(source.path))
    refuse_unfit(shapes, family, source.path)
    refuse_small_disk(out, packed_bytes(shapes, family))
    refuse_missing_shards(source.path)
    chosen = choose(data, load_processor(source.path), console)
    network = load_model(source.path)
    refuse_foreign(chosen, network, source.path)
    console.print(
        f"calibrating on {len(chosen.calibration)} conversations with {chosen.pictures} pictures, "
        f"{len(chosen.held_out)} more held out",
        soft_wrap=True,
    )
    with whole_folder(out) as draft:
        made = _pack(network, family, chosen, place, console)
        write_packed(source.path, plain_tensors(network) | made.tensors, draft)
        report = description(source, data, chosen, made) | {"files": file_list(draft)}
        write_report(draft, report, QUANTIZE_REPORT)
        console.print("reading it back in a fresh process")
        reload_in_a_fresh_process(draft, None)
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e9
    before, after = made.perplexity
    console.print(
        f"done: {out}, {size:,.3f} GB. On what was held out: logits off by {made.logits:.1%}, "
        f"perplexity {before:.3f} before and {after:.3f} after",
        soft_wrap=True,
    )


def refuse_packed(folder: Path) -> None:
    """Raise VltrainError where a model is packed already."""
    if is_packed(folder):
        raise VltrainError.at(
            str(folder),
            what="is packed to 4 bits already",
            fix="name the 16-bit checkpoint that it was made of",
        )


def refuse_unfit(model: PreTrainedModel, family: Family, folder: Path) -> None:
    """Raise VltrainError where GPTQ's groups do not fit the layers of a model's decoder."""
    unfit = [
        f"{name} ({layer.in_features} -> {layer.out_features})"
        for name, layer in linear_layers(model, family).items()
        if layer.in_features % GROUP_SIZE or layer.out_features % PER_WORD
    ]
    if unfit:
        raise VltrainError.at(
            str(folder),
            what=f"groups of {GROUP_SIZE} inputs and {PER_WORD} outputs do not fit "
            f"{len(unfit)} of its layers, {unfit[0]} for one",
            fix="use a model whose widths they divide, as those of Qwen-VL are",
        )


def linear_layers(model: PreTrainedModel, family: Family) -> dict[str, nn.Linear]:
    """The layers that are packed, by name."""
    return {
        f"{family.decoder}.{name}": layer
        for name, layer in model.get_submodule(family.decoder).named_modules()
        if isinstance(layer, nn.Linear)
    }


def packed_bytes(model: PreTrainedModel, family: Family) -> int:
    """About how many bytes a model has when it is packed."""
    weights = [layer.weight for layer in linear_layers(model, family).values()]
    packed = sum(weight.numel() for weight in weights) * (BITS / 8 + 2.5 / GROUP_SIZE)
    whole = sum(tensor.nbytes for tensor in model.state_dict().values())
    return int(whole - sum(weight.nbytes for weight in weights) + packed)


def drawn(data: Calibration, count: int) -> list[Record]:
    """So many records of all files in random order, or all of them; no more are held in memory."""
    chance = random.Random(data.seed)
    records = (record for file in data.files for record in read_records(file))
    numbered = ((chance.random(), number, record) for number, record in enumerate(records))
    return [record for _, _, record in heapq.nsmallest(count, numbered)]


def choose(data: Calibration, processor: Any, console: Console) -> Chosen:
    """Conversations to calibrate on and to hold out, drawn from all that are there.

    Raises:
        VltrainError: the data has errors (`console` is told all of them), or fewer than two
            conversations that can be used.
    """
    with checking_bar() as advance:
        report = check_files(
            data.files,
            pictures=data.pictures,
            format=data.format,
            workers=worker_count(),
            on_checked=advance,
        )
    if report.errors:
        print_report(report, console)
    refuse_errors(report, data.files, undone="packed")
    wanted = data.samples + max(1, data.samples // HELD_OUT)
    records = drawn(data, SPARE * wanted)
    found: list[tuple[Record, Sample]] = []
    too_long = 0
    for record in records:
        measure = data.pictures.measure(record.file)
        sample = encode(
            record.value, processor, where=record.name, format=data.format, image_size=measure
        )
        too_long += len(sample.input_ids) > data.max_length
        if len(sample.input_ids) <= data.max_length and sample.learned_tokens:
            found.append((record, sample))
        if len(found) == wanted:
            break
    if len(found) < 2:
        raise VltrainError.at(
            ", ".join(map(str, data.files)),
            what=f"{len(found)} of {len(records)} conversations that were drawn can be used; "
            f"{too_long} have more than {data.max_length} tokens",
            fix="two are needed, and 128 are usual; give more, or raise --max-length",
        )
    inputs = [_inputs(record, sample, processor, data.pictures) for record, sample in found]
    apart = max(1, len(found) // (HELD_OUT + 1))
    pictures = sum(len(sample.images) for _, sample in found[apart:])
    if not pictures:
        console.print(
            "warning: no conversation has a picture, so what pictures do to the layers is not "
            "calibrated",
            soft_wrap=True,
        )
    return Chosen(inputs[apart:], inputs[:apart], pictures, too_long)


def _inputs(
    record: Record, sample: Sample, processor: Any, pictures: Pictures
) -> dict[str, Tensor]:
    """A conversation as the model takes it, with its labels."""
    values = {
        "input_ids": torch.tensor([sample.input_ids]),
        "labels": torch.tensor([sample.labels]),
    }
    load = pixel_loader(sample.images, processor, pictures, record.file, record.name)
    return values if load is None else values | {"pixel_values": load()}


def refuse_foreign(chosen: Chosen, network: PreTrainedModel, folder: Path) -> None:
    """Raise VltrainError where the vocabulary has ids that the model has no row for."""
    rows = network.get_input_embeddings().weight.size(0)
    for sample in (*chosen.calibration, *chosen.held_out):
        largest = int(sample["input_ids"].max())
        if largest >= rows:
            raise foreign_id_error("--data", largest, rows, folder)


def _pack(
    network: PreTrainedModel,
    family: Family,
    chosen: Chosen,
    device: torch.device,
    console: Console,
) -> PackedDecoder:
    """Pack, with a line and a step of a bar for each layer."""
    bar = counting_bar(console)
    layers = len(network.get_submodule(family.decoder))
    with bar:
        shown = bar.add_task("packing layers", total=layers)

        def on_layer(errors: LayerErrors) -> None:
            worst = max(errors.linear, key=lambda name: errors.linear[name])
            console.print(
                f"layer {errors.layer + 1} of {layers}: off by {errors.hidden:.2%} behind it; at "
                f"most {errors.linear[worst]:.1%} in {worst} (rounding alone: "
                f"{errors.rounding[worst]:.1%})",
                soft_wrap=True,
            )
            bar.advance(shown)

        return pack_decoder(network, family, chosen.calibration, chosen.held_out, device, on_layer)


def plain_tensors(network: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a packed model that are not packed."""
    return {name: t for name, t in network.state_dict().items() if t.device.type != "meta"}


def write_packed(base: Path, tensors: dict[str, Tensor], draft: Path) -> None:
    """Write a packed model in the layout of Qwen-VL-Chat-Int4.

    Args:
        base: the model's folder, whose other files come along.
        tensors: all of it, packed and plain ones.
        draft: an existing folder to write into.
    """
    copy_companions(base, checkpoint_dtype(base), draft)
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    save_shards(shapes, lambda name: tensors[name].detach().contiguous(), draft)
    settings = SETTINGS | {"quant_method": "gptq", "checkpoint_format": "gptq"}
    config = read_json(draft / "config.json") | {"quantization_config": settings}
    for name, values in (("config.json", config), (SETTINGS_FILE, settings)):
        text = json.dumps(values, indent=2, ensure_ascii=False)
        (draft / name).write_text(text + "\n", encoding="utf-8")


def description(
    source: ResolvedModel, data: Calibration, chosen: Chosen, made: PackedDecoder
) -> dict[str, Any]:
    """What was packed and what it cost: the first part of `quantize.json`.

    The folder travels, so no path of this machine is in it.
    """
    before, after = made.perplexity
    return {
        "vltrain": __version__,
        "model": source.public_name,
        "revision": source.revision,
        "settings": SETTINGS,
        "data": {
            "files": [file.name for file in data.files],
            "seed": data.seed,
            "max_length": data.max_length,
            "calibrated_on": len(chosen.calibration),
            "pictures": chosen.pictures,
            "tokens": sum(sample["input_ids"].numel() for sample in chosen.calibration),
            "held_out": len(chosen.held_out),
            "too_long": chosen.too_long,
        },
        "layers": [asdict(errors) for errors in made.layers],
        "logits": made.logits,
        "perplexity": {"before": before, "after": after},
    }
