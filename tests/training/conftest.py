"""What tests of all of training stand on."""

import shutil
from collections import namedtuple
from collections.abc import Callable

import pytest


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many bytes are free on every disk."""
    usage = namedtuple("usage", "total used free")

    def set_free(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, count))

    return set_free
