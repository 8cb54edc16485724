"""What a command wrote, beside it: a report with a hash of every file."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vltrain.models.catalog import read_json

MERGE_REPORT, EXPORT_REPORT, QUANTIZE_REPORT = "merge.json", "export.json", "quantize.json"
REPORT_FILES = (MERGE_REPORT, EXPORT_REPORT, QUANTIZE_REPORT)


def file_list(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of each file of a folder, but for reports."""
    listed = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name not in REPORT_FILES:
            listed[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    return listed


def write_report(folder: Path, values: Mapping[str, Any], name: str) -> None:
    """Write a report into a folder, under one of the names of `REPORT_FILES`."""
    text = json.dumps(dict(values), indent=2, ensure_ascii=False)
    (folder / name).write_text(text + "\n", encoding="utf-8")


def list_faults(folder: Path) -> dict[str, str]:
    """The files that are not as a report's list has them, and in what; {} without a report."""
    faults = {}
    for report in REPORT_FILES:
        listed = read_json(folder / report)["files"] if (folder / report).is_file() else {}
        for name, state in listed.items():
            if fault := _fault(folder / name, state, report):
                faults[name] = fault
    return faults


def _fault(file: Path, state: Mapping[str, Any], report: str) -> str | None:
    if not file.is_file():
        return f"is named in {report} and not there"
    if file.stat().st_size != state["bytes"]:
        return f"has {file.stat().st_size:,} bytes; {state['bytes']:,} were written"
    if _sha256(file) != state["sha256"]:
        return f"has changed since it was written: its hash is not that of {report}"
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
