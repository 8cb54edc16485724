"""Time and memory of `vltrain check` on many records of text and a picture.

    python benchmarks/check_scale.py --records 10000 1000000 --forms jsonl json

Three records of four have a picture, one of `--pictures` JPEG files of about 320 x 240 pixels;
every answer has a box. Memory is the sum over all processes of the command, shared pages counted
in each (Linux only). CPU seconds are those of all its processes: other programs on the machine
change them little, where they change the time that passes a lot.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--forms", nargs="+", choices=["jsonl", "json"], default=["jsonl", "json"])
    parser.add_argument("--pictures", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), options.pictures)
        for form in options.forms:
            for count in options.records:
                file = Path(folder, f"{count}.{form}")
                write_records(file, count, options.pictures)
                seconds, cpu_seconds, peak_bytes = measure(file, count)
                print(
                    f"{form}, {count} records: {seconds:.0f} s, {count / seconds:.0f} records/s, "
                    f"{cpu_seconds:.0f} CPU s, peak {peak_bytes / 2**20:.0f} MiB "
                    f"on {os.cpu_count()} cores",
                    flush=True,
                )
                file.unlink()


def write_pictures(folder: Path, count: int) -> None:
    """`0.jpg`, `1.jpg`, … in a folder."""
    for number in range(count):
        picture = Image.new("RGB", (320 + number % 50, 240), (number % 255, 9, 9))
        picture.save(folder / f"{number}.jpg", quality=40)


def record(number: int, pictures: int) -> dict[str, Any]:
    """A question, about a picture where the number is no multiple of 4, and its answer."""
    question = f"Picture 1: <img>{number % pictures}.jpg</img>\nWhat is number {number}?"
    corners = f"({number % 900},5),(950,{6 + number % 900})"
    return {
        "id": str(number),
        "conversations": [
            {"from": "user", "value": question if number % 4 else f"Say number {number}."},
            {
                "from": "assistant",
                "value": f"It is <ref>thing {number}</ref><box>{corners}</box>.",
            },
        ],
    }


def write_records(file: Path, count: int, pictures: int) -> None:
    """A list, or one record a line, as the file's ending says."""
    is_list = file.suffix == ".json"
    with file.open("w", encoding="utf-8") as out:
        out.write("[\n" if is_list else "")
        for number in range(count):
            out.write(",\n" if is_list and number else "")
            out.write(json.dumps(record(number, pictures)))
            out.write("" if is_list else "\n")
        out.write("\n]\n" if is_list else "")


def measure(file: Path, count: int) -> tuple[float, float, int]:
    """Seconds, CPU seconds and peak bytes of a check that must find nothing in `count` records."""
    begin, cpu_begin = time.perf_counter(), cpu_seconds_of_children()
    with tempfile.TemporaryFile() as output:
        command = [sys.executable, "-m", "vltrain", "check", str(file), "--json"]
        process = subprocess.Popen(command, stdout=output, start_new_session=True)
        peak_bytes = 0
        while process.poll() is None:
            peak_bytes = max(peak_bytes, sum(resident_bytes(process.pid)))
            time.sleep(0.2)
        seconds = time.perf_counter() - begin
        output.seek(0)
        report = json.load(output)
    if report != {"records": count, "findings": []}:
        sys.exit(f"{file.name}: {report['records']} records, {len(report['findings'])} findings")
    return seconds, cpu_seconds_of_children() - cpu_begin, peak_bytes


def cpu_seconds_of_children() -> float:
    """What all processes that were waited for have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def resident_bytes(group: int) -> Iterator[int]:
    """Resident memory of each process of a group."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[2]) == group:
                pages = int((folder / "statm").read_text().split()[1])
                yield pages * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):  # it ended meanwhile
            continue


if __name__ == "__main__":
    main()
