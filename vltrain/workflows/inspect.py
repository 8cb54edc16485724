"""Looking at data before a run: `vltrain check`."""

import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from vltrain.data.checks import Finding, Report, check_files
from vltrain.data.encoding import LabelPolicy, Processor, TooLong
from vltrain.data.formats import Format
from vltrain.data.parallel import worker_count
from vltrain.data.pictures import LOCAL_PICTURES, BadPictures, Pictures
from vltrain.errors import VltrainError

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line ends


def check(
    files: Sequence[Path],
    *,
    pictures: Pictures = LOCAL_PICTURES,
    model: str | None = None,
    max_length: int | None = None,
    too_long: TooLong = "error",
    format: Format = "auto",
    labels: LabelPolicy = "assistant",
    decode: bool = False,
    bad_pictures: BadPictures = "error",
    as_json: bool = False,
) -> int:
    """Print every finding about data files to stdout.

    Args:
        files: data files, folders or names, as `sources.scan_records` takes them.
        pictures: where pictures are looked up.
        model: a folder or a name on the hub, whose tokenizer counts; without it lengths are
            not checked.
        max_length: tokens, image tokens included; None: any length.
        too_long: are longer samples errors, or dropped and counted?
        format: how records are read; "auto" tells by the content of each.
        labels: what a run learns; under "reference" it takes what the original code takes.
        decode: decode pictures whole; False: read their headers and ends.
        bad_pictures: are missing and broken pictures errors, or are their records dropped and
            counted?
        as_json: print one JSON object instead of text.

    Returns:
        The exit code: 1 where there is an error, else 0.
    """
    processor = _processor(model) if model else None
    with checking_bar() as advance:
        report = check_files(
            files,
            processor=processor,
            pictures=pictures,
            max_length=max_length,
            too_long=too_long,
            labels=labels,
            decode=decode,
            bad_pictures=bad_pictures,
            format=format,
            workers=worker_count(),
            on_checked=advance,
        )
    if as_json:
        print(json.dumps(report.as_json()))
    else:
        print_report(report, Console(soft_wrap=True, highlight=False))
        if max_length is not None and model is None:
            print("lengths were not checked: --model says whose tokens to count")
    return 1 if report.errors else 0


def print_report(report: Report, console: Console) -> None:
    """Findings grouped by kind, errors first, then the counts."""
    print_findings(report.findings, console)
    dropped = f", {_count(report.dropped, 'dropped record')}" if report.dropped else ""
    console.print(
        f"{_count(report.records, 'record')}: {_count(len(report.errors), 'error')}, "
        f"{_count(len(report.warnings), 'warning')}{dropped}"
    )


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """Findings grouped by kind, errors first."""
    for severity in ("error", "warning"):
        style = "bold red" if severity == "error" else "bold yellow"
        chosen = [found for found in findings if found.severity == severity]
        for kind, group in _by_kind(chosen).items():
            console.print(
                Text(f"{severity}: {kind.replace('_', ' ')} ({len(group)})", style), soft_wrap=True
            )
            for found in group:
                console.print(
                    Text(f"  {_place(found)}: {_printable(found.message)}"), soft_wrap=True
                )
                console.print(Text(f"    fix: {_printable(found.fix)}", "dim"), soft_wrap=True)


def refuse_errors(
    report: Report, files: Sequence[Path], *, undone: str, printed: bool = True
) -> None:
    """Raise VltrainError if a report has errors.

    Args:
        undone: what did not happen: "trained" or "asked".
        printed: whether the report was; if not, the error has it.
    """
    if not report.errors:
        return
    listing = io.StringIO()
    if not printed:
        listing.write("\n")
        print_report(report, Console(file=listing))
    place = "above" if printed else "below"
    raise VltrainError.at(
        ", ".join(str(file) for file in files),
        what=f"{_count(len(report.errors), 'error')}, listed {place}; nothing was {undone}",
        fix="mend the data; `vltrain check` finds the same without starting anything"
        + listing.getvalue().rstrip(),
    )


@contextmanager
def checking_bar() -> Iterator[Callable[[int], None]]:
    """A bar on stderr that counts records; nothing where stderr is no terminal.

    Yields:
        what is told how many more have been checked.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} records"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        yield partial(bar.advance, bar.add_task("checking", total=None))


def _by_kind(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    groups: dict[str, list[Finding]] = defaultdict(list)
    for found in findings:
        groups[found.kind].append(found)
    return groups


def _place(found: Finding) -> str:
    """File, record and id of a finding, as errors write them."""
    record = "" if found.record is None else f"#{found.record}"
    identity = "" if found.id is None else f" (id {_printable(found.id)})"
    return f"{found.file}{record}{identity}"


def _printable(text: str) -> str:
    """Text that any terminal takes: no halves of surrogate pairs, no control characters."""
    return _CONTROL.sub("\ufffd", text.encode("utf-8", "replace").decode("utf-8"))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _processor(model: str) -> Processor:
    from vltrain.models.loading import load_processor

    return load_processor(model)
