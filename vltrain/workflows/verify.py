"""Whether a model's folder is whole: `vltrain verify MODEL`."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from rich.console import Console

from vltrain.data.conversation import ImagePart, TextPart, Turn
from vltrain.data.encoding import prompt_ids
from vltrain.data.findings import Finding, Severity
from vltrain.errors import VltrainError
from vltrain.evaluation.generation import Decoding, Prompt, answer_batches
from vltrain.models.catalog import family_of, read_json
from vltrain.models.fingerprint import weight_files
from vltrain.models.gptq import SETTINGS_FILE
from vltrain.models.hub import resolve_model
from vltrain.models.loading import INDEX_FILES, dtype_for_machine, load_model, load_processor
from vltrain.models.manifest import REPORT_FILES, list_faults
from vltrain.models.plain_weights import PlainWeights, described_weights, tensor_faults
from vltrain.models.tensor_files import TensorFiles, header_bytes
from vltrain.workflows.inspect import print_findings
from vltrain.workflows.quiet import hide_weight_bars

QUESTION = "What is in the picture?"
MAX_NEW_TOKENS = 32
LFS_POINTER = b"version https://git-lfs"
JSON_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    SETTINGS_FILE,
    *INDEX_FILES,
    *REPORT_FILES,
)
DOWNLOAD = "download it again, or run the merge or export that made it again"


def verify(model: str, *, answer: bool = True, as_json: bool = False) -> int:
    """Print whether a model is whole: its files, its tensors, its tokenizer, and what it says.

    Args:
        model: a folder, or a name on the hub, which comes down first.
        answer: whether it is loaded and asked about a picture of vltrain's own; without, no
            more than a tensor is in memory.
        as_json: print one JSON object instead of text.

    Returns:
        The exit code: 1 where there is an error, else 0.
    """
    hide_weight_bars()
    folder = resolve_model(model).path
    findings = list(folder_findings(folder))
    said = None
    if answer and not any(found.severity == "error" for found in findings):
        said, faults = ask(folder)
        findings += faults
    errors = sum(found.severity == "error" for found in findings)
    files = [file for file in folder.iterdir() if file.is_file()]
    if as_json:
        values: dict[str, Any] = {"model": str(folder), "files": len(files), "answer": said}
        print(json.dumps(values | {"findings": [asdict(found) for found in findings]}))
    else:
        console = Console(soft_wrap=True, highlight=False, markup=False)
        print_findings(findings, console)
        if said is not None:
            console.print(f"{QUESTION} {said!r}")
        size = sum(file.stat().st_size for file in files) / 1e9
        verdict = "is whole" if not errors else "is not whole"
        console.print(f"{folder} {verdict}: {len(files)} files, {size:,.3f} GB, {errors} errors")
    return 1 if errors else 0


def folder_findings(folder: Path) -> Iterator[Finding]:
    """All that is wrong with a model's folder, short of running it; no more than a tensor at once.

    What cannot be told once something else is wrong is left out.
    """
    try:
        family = family_of(folder)
        family.read_config(read_json(folder / "config.json"))
    except VltrainError as error:
        yield _told(error, folder, "config")
        return
    unreadable = list(unread_findings(folder))
    yield from unreadable
    if unreadable:
        return
    yield from tokenizer_findings(folder)
    yield from (
        _finding(folder / name, "changed", what) for name, what in list_faults(folder).items()
    )
    faults = list(file_findings(folder))
    yield from faults
    if any(found.severity == "error" for found in faults):
        return
    try:
        weights = described_weights(folder, family)
    except VltrainError as error:
        yield _told(error, folder, "tensors")
        return
    for fault in tensor_faults(weights):
        yield _finding(
            folder / "config.json", "tensors", f"is of a model of other tensors; {fault}"
        )
    yield from value_findings(weights)


def unread_findings(folder: Path) -> Iterator[Finding]:
    """Whether the JSON files are JSON, and no file is a pointer that Git LFS was to replace."""
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        with file.open("rb") as stream:
            begins = stream.read(len(LFS_POINTER))
        if begins == LFS_POINTER:
            what = "is a pointer of Git LFS; what it stands for was not downloaded"
            yield _finding(file, "pointer", what, fix="download it again, or run `git lfs pull`")
        elif file.name in JSON_FILES:
            try:
                read_json(file)
            except VltrainError as error:
                yield _told(error, file, "broken_file")


def tokenizer_findings(folder: Path) -> Iterator[Finding]:
    """Whether the tokenizer is there, and its ids are those that the config speaks of."""
    try:
        processor = load_processor(folder)
    except VltrainError as error:
        yield _told(error, folder, "tokenizer")
        return
    config = read_json(folder / "config.json")
    rows, ids = config.get("vocab_size", 0), len(processor.tokenizer)
    if ids > rows:
        yield _finding(
            folder / "config.json",
            "tokenizer",
            f"has vocab_size {rows:,}, and the tokenizer has {ids:,} ids",
            fix="put the vocabulary that belongs to these weights in its place",
        )
    start = config["visual"].get("image_start_id")
    found = processor.image_ids("")[0]
    if start != found:
        yield _finding(
            folder / "config.json",
            "tokenizer",
            f"marks pictures by the id {start}, and the tokenizer's <img> is {found}",
            fix="put the vocabulary that belongs to these weights in its place",
        )


def file_findings(folder: Path) -> Iterator[Finding]:
    """Whether the weight files are those of the index, and as long as their own headers say."""
    files = list(weight_files(folder))
    names = {file.name for file in files}
    listed = _listed_files(folder)
    for name in sorted(set(listed.values()) - names):
        yield _finding(folder / name, "missing_file", "is named by the index and not there")
    for name in sorted(names - set(listed.values())) if listed else ():
        yield _finding(
            folder / name,
            "stray_file",
            "holds weights and is not named by the index",
            severity="warning",
            fix="move it elsewhere, unless the index is the one that is old",
        )
    if not files and not listed:
        yield _finding(folder, "missing_file", "holds no weights")
    for file in files:
        size = file.stat().st_size
        try:
            wanted = header_bytes(file) if file.suffix == ".safetensors" else size
        except (ValueError, KeyError, TypeError) as error:
            yield _finding(file, "broken_file", f"is no safetensors file ({error})")
            continue
        if size != wanted:
            yield _finding(file, "size", f"has {size:,} bytes, and its header speaks of {wanted:,}")
            continue
        try:
            held = set(TensorFiles([file]).names)
        except VltrainError as error:
            yield _told(error, file, "broken_file")
            continue
        lost = sorted(name for name, own in listed.items() if own == file.name and name not in held)
        if lost:
            yield _finding(
                file,
                "missing_tensor",
                f"lacks {len(lost)} tensors that the index has in it, such as {lost[0]}",
            )


def _listed_files(folder: Path) -> dict[str, str]:
    """Tensor -> file, of the index that loading reads; {} where the weights are one file."""
    for name in INDEX_FILES:
        if (folder / name).is_file():
            return read_json(folder / name).get("weight_map", {})
    return {}


def value_findings(weights: PlainWeights) -> Iterator[Finding]:
    """Whether all values are finite, and of the dtype that the config names.

    What GPTQ packed has scales of float16 beside weights of any dtype.
    """
    files, dtype = weights.files, weights.dtype
    scales = {f"{layer}.scales" for layer in weights.packed.layers}
    other: dict[str, str] = {}
    for name in files.names:
        tensor = files.read(name)
        if not tensor.is_floating_point():
            continue
        if tensor.dtype is not dtype and name not in scales:
            other[name] = str(tensor.dtype).removeprefix("torch.")
        bad = sum(int((~torch.isfinite(part)).sum()) for part in tensor.split(4096))
        if bad:
            yield _finding(
                files.file_of(name), "not_finite", f"{name} has {bad:,} values that are no numbers"
            )
    if other:
        name, found = next(iter(other.items()))
        yield _finding(
            files.file_of(name),
            "dtype",
            f"{len(other)} tensors, such as {name}, are {found}; config.json says "
            f"{str(dtype).removeprefix('torch.')}",
            severity="warning",
            fix="none is needed: they are converted when they are loaded",
        )


def ask(folder: Path) -> tuple[str | None, list[Finding]]:
    """What a model says of `picture()`, greedily, and what is wrong with how it says it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        network = load_model(folder, dtype=dtype_for_machine(), device=device)
    except VltrainError as error:
        return None, [_told(error, folder, "load")]
    processor = load_processor(folder)
    turn = Turn("user", (ImagePart("picture"), TextPart(QUESTION)))
    ids = prompt_ids((turn,), processor)

    def load_pixels() -> torch.Tensor:
        return processor.image_processor(images=[picture()], return_tensors="pt")["pixel_values"]

    pixels = load_pixels().to(network.device, network.get_input_embeddings().weight.dtype)
    with torch.inference_mode():
        logits = network(
            input_ids=torch.tensor([ids], device=network.device), pixel_values=pixels
        ).logits
    if not torch.isfinite(logits).all():
        return None, [
            _finding(folder, "answer", "answers a picture with values that are no number")
        ]
    (answer,) = answer_batches(
        network,
        processor,
        [Prompt(ids, load_pixels)],
        batch_size=1,
        decoding=Decoding(max_new_tokens=MAX_NEW_TOKENS),
    )
    return answer, []


def picture() -> Image.Image:
    """A red disc and a blue square on white, 448 pixels a side."""
    drawn = Image.new("RGB", (448, 448), "white")
    pen = ImageDraw.Draw(drawn)
    pen.ellipse((40, 120, 200, 280), fill="red")
    pen.rectangle((250, 130, 400, 280), fill="blue")
    return drawn


def _finding(
    file: Path, kind: str, message: str, *, severity: Severity = "error", fix: str = DOWNLOAD
) -> Finding:
    return Finding(str(file), None, None, severity, kind, message, fix)


def _told(error: VltrainError, file: Path, kind: str) -> Finding:
    """An error of loading as a finding."""
    told, _, fix = str(error).partition("\n  fix: ")
    return _finding(file, kind, told.removeprefix(f"{file}: "), fix=fix)
