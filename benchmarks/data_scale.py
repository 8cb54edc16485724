"""What a run's data cost at its start: seconds and memory, for few records and for many.

    python benchmarks/data_scale.py --records 10000 100000 --tables 10000 1000000

The records are those of `check_scale.py`, the tokens those of the real vocabulary. The first start
checks and encodes, the second reads the cache; both are processes of their own. Memory is what is
resident, pages of the mapped files included (Linux only). `--tables` writes tables of so many
records without checking them, and measures a process that opens one.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from check_scale import record, resident_bytes, write_pictures, write_records

from vltrain.config import DataConfig
from vltrain.data.dataset import RecordReader, SampleDataset
from vltrain.data.encoding import Sample
from vltrain.data.ordering import grouped_by_length
from vltrain.data.packing import pack
from vltrain.data.prepared import prepare
from vltrain.data.records import Record
from vltrain.data.sample_table import SampleTable, TableWriter, rows_of
from vltrain.models.qwen_vl.processing import QwenVLImageProcessor, QwenVLProcessor
from vltrain.models.qwen_vl.tokenization import QwenVLTokenizer

READ_SAMPLES = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--tables", type=int, nargs="*", default=[])
    parser.add_argument("--start", type=Path, help="measure one start on this data file")
    parser.add_argument("--open", type=Path, help="measure to open the table in this folder")
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(options.start)))
        return
    if options.open:
        print(opened(options.open))
        return
    for count in options.tables:
        with tempfile.TemporaryDirectory() as folder:
            write_table(Path(folder), count)
            command = [sys.executable, __file__, "--open", folder]
            told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        print(f"table of {count} records: {told.strip()}", flush=True)
        print(f"{count} samples: {packed(count)}", flush=True)
    if not options.records:
        return
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), options.pictures)
        for count in options.records:
            file = Path(folder, f"{count}.jsonl")
            write_records(file, count, options.pictures)
            for name in ("first", "second"):
                print(f"{count} records, {name} start: {measured(file)}", flush=True)
            file.unlink()


def start(file: Path) -> dict[str, float]:
    """Make a data set ready in this process; seconds and MiB of it."""
    spec = importlib.util.find_spec("dashscope")
    assert spec is not None, "pip install dashscope: it carries the vocabulary"
    assert spec.submodule_search_locations, "dashscope is a package"
    vocabulary = Path(spec.submodule_search_locations[0], "resources", "qwen.tiktoken")
    processor = QwenVLProcessor(QwenVLTokenizer(vocabulary), QwenVLImageProcessor())
    data = DataConfig(files=(file,), cache_dir=file.parent / "cache")
    before = own_mib()
    begin = time.perf_counter()
    prepared = prepare(data, processor, say=lambda line: None)
    assert prepared.table is not None, prepared.report.findings[:3]
    samples = SampleDataset(prepared.table, RecordReader(processor))
    tokens = int(samples.lengths.sum(dtype=np.int64))
    figures = {"seconds": time.perf_counter() - begin, "tokens": tokens, "before": before}
    figures["ready"] = own_mib()
    for number in np.random.default_rng(0).integers(len(samples), size=READ_SAMPLES):
        samples[number]
    return figures | {"after_reading": own_mib()}


def write_table(folder: Path, count: int) -> None:
    """A table of records, as a run keeps it, the numbers of their samples made up."""
    sample = Sample([1, 2, 3], [-100, 2, 3], [])
    with TableWriter(folder) as writer:
        for first in range(0, count, 500):
            numbers = range(first, min(first + 500, count))
            kept = [(Record(Path("a.jsonl"), n, record(n, 20_000)), sample) for n in numbers]
            writer.write(rows_of(kept))


def opened(folder: Path) -> str:
    """What a process holds that opens a table, and then reads some of it."""
    import datasets  # noqa: F401 (what it takes itself is no matter of the table)

    before = own_mib()
    begin = time.perf_counter()
    table = SampleTable.open(folder)
    lengths = table.numbers["tokens"]
    assert int(lengths.sum(dtype=np.int64)) == 3 * len(lengths)
    seconds, ready = time.perf_counter() - begin, own_mib()
    for number in np.random.default_rng(0).integers(len(table), size=READ_SAMPLES):
        table.record(int(number))
    return (
        f"{before:.0f} MiB before, {ready:.0f} opened and all lengths read ({seconds:.2f} s), "
        f"{own_mib():.0f} after {READ_SAMPLES} records"
    )


def own_mib() -> float:
    """Resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmRSS in /proc/self/status")


def measured(file: Path) -> str:
    """One start in a process of its own, in words."""
    command = [sys.executable, __file__, "--start", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    peak_bytes = 0
    while process.poll() is None:
        peak_bytes = max(peak_bytes, sum(resident_bytes(process.pid)))
        time.sleep(0.1)
    told, _ = process.communicate()
    if process.returncode:
        sys.exit(process.returncode)
    found = json.loads(told)
    return (
        f"{found['seconds']:.1f} s, {found['ready']:.0f} MiB when ready "
        f"({found['before']:.0f} before), {found['after_reading']:.0f} after {READ_SAMPLES} "
        f"samples, peak of all processes {peak_bytes / 2**20:.0f} MiB"
    )


def packed(count: int) -> str:
    """Seconds to pack so many samples of mixed lengths, and to group them by length."""
    chance = np.random.default_rng(5)
    pictures = 258 * chance.choice([0, 0, 1, 1, 2, 4], count)
    lengths = np.minimum(2048, pictures + 20 + chance.lognormal(4.5, 1, count).astype(np.int32))
    begin = time.perf_counter()
    rows = pack(lengths, 2048, seed=0, epoch=0)
    between = time.perf_counter()
    grouped_by_length(chance.permutation(count), lengths, 8)
    end = time.perf_counter()
    fill = lengths.sum() / (len(rows) * 2048)
    return (
        f"packed into {len(rows)} rows in {between - begin:.2f} s, {fill:.2%} full; "
        f"grouped by length in {end - between:.2f} s"
    )


if __name__ == "__main__":
    main()
