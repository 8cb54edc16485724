"""Datasets by name: what comes down from a stand-in of the hub, and what happens without one."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_stand_in import StandInHub

from vltrain.data.hub_datasets import HubDataset, hub_dataset

FIRST, SECOND, SUBSETS, SCRIPT, EMPTY = "1" * 40, "2" * 40, "3" * 40, "4" * 40, "5" * 40
CARD_OF_SUBSETS = b"""---
configs:
- config_name: signs
  data_files: signs/*.parquet
- config_name: charts
  data_files: [{split: test, path: charts/*.parquet}]
---
"""

# The address and the cache of the hub are read when huggingface_hub is imported: all is asked in
# a process of its own.
ASK = """
import json, sys
from pathlib import Path
from vltrain.data.records import Record
from vltrain.data.sources import scan_records
answers = []
for name in sys.argv[1:]:
    entries = list(scan_records(Path(name)))
    answers.append([
        [entry.name, entry.value] if isinstance(entry, Record)
        else f"{entry.name}: {entry.fault.message}; {entry.fault.fix}"
        for entry in entries
    ])
print(json.dumps(answers))
"""


def parquet(*ids: str) -> bytes:
    written = io.BytesIO()
    pq.write_table(pa.table({"id": list(ids)}), written)
    return written.getvalue()


@pytest.fixture
def hub():
    standing_in = StandInHub(
        commits={
            FIRST: {"README.md": b"# old", "train.parquet": parquet("old")},
            SECOND: {
                "README.md": b"# new",
                "data/train-00000-of-00002.parquet": parquet("a"),
                "data/train-00001-of-00002.parquet": parquet("b"),
                "data/test-00000-of-00001.parquet": parquet("t"),
            },
            SUBSETS: {
                "README.md": CARD_OF_SUBSETS,
                "signs/a.parquet": parquet("stop"),
                "charts/a.parquet": parquet("pie"),
            },
            SCRIPT: {"README.md": b"#", "script.py": b"raise SystemExit('it ran')"},
            EMPTY: {"README.md": b"#"},
        },
        revisions={
            ("org/set", "main"): SECOND,
            ("org/set", "v1"): FIRST,
            ("org/set", FIRST): FIRST,
            ("org/set", SECOND): SECOND,
            ("org/subsets", "main"): SUBSETS,
            ("org/subsets", SUBSETS): SUBSETS,
            ("org/script", "main"): SCRIPT,
            ("org/script", SCRIPT): SCRIPT,
            ("org/empty", "main"): EMPTY,
            ("org/empty", EMPTY): EMPTY,
        },
        gated=frozenset({"org/gated"}),
    )
    standing_in.address = standing_in.start()
    yield standing_in
    standing_in.stop()


def ask(cache: Path, address: str, *names: str, offline: bool = False) -> list[list]:
    """What `scan_records` gives for each name in a fresh process, in an empty folder."""
    environment = {key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ}
    environment |= {
        "HF_ENDPOINT": address,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "NO_PROXY": "127.0.0.1",
    }
    (cache / "empty").mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", ASK, *names],
        cwd=cache / "empty",
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_name_brings_down_the_split_of_the_revision_that_it_says(hub, tmp_path):
    newest, test, old, signs, charts = ask(
        tmp_path,
        hub.address,
        *("org/set", "org/set:test", "org/set@v1:train"),
        *("org/subsets:signs:train", "org/subsets:charts:test"),
    )

    assert newest == [["set#0", {"id": "a"}], ["set#1", {"id": "b"}]]
    assert test == [["set:test#0", {"id": "t"}]]
    assert old == [["set@v1:train#0", {"id": "old"}]]
    assert signs == [["subsets:signs:train#0", {"id": "stop"}]]
    assert charts == [["subsets:charts:test#0", {"id": "pie"}]]


@pytest.mark.slow
def test_names_that_the_hub_does_not_give_are_explained(hub, tmp_path):
    names = ["org/nobody", "org/set@v9", "org/set:dev", "org/gated", "org/script", "org/empty"]
    names += ["org/subsets", "org/subsets:maps:train"]

    answers = ask(tmp_path, hub.address, *names)

    unknown, revision, split, gated, script, empty, subsets, subset = (a for (a,) in answers)
    assert "nobody: there is no such file or folder, and no such dataset on the hub" in unknown
    assert "the dataset has no revision v9" in revision
    assert "the dataset has no split dev; it has train, test; write org/set:train" in split
    assert f"accept them at {hub.address}/datasets/org/gated" in gated
    assert "the dataset is made by a script of its own, and those are not run" in script
    assert "no files of a kind that can be read" in empty
    assert "has the subsets signs, charts, and none is named; write org/subsets:signs:tr" in subsets
    assert "the dataset has no subset maps; it has signs, charts" in subset


@pytest.mark.slow
def test_offline_the_cache_answers_for_the_commit_that_it_has(hub, tmp_path):
    online = ask(tmp_path, hub.address, "org/set")
    hub.asked.clear()

    cached, commit, other, missing = ask(
        tmp_path,
        hub.address,
        *("org/set", f"org/set@{SECOND}:test", f"org/set@{FIRST}", "org/new@v1"),
        offline=True,
    )

    assert [cached] == online
    assert commit == [[f"set@{SECOND}:test#0", {"id": "t"}]]
    assert f"has the dataset's commit {SECOND} alone" in other[0]
    assert f"the cache {tmp_path / 'datasets'} does not have the dataset" in missing[0]
    assert "hf download org/new --repo-type dataset --revision v1 --local-dir" in missing[0]
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/set", HubDataset("org/set", None, None, None)),
        ("org/set:test", HubDataset("org/set", None, None, "test")),
        ("org/set@refs/pr/1:test", HubDataset("org/set", "refs/pr/1", None, "test")),
        ("org/set@v1:signs:train", HubDataset("org/set", "v1", "signs", "train")),
    ],
)
def test_a_name_says_repository_revision_subset_and_split(name, said):
    assert hub_dataset(name) == said


@pytest.mark.parametrize(
    "name",
    [
        *("set", "a/b/c", "/data/train", "../set", "./set", "data/train.json", "data/a.PARQUET"),
        *("org/set:", "org/set::train", "org/set:a:b:c", "org/set@", "org/sé t"),
    ],
)
def test_paths_and_broken_names_are_none_on_the_hub(name):
    assert hub_dataset(name) is None
