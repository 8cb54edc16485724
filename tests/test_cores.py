"""The cores that a process may use, which may be fewer than the machine has."""

import os
import subprocess
import sys

import pytest

from vltrain.cores import usable_cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are bound on Linux alone")
def test_a_process_bound_to_one_core_uses_one():
    bound = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    count = "from vltrain.cores import usable_cores; print(usable_cores())"
    said = subprocess.run([sys.executable, "-c", bound + count], capture_output=True, check=True)

    assert int(said.stdout) == 1


def test_where_processes_are_not_bound_all_cores_count(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity", raising=False)

    assert usable_cores() == os.cpu_count()
