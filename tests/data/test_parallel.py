"""Work on many values gives the same results in the same order for any number of processes."""

import os

import pytest

from vltrain.data.parallel import CHUNK_BYTES, map_chunks


def doubled(values):
    return [2 * value for value in values]


def process_of(values):
    return os.getpid()


def refuse_five(values):
    if 5 in values:
        raise ValueError("five")
    return values


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_values(workers):
    results = list(map_chunks(doubled, range(5), workers=workers, chunk_values=2))

    assert results == [[0, 2], [4, 6], [8]]


@pytest.mark.parametrize("workers", [1, 2])
def test_large_values_come_in_chunks_of_so_many_bytes(workers):
    sizes = [CHUNK_BYTES, 1, CHUNK_BYTES // 2, CHUNK_BYTES // 2, 5]

    results = list(map_chunks(list, sizes, workers=workers, size_of=int))

    assert results == [sizes[:1], sizes[1:4], sizes[4:]]


def test_a_single_chunk_is_worked_on_here():
    assert list(map_chunks(process_of, range(5), workers=2)) == [os.getpid()]


def test_several_chunks_are_worked_on_elsewhere():
    assert os.getpid() not in map_chunks(process_of, range(5), workers=2, chunk_values=2)


def test_values_are_read_only_a_little_ahead_of_the_results():
    read = []
    results = map_chunks(
        doubled, (read.append(n) or n for n in range(99)), workers=2, chunk_values=1
    )

    next(results)

    assert len(read) == 7
    results.close()


def test_an_error_in_a_worker_is_raised_here():
    with pytest.raises(ValueError, match="five"):
        list(map_chunks(refuse_five, range(9), workers=2, chunk_values=2))
