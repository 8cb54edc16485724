"""Many damaged inputs for all that reads data: nothing may come out but findings or VltrainError.

    python benchmarks/fuzz.py --cases 20000

The inputs and what must hold of them are those of `tests/data/test_fuzzed.py`, which tries a few
hundred. An input that breaks something is printed, made as small as can be.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "data"))

import fuzzed
import strategies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000, help="for each kind of input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=None, help="files, records, texts, …")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for kind, (inputs, holds) in kinds_of_input(Path(folder)).items():
            if options.kinds is None or kind in options.kinds:
                begin = time.perf_counter()
                tried = run(inputs, holds, cases=options.cases, first=options.seed)
                seconds = time.perf_counter() - begin
                print(f"{kind}: {tried} cases in {seconds:.0f} s, nothing broke", flush=True)


def kinds_of_input(
    folder: Path,
) -> dict[str, tuple[SearchStrategy[Any], Callable[[Any], None]]]:
    """What is tried: the inputs, and what must hold of each.

    Args:
        folder: where damaged records find their picture.
    """
    fuzzed.good_picture(folder)
    records = strategies.damaged_records() | strategies.ANYTHING
    return {
        "files": (strategies.damaged_files(), lambda file: fuzzed.a_file_is_checked(*file)),
        "records": (records, partial(fuzzed.a_record_is_examined, folder=folder)),
        "texts": (strategies.MARKUP, fuzzed.a_text_is_taken_apart),
        "pictures": (strategies.PICTURES, fuzzed.a_picture_is_looked_at),
        "names": (strategies.MARKUP, fuzzed.a_source_is_looked_up),
    }


def run(
    inputs: SearchStrategy[Any], holds: Callable[[Any], None], *, cases: int, first: int
) -> int:
    """Try that many inputs, from a seed; how many were tried."""
    tried = 0

    @seed(first)
    @settings(
        max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(inputs)
    def every(value: Any) -> None:
        nonlocal tried
        tried += 1
        holds(value)

    every()
    return tried


if __name__ == "__main__":
    main()
