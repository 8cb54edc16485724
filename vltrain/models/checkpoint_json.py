"""The JSON files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from vltrain.errors import VltrainError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        VltrainError: the file is missing, broken or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VltrainError.at(
            str(path),
            what="there is no such file",
            fix="give the folder of a whole checkpoint: config.json, weights, tokenizer",
        ) from None
    except ValueError as error:
        raise VltrainError.at(
            str(path), what=f"not valid JSON ({error})", fix="download the file again"
        ) from error
    if not isinstance(values, dict):
        raise VltrainError.at(str(path), what="holds no JSON object", fix="download the file again")
    return values
