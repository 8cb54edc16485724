"""What tests of every floor stand on."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs keep what they have checked in a cache of the tests, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def qwen_vocabulary() -> Path:
    """The real `qwen.tiktoken`, as the dashscope package carries it."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("dashscope, which carries the real vocabulary, is not installed")
    return Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
