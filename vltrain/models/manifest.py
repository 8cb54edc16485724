"""What a merge or an export wrote, beside it: `merge.json`, with a hash of every file."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vltrain.models.catalog import read_json

REPORT_FILE = "merge.json"


def file_list(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of each file of a folder, but for the report itself."""
    listed = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name != REPORT_FILE:
            listed[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    return listed


def write_report(folder: Path, values: Mapping[str, Any]) -> None:
    """Write a report into a folder."""
    text = json.dumps(dict(values), indent=2, ensure_ascii=False)
    (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")


def list_faults(folder: Path) -> dict[str, str]:
    """The files that are not as the report's list has them, and in what; {} without a report."""
    if not (folder / REPORT_FILE).is_file():
        return {}
    faults = {}
    for name, listed in read_json(folder / REPORT_FILE)["files"].items():
        file = folder / name
        if not file.is_file():
            faults[name] = f"is named in {REPORT_FILE} and not there"
        elif file.stat().st_size != listed["bytes"]:
            faults[name] = f"has {file.stat().st_size:,} bytes; {listed['bytes']:,} were written"
        elif _sha256(file) != listed["sha256"]:
            faults[name] = (
                f"has changed since it was written: its hash is not that of {REPORT_FILE}"
            )
    return faults


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
