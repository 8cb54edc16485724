"""Recipes as tests write them, by flags alone or in a file, and what is said of their mistakes."""

from pathlib import Path

import pytest

from vltrain.config import Recipe, load_recipe
from vltrain.errors import VltrainError


def recipe_of(*overrides: str, method: str = "lora") -> Recipe:
    """The recipe of `vltrain METHOD --model base --data a.json --output runs/a --set …`."""
    return load_recipe(
        None,
        method=method,
        model="base",
        data=[Path("a.json")],
        output=Path("runs/a"),
        overrides=overrides,
    )


def fault_of(*overrides: str, method: str = "lora") -> str:
    """What `vltrain` says to overrides that it refuses."""
    with pytest.raises(VltrainError) as error:
        recipe_of(*overrides, method=method)
    return str(error.value)


def from_file(folder: Path, text: str, *overrides: str, method: str = "lora") -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, method=method, overrides=overrides)


def fault_in_file(folder: Path, text: str, method: str = "lora") -> str:
    with pytest.raises(VltrainError) as error:
        from_file(folder, text, method=method)
    return str(error.value)


SMALLEST = "model: base\noutput: runs/a\ndata:\n  files: a.json\n"
