"""Records and numbers in Arrow tables: what is written is read, and little of it is held."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from letters import record

from vltrain.data.encoding import Sample
from vltrain.data.records import Record
from vltrain.data.sample_table import NUMBERS, SampleTable, TableWriter, rows_of

A, B = Path("a.json"), Path("b.jsonl")
KEPT = [
    (Record(A, 0, record("q", "a")), Sample([5, 9, 7], [-100, 9, 7], ["x.png"])),
    (Record(A, 2, {"text": "猫 \ud800 1e-7", "n": 1e-7}), Sample([5], [-100], [])),
    (Record(B, 7, [None, True], source=1), Sample([8, 4], [8, -100], ["x.png", "y.png"])),
]


def written(folder: Path, *chunks: list) -> SampleTable:
    with TableWriter(folder) as writer:
        for chunk in chunks:
            writer.write(rows_of(chunk))
    return SampleTable.open(folder)


def test_what_is_written_is_read(tmp_path):
    table = written(tmp_path, KEPT[:2], [], KEPT[2:])

    assert len(table) == 3
    assert [table.record(number) for number in range(3)] == [kept for kept, _ in KEPT]
    assert [table.name(number) for number in range(3)] == ["a.json#0", "a.json#2", "b.jsonl#7"]
    assert {name: table.numbers[name].tolist() for name in NUMBERS} == {
        "source": [0, 0, 1],
        "file": [0, 0, 1],
        "index": [0, 2, 7],
        "tokens": [3, 1, 2],
        "learned_tokens": [2, 0, 0],
        "image_count": [1, 0, 2],
        "largest_id": [9, 5, 8],
    }


def test_a_table_in_memory_reads_like_one_on_disk(tmp_path):
    table = SampleTable.in_memory(rows_of(KEPT))

    assert [table.record(number) for number in range(3)] == [kept for kept, _ in KEPT]
    assert table.numbers["tokens"].tolist() == [3, 1, 2]


def test_a_table_may_be_empty(tmp_path):
    table = written(tmp_path)

    assert len(table) == 0
    assert table.numbers["tokens"].tolist() == []


def test_columns_are_those_of_the_file_and_no_copies(tmp_path):
    table = written(tmp_path, KEPT)

    assert {values.dtype for values in table.numbers.values()} == {np.dtype(np.int32)}
    assert not any(values.flags.owndata for values in table.numbers.values())


OPEN_AND_MEASURE = """
import sys
from pathlib import Path
from vltrain.data.sample_table import SampleTable

def own_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

SampleTable.open(Path(sys.argv[1]))  # what the library takes itself
before = own_bytes()
table = SampleTable.open(Path(sys.argv[2]))
assert int(table.numbers["tokens"].sum()) == 3 * len(table)
print(own_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells memory there")
def test_an_open_table_takes_few_bytes_for_each_record(tmp_path):
    one = (Record(A, 0, record("q" * 500, "a" * 500)), Sample([5, 9, 7], [-100, 9, 7], []))
    few, many = (tmp_path / name for name in ("few", "many"))
    for folder, chunks in ((few, 1), (many, 100)):
        folder.mkdir()
        written(folder, *[[one] * 1000] * chunks)

    command = [sys.executable, "-c", OPEN_AND_MEASURE, str(few), str(many)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    # 100,000 records of more than 1,000 bytes: the column that was summed, 4 bytes of each, and
    # what the system maps around it
    assert int(told) < 40 * 100_000
