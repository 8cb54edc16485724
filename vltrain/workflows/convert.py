"""`vltrain convert`: training JSON from the annotation files people have."""

import codecs
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vltrain.data.checks import check_files
from vltrain.data.coco import CATEGORY_QUESTION, convert_coco, read_coco
from vltrain.data.conversion import BoxForm, Conversion, Tally
from vltrain.data.faults import Fault
from vltrain.data.llava import convert_llava
from vltrain.data.pictures import Pictures
from vltrain.data.refcoco import EXPRESSION_QUESTION, convert_refcoco
from vltrain.data.sources import read_records
from vltrain.errors import VltrainError

_ENDINGS = (".json", ".jsonl")
_PICKLE_ENDINGS = (".p", ".pkl", ".pickle")
_PICKLE_STARTS = (b"\x80", b"(lp", b"(dp")  # binary protocols; a list or a dict as text


class PictureFolder:
    """Where an annotation file's pictures are, seen from the training file that is written."""

    def __init__(self, folder: Path | None, out: Path) -> None:
        """Look once at how the one is reached from the other.

        Args:
            folder: the pictures'; None: names are kept, and looked for beside `out`.
            out: the training file.
        """
        self._out = out
        self._prefix = None if folder is None else _path_from(out.parent, folder)
        self._sizes: dict[str, tuple[int, int] | None] = {}

    def source(self, name: str) -> str:
        """The path that a record has: from the training file's folder to the picture."""
        return name if self._prefix is None else (self._prefix / name).as_posix()

    def size(self, name: str) -> tuple[int, int] | None:
        """Width and height in pixels, from the picture's header; None where there is no picture."""
        if name not in self._sizes:
            self._sizes[name] = self._read_size(name)
        return self._sizes[name]

    def _read_size(self, name: str) -> tuple[int, int] | None:
        source, pictures = self.source(name), Pictures()
        faults = pictures.faults(source, self._out, decode=False)
        if any(fault.grade != "warning" for fault in faults):
            return None
        size = pictures.size(source, self._out)
        return None if isinstance(size, Fault) else size


def convert_coco_file(
    file: Path, out: Path, *, images: Path | None = None, question: str = CATEGORY_QUESTION
) -> None:
    """Write one conversation for each picture of COCO's `instances_*.json`.

    Args:
        file: the annotations.
        out: the training file to make: a JSON list, or JSONL by its ending.
        images: the pictures' folder; records then name pictures from `out`'s folder.
        question: `{category}` in it becomes a category's name.

    Raises:
        VltrainError: see `convert_coco`; or `out` exists, or nothing would be in it.
    """
    _refuse_output(out, images)
    pictures = PictureFolder(images, out)
    conversion = convert_coco(
        _read_json(file), where=str(file), pictures=pictures, question=question
    )
    _write(conversion, file, out, pictures_known=images is not None)


def convert_refcoco_file(
    file: Path,
    out: Path,
    *,
    images: Path | None = None,
    boxes: BoxForm = "xywh",
    splits: Sequence[str] = (),
    instances: Path | None = None,
    question: str = EXPRESSION_QUESTION,
) -> None:
    """Write one conversation for each referring expression of a JSON or JSONL file.

    Args:
        file: the entries; a pickle is refused.
        out: the training file to make: a JSON list, or JSONL by its ending.
        images: the pictures' folder; records then name pictures from `out`'s folder.
        boxes: the form that the entries' boxes are written in.
        splits: the values of `split` to take.
        instances: COCO's form; holds the boxes of entries that have only an `ann_id`.
        question: `{expression}` in it becomes an expression.

    Raises:
        VltrainError: see `convert_refcoco`; or `out` exists, or nothing would be in it.
    """
    _refuse_output(out, images)
    coco = None if instances is None else read_coco(_read_json(instances), str(instances))
    pictures = PictureFolder(images, out)
    conversion = convert_refcoco(
        _read_list(file),
        where=str(file),
        pictures=pictures,
        boxes=boxes,
        splits=splits,
        instances=coco,
        question=question,
    )
    _write(conversion, file, out, pictures_known=images is not None)


def convert_llava_file(file: Path, out: Path, *, images: Path | None = None) -> None:
    """Write the conversations of LLaVA's list in the Qwen-VL form.

    Args:
        file: a JSON list or JSONL.
        out: the training file to make: a JSON list, or JSONL by its ending.
        images: the pictures' folder; records then name pictures from `out`'s folder.

    Raises:
        VltrainError: the file cannot be read; or `out` exists, or nothing would be in it.
    """
    _refuse_output(out, images)
    conversion = convert_llava(_read_list(file), pictures=PictureFolder(images, out))
    _write(conversion, file, out, pictures_known=images is not None)


