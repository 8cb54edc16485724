"""The floors of the package, drawn from its imports: arrows point down."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vltrain"

# From what is below to what is above; floors in one row do not know each other.
FLOORS = (
    ("errors", "cores"),
    ("recipe_yaml", "recipe_types", "hub_names"),
    ("method_config", "data_config"),
    ("trainer_config",),
    ("config",),
    ("data", "models", "demo"),
    ("training", "evaluation"),
    ("workflows",),
    ("commands",),
    ("cli",),
    ("__main__", "__init__"),
)
LEVELS = {floor: level for level, row in enumerate(FLOORS) for floor in row}
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "matplotlib", "tiktoken"}
LIGHT_MODULES = (
    *("__init__.py", "__main__.py", "cli.py", "config.py", "errors.py", "recipe_yaml.py"),
    *("commands/__init__.py", "commands/cache.py", "commands/chat.py", "commands/convert.py"),
    *("commands/device.py", "commands/export.py", "commands/options.py", "commands/profile.py"),
    *("commands/quantize.py", "commands/train.py", "trainer_config.py"),
)
WITH_TORCH = ("collation.py", "streaming.py")  # of data
TORCH_FREE = sorted(path for path in (PACKAGE / "data").glob("*.py") if path.name not in WITH_TORCH)


def floor_of(path: Path) -> str:
    """The part of the package that a file belongs to: `data` for vltrain/data/checks.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Every module that is imported, inside functions too, by its whole name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(relative, package)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def arrows() -> Iterator[tuple[Path, str]]:
    """Each file of the package with each floor that it imports."""
    for path in sorted(PACKAGE.rglob("*.py")):
        package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
        for name in imported(ast.parse(path.read_text(encoding="utf-8")), package):
            parts = name.split(".")
            if parts[0] == "vltrain" and len(parts) > 1 and parts[1] in LEVELS:
                yield path, parts[1]


def points_down(source: str, target: str) -> bool:
    """May a file of one floor import from another?"""
    return source == target or LEVELS[source] > LEVELS[target]


def test_every_part_of_the_package_has_a_floor():
    parts = {floor_of(path) for path in PACKAGE.rglob("*.py")}

    assert parts <= set(LEVELS)


def test_imports_point_down_and_never_between_data_and_models():
    turned = sorted(
        f"{path.relative_to(PACKAGE.parent)} imports {target}"
        for path, target in arrows()
        if not points_down(floor_of(path), target)
    )

    assert turned == []


@pytest.mark.parametrize(
    ("source", "target", "allowed"),
    [
        ("workflows", "data", True),
        ("data", "errors", True),
        ("training", "training", True),
        ("data", "models", False),
        ("models", "data", False),
        ("demo", "data", False),
        ("evaluation", "training", False),
        ("errors", "config", False),
        ("training", "workflows", False),
    ],
)
def test_an_arrow_up_or_sideways_is_told_from_one_down(source, target, allowed):
    assert points_down(source, target) is allowed


def test_imports_inside_functions_and_relative_ones_are_seen():
    tree = ast.parse("def f():\n    from ..models import loading\n    import vltrain.data\n")

    assert list(imported(tree, "vltrain.workflows")) == ["vltrain.models.loading", "vltrain.data"]


def heavy_at_top(path: Path, heavy: set[str]) -> set[str]:
    """Heavy libraries that a file imports as soon as it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = imported(ast.Module(top, []), "vltrain")
    return {name.split(".")[0] for name in names} & heavy


@pytest.mark.parametrize("name", LIGHT_MODULES)
def test_what_help_needs_imports_nothing_heavy(name):
    assert heavy_at_top(PACKAGE / name, HEAVY) == set()


@pytest.mark.parametrize("path", TORCH_FREE, ids=lambda path: path.name)
def test_data_needs_no_torch_before_a_batch_is_made(path):
    assert heavy_at_top(path, {"torch", "transformers"}) == set()
