"""Recipes as YAML: numbers as people write them, no dates, and no key twice.

What `to_yaml` writes, `read_yaml` reads back as it was.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from vltrain.errors import VltrainError

FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)
"""What a person calls a number; YAML 1.1, and so PyYAML, reads 1e-5 as a string."""


class _RecipeLoader(yaml.SafeLoader):
    """YAML with people's floats, without dates, and where a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # a list or a mapping, which the base class refuses
            if key.value in names:
                raise yaml.MarkedYAMLError(
                    problem=f"`{key.value}` is written twice", problem_mark=key.start_mark
                )
            names.add(key.value)
        return super().construct_mapping(node, deep)


class _RecipeDumper(yaml.SafeDumper):
    """Quotes what `_RecipeLoader` would take for something else."""


for _side in (_RecipeLoader, _RecipeDumper):
    _side.yaml_implicit_resolvers = {
        first: [
            (tag, pattern) for tag, pattern in pairs if not tag.endswith(("float", "timestamp"))
        ]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _side.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def to_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML, in their order."""
    return yaml.dump(values, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str, where: str) -> Any:
    """The value of one YAML document.

    Raises:
        VltrainError: it is none; names `where` and the line.
    """
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise VltrainError.at(
            where + (f":{mark.line + 1}" if mark else ""),
            what=f"is not YAML: {getattr(error, 'problem', error)}",
            fix="mend the line",
        ) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a recipe's file; empty where the file is.

    Raises:
        VltrainError: the file cannot be read, is not YAML or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VltrainError.at(
            str(path),
            what=f"the recipe cannot be read: {getattr(error, 'strerror', None) or error}",
            fix="give the path of a YAML file",
        ) from None
    values = parse_yaml(text, where=str(path))
    if values is not None and not isinstance(values, dict):
        raise VltrainError.at(
            str(path), what="a recipe is a mapping of keys", fix="begin with a line like `model: …`"
        )
    return values or {}
