"""What tests of all models stand on."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters
from torch._functorch import config as functorch


@pytest.fixture
def compilations() -> Iterator[None]:
    """Nothing is compiled yet, and nothing stays: neither code nor how much it keeps."""
    torch._dynamo.reset()
    counters.clear()
    yield
    functorch.activation_memory_budget = 1.0
    torch._dynamo.reset()
