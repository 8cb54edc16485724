"""A JSON list is read piece by piece, whatever the size of the pieces."""

import io
import json
import tracemalloc

import pytest

from vltrain.data.json_list import NotJsonError, list_elements

VALUES = [{"a": 'br]ace}s and "quotes" \\'}, "é😀", -1.5e10, 12345, None, True, [[], {}], ""]


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 100_000])
@pytest.mark.parametrize("indent", [None, 2])
def test_elements_come_out_as_they_were_written(chunk_bytes, indent):
    raw = json.dumps(VALUES, ensure_ascii=indent is None, indent=indent).encode()

    assert list(list_elements(io.BytesIO(raw), chunk_bytes=chunk_bytes)) == VALUES


@pytest.mark.parametrize("chunk_bytes", [3, 4, 100])
def test_a_byte_order_mark_and_windows_line_ends_mean_nothing(chunk_bytes):
    raw = b"\xef\xbb\xbf\r\n[\r\n1,\r\n2\r\n]\r\n"

    assert list(list_elements(io.BytesIO(raw), chunk_bytes=chunk_bytes)) == [1, 2]


@pytest.mark.parametrize("chunk_bytes", [3, 8, 100])
@pytest.mark.parametrize(
    ("raw", "before", "message"),
    [
        (b"[1,\n{\n", [1], "line 3, column 1: Expecting property name"),
        (b'[1,\n{"a" 2}]', [1], "line 2, column 6: Expecting ':' delimiter"),
        (b"[1\n2]", [1], "line 2, column 1: Expecting ',' delimiter"),
        (b"[1,\n]", [1], "line 2, column 1: Expecting value"),
        (b"[1,\n2", [1, 2], "line 2, column 2: Expecting ',' delimiter"),
        (b"[1]\nx", [1], "line 2, column 1: Extra data"),
        (b'[1,\n"a\nb"]', [1], "line 2, column 3: Invalid control character"),
        (b'[1,\n"a', [1], "line 2, column 1: Unterminated string"),
        (b'[1,\n"\xff"]', [1], "line 2 is not UTF-8"),
        (b'[1,\n"\xc3', [1], "line 2 is not UTF-8"),
    ],
)
def test_what_is_broken_is_named_by_line_after_what_stands_before(
    chunk_bytes, raw, before, message
):
    read = []
    with pytest.raises(NotJsonError) as error:
        read.extend(list_elements(io.BytesIO(raw), chunk_bytes=chunk_bytes))

    assert message in error.value.fault.message
    assert read == before


def test_elements_before_a_broken_one_are_handed_out_first():
    elements = list_elements(io.BytesIO(b"[1, 2,\nx]"))

    assert [next(elements), next(elements)] == [1, 2]
    with pytest.raises(NotJsonError):
        next(elements)


def test_a_nesting_beyond_all_measure_is_a_fault_with_its_line():
    raw = b"[1,\n" + b"[" * 200_000

    with pytest.raises(NotJsonError) as error:
        list(list_elements(io.BytesIO(raw)))

    assert error.value.fault.message.startswith("not JSON: line 2")


def test_a_long_list_takes_no_more_memory_than_a_chunk(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("[" + ",".join(['["' + "1" * 996 + '"]'] * 20_000) + "]")  # 20 MB
    tracemalloc.start()
    with file.open("rb") as opened:
        count = sum(1 for _ in list_elements(opened))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert count == 20_000
    assert peak_bytes < 3_000_000
