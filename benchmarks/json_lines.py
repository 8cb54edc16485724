"""Results as JSON, a line each, as soon as they are known."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def tell(row: Mapping[str, Any], output: Path | None) -> None:
    """Print a result, and add it to a file where one is given."""
    line = json.dumps(row)
    print(line, flush=True)
    if output is not None:
        with output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
