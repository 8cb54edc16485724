"""What tests of every floor stand on."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def qwen_vocabulary() -> Path:
    """The real `qwen.tiktoken`, as the dashscope package carries it."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("dashscope, which carries the real vocabulary, is not installed")
    return Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
