"""Data files -> findings and a table of samples, in one pass that the next run need not repeat.

What was found to be without errors is kept in the cache, under what the result depends on beside
the files: the recipe's section, the processor, vltrain's version. It holds while no data file and
no picture has changed its size or time.

    CACHE/samples/KEY/…               the table: see `sample_table`
    CACHE/samples/KEY/pictures.arrow  the pictures' sizes and times
    CACHE/samples/KEY/report.json     findings, and the data files' sizes and times
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vltrain import __version__
from vltrain.config import DataConfig
from vltrain.data.cache import CacheEntry
from vltrain.data.checks import Examined, Keeper, check_files
from vltrain.data.encoding import Processor
from vltrain.data.file_states import (
    FileState,
    StateWriter,
    first_change,
    read_states,
    state_of,
    state_or_absence,
)
from vltrain.data.findings import Finding, Report
from vltrain.data.parallel import worker_count
from vltrain.data.pictures import Pictures, default_cache_dir, pictures_of
from vltrain.data.records import Record
from vltrain.data.sample_table import Rows, SampleTable, TableWriter, rows_of
from vltrain.data.sources import files_of

TABLE_FORMAT = 1  # raised when tables, or what is written into them, become others
PICTURES_FILE, REPORT_FILE = "pictures.arrow", "report.json"
# Keys of the recipe's section that no record is read or checked by.
_WITHOUT_EFFECT = (
    "eval_share",
    "mix",
    "packing",
    "row_tokens",
    "streaming",
    "shuffle_buffer",
    "cache_dir",
    "cache_features",
    "features_max_gib",
)


@dataclass(frozen=True)
class Prepared:
    """What a run learns from, checked."""

    report: Report
    table: SampleTable | None  # of data.files, then data.eval_files; None: there are errors


def prepare(
    data: DataConfig,
    processor: Processor,
    *,
    say: Callable[[str], None],
    on_checked: Callable[[int], None] | None = None,
) -> Prepared:
    """Check the files of a recipe and encode their records, or read what an earlier run kept.

    One process does it; others that want the same wait, and read what it has kept.

    Args:
        data: the recipe's section.
        processor: encodes.
        say: told in one line what is done, and how long it took.
        on_checked: as for `check_files`.

    Raises:
        VltrainError: the cache cannot be written.
    """
    begin = time.perf_counter()
    folder = (data.cache_dir or default_cache_dir()) / "samples"
    entry = CacheEntry(folder, _key(data, processor))
    with entry.locked(lambda: say("data: another process is checking it; waiting")):
        files = [*data.files, *data.eval_files]
        found = _kept(entry, files, say)
        if found is None:
            found = _check(data, processor, files, entry, on_checked)
            done = "checked"
        else:
            done = "read from the cache, unchanged since they were checked,"
        if found.table is not None:
            entry.touch()
    seconds = time.perf_counter() - begin
    say(f"data: {found.report.records:,} records {done} in {seconds:.1f} s")
    return found


def check_as_run(
    files: Sequence[Path], data: DataConfig, processor: Processor, **how: Any
) -> Report:
    """What is wrong with files for a run of a recipe; `how` goes to `check_files` beside it."""
    return check_files(
        files,
        processor=processor,
        pictures=pictures_of(data),
        max_length=data.max_length,
        too_long=data.too_long,
        labels=data.labels,
        format=data.format,
        bad_pictures=data.bad_pictures,
        **how,
    )


def _key(data: DataConfig, processor: Processor) -> str:
    """A name for all that a table depends on but the contents of files."""
    section = {key: value for key, value in asdict(data).items() if key not in _WITHOUT_EFFECT}
    section["files"] = [os.path.abspath(file) for file in data.files]
    section["eval_files"] = [os.path.abspath(file) for file in data.eval_files]
    # Pictures with relative paths are looked up in the working directory, too.
    parts = [__version__, TABLE_FORMAT, os.getcwd(), processor.fingerprint, section]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _kept(entry: CacheEntry, files: Sequence[Path], say: Callable[[str], None]) -> Prepared | None:
    """What an earlier run kept; None where there is nothing, or where a file has changed."""
    try:
        kept = json.loads((entry.folder / REPORT_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if [list(state) for state in _source_states(files)] != kept["files"]:
        say("data: the files have changed since they were checked")
        return None
    changed = first_change(read_states(entry.folder / PICTURES_FILE))
    if changed is not None:
        say(f"data: pictures have changed since they were checked, {changed} for one")
        return None
    findings = tuple(Finding(**found) for found in kept["findings"])
    report = Report(kept["records"], findings, kept["dropped"])
    return Prepared(report, SampleTable.open(entry.folder))


def _check(
    data: DataConfig,
    processor: Processor,
    files: Sequence[Path],
    entry: CacheEntry,
    on_checked: Callable[[int], None] | None,
) -> Prepared:
    """One pass over all files: their findings and, where none is an error, the table."""
    states = list(_source_states(files))  # before they are read: a later change is seen
    with entry.draft() as folder:
        with ExitStack() as stack:
            table = stack.enter_context(TableWriter(folder))
            states_of_pictures = stack.enter_context(StateWriter(folder / PICTURES_FILE))

            def store(gathered: Gathered) -> None:
                table.write(gathered.rows)
                states_of_pictures.write(gathered.pictures)

            report = check_as_run(
                files,
                data,
                processor,
                workers=worker_count(),
                on_checked=on_checked,
                keeper=Keeper(partial(gather, pictures=pictures_of(data)), store),
            )
        if report.errors:
            return Prepared(report, None)
        _write_report(folder / REPORT_FILE, report, states)
        entry.keep()
    return Prepared(report, SampleTable.open(entry.folder))


@dataclass(frozen=True)
class Gathered:
    """What is kept of some records that follow each other."""

    rows: Rows
    pictures: list[FileState]  # of the files that they show, or where these were looked for


def gather(examined: Sequence[tuple[Record, Examined]], *, pictures: Pictures) -> Gathered:
    """What is kept of records that were examined, in the process that did it."""
    kept = [
        (record, found.sample)
        for record, found in examined
        if found.kept and found.sample is not None
    ]
    paths = {
        path
        for record, found in examined
        for source in found.sources  # of dropped records, too: their pictures may be mended
        for path in pictures.watched(source, record.file)
    }
    return Gathered(rows_of(kept), [state_or_absence(path) for path in paths])


def _source_states(sources: Iterable[Path]) -> Iterator[FileState]:
    """What the files are like that hold the data."""
    for source in sources:
        yield from filter(None, map(state_of, files_of(source)))


def _write_report(path: Path, report: Report, files: Sequence[FileState]) -> None:
    kept = {
        "files": files,
        "records": report.records,
        "dropped": report.dropped,
        "findings": [asdict(finding) for finding in report.findings],
    }
    path.write_text(json.dumps(kept), encoding="utf-8")