def _write(conversion: Conversion, file: Path, out: Path, *, pictures_known: bool) -> None:
    """Write the records that `vltrain check` finds clean, then say what was and was not written.

    They are written beside the training file, which gets its name when they are complete.
    """
    draft = _draft(out)
    try:
        _write_records(draft, conversion.records)
        refused = _refused_records(draft, conversion, pictures_known=pictures_known)
        kept = [record for n, record in enumerate(conversion.records) if n not in refused]
        if not kept:
            what = "nothing is left to write" + _listed("left out", conversion.left_out)
            raise VltrainError.at(str(file), what=what, fix="see why each was left out")
        if refused:
            _write_records(draft, kept)
        _refuse_existing(out)
        draft.rename(out)
    finally:
        draft.unlink(missing_ok=True)
    count = f"{len(kept)} record{'' if len(kept) == 1 else 's'}"
    changed, left_out = conversion.changed, conversion.left_out
    print(f"{out}: {count}" + _listed("changed", changed) + _listed("left out", left_out))
    if not pictures_known:
        print("pictures that were not found stay in: --images says where they are")


def _refused_records(draft: Path, conversion: Conversion, *, pictures_known: bool) -> set[int]:
    """The numbers of records with errors, which are counted as left out.

    Pictures are judged by their headers; that none is found is no error while nobody said
    where they are.
    """
    refused: set[int] = set()
    for found in check_files([draft], decode=False).errors:
        missing = found.kind == "missing_picture"
        if found.record is None or found.record in refused or (missing and not pictures_known):
            continue
        refused.add(found.record)
        reason = f"records with an error of the kind {found.kind.replace('_', ' ')!r}"
        conversion.leave_out(reason, f"{conversion.places[found.record]}: {found.message}")
    return refused


def _write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """A JSON list with one record per line, or JSONL."""
    lines = [_json_line(record) for record in records]
    if path.suffix.lower() == ".jsonl":
        text = "".join(f"{line}\n" for line in lines)
    else:
        text = "[\n" + ",\n".join(lines) + "\n]\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        what = f"cannot be written ({error.strerror or error})"
        raise VltrainError.at(str(path), what=what, fix="name another place for it") from error


def _json_line(record: dict[str, Any]) -> str:
    """A record as JSON; characters that UTF-8 has no bytes for are escaped."""
    line = json.dumps(record, ensure_ascii=False)
    readable = line.isascii() or not any("\ud800" <= character <= "\udfff" for character in line)
    return line if readable else json.dumps(record)


def _listed(title: str, tallies: dict[str, Tally]) -> str:
    """Reasons with how often and where first; nothing where there are none."""
    if not tallies:
        return ""
    lines = (
        f"\n    {what}: {tally.count} (first: {tally.first})" for what, tally in tallies.items()
    )
    return f"\n  {title}:" + "".join(lines)


def _refuse_output(out: Path, images: Path | None) -> None:
    """Raise VltrainError where the training file cannot be made, before anything is read."""
    if out.suffix.lower() not in _ENDINGS:
        fix = "let its name end in .json for a list, in .jsonl for one record per line"
        raise VltrainError.at(str(out), what="is no name of a training file", fix=fix)
    _refuse_existing(out)
    _refuse_existing(_draft(out))
    if not out.parent.is_dir():
        raise VltrainError.at(str(out), what="its folder is not there", fix="make the folder")
    if images is not None and not images.is_dir():
        raise VltrainError.at(str(images), what="is no folder", fix="name the pictures' folder")


def _draft(out: Path) -> Path:
    """What a training file is called until it is complete."""
    return out.with_name(f"{out.stem}.partial{out.suffix}")


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise VltrainError.at(str(out), what="is there already", fix="name another, or remove it")


def _read_list(file: Path) -> list[Any]:
    """The elements of a JSON list, or of a JSONL file."""
    _refuse_pickle(file, _read_bytes(file, 4))
    return [record.value for record in read_records(file)]


def _read_json(file: Path) -> Any:
    """What a JSON file holds."""
    raw = _read_bytes(file)
    _refuse_pickle(file, raw)
    try:
        return json.loads(raw.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8 and no JSON are ValueErrors
        raise VltrainError.at(str(file), what=f"not JSON: {error}", fix="mend the file") from error


def _read_bytes(file: Path, count: int = -1) -> bytes:
    """So many bytes from the front of a file, or all."""
    try:
        with file.open("rb") as opened:
            return opened.read(count)
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
        raise VltrainError.at(str(file), what=what, fix="mend the path") from error


def _refuse_pickle(file: Path, raw: bytes) -> None:
    """Raise VltrainError for a pickle, whatever its name: opening one runs what is in it."""
    if file.suffix.lower() in _PICKLE_ENDINGS or raw.startswith(_PICKLE_STARTS):
        raise VltrainError.at(
            str(file),
            what="is a pickle, and opening one runs whatever code is in it",
            fix="if you trust where it is from, load it yourself and save the list as JSON",
        )


def _path_from(start: Path, folder: Path) -> Path:
    """The path from one folder to another; absolute where none leads there."""
    try:
        inside = os.path.relpath(folder, start)
        if not inside.startswith(os.pardir):
            return Path(inside)
        # ".." goes astray where a folder on the way is a link.
        return Path(os.path.relpath(folder.resolve(), start.resolve()))
    except ValueError:  # two drives
        return folder.resolve()
