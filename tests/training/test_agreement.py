"""Decisions of several processes, as two of them take them."""

from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import distributed

from vltrain.training.agreement import any_process, from_all

CPU = torch.device("cpu")
FORK = get_context("fork")


def decide(rank: int, store: Path, told) -> None:
    """What one of two processes asks, and is answered."""
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=30),
    )
    agreed = any_process([rank == 1, False, True], CPU)
    names = from_all([f"{rank}a", f"{rank}b"] if rank == 0 else [f"{rank}a"])
    told.put((rank, agreed, names))
    distributed.destroy_process_group()


@pytest.mark.slow
def test_what_one_process_wants_all_do(tmp_path: Path):
    told = FORK.Queue()
    processes = [FORK.Process(target=decide, args=(rank, tmp_path / "s", told)) for rank in (0, 1)]
    for process in processes:
        process.start()

    answers = sorted(told.get(timeout=60) for _ in processes)

    for process in processes:
        process.join()
    assert answers == [
        (0, [True, False, True], ["0a", "0b", "1a"]),
        (1, [True, False, True], ["0a", "0b", "1a"]),
    ]


def test_one_process_alone_decides_by_itself():
    assert any_process([True, False], CPU) == [True, False]
    assert from_all("ab") == ["a", "b"]
