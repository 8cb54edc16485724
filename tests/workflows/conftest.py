"""What tests of all workflows stand on."""

from pathlib import Path

import pytest
import torch
from moved_adapters import write_adapter
from safetensors.torch import load_file
from tiny import write_conversations, write_qwen_vl

import vltrain.workflows.export
import vltrain.workflows.merge
from vltrain.workflows.reload import reload_folder


@pytest.fixture(autouse=True)
def _read_back(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is read back in this process: only tests marked slow start a fresh one."""
    if request.node.get_closest_marker("slow") is None:
        for workflow in (vltrain.workflows.export, vltrain.workflows.merge):
            monkeypatch.setattr(workflow, "reload_in_a_fresh_process", _reload_here)


def _reload_here(folder: Path, scratch: Path | None) -> torch.Tensor | None:
    reload_folder(folder, scratch)
    return None if scratch is None else load_file(scratch)["logits"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that no test of the file changes."""
    return write_qwen_vl(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four conversations of `tiny`, five pictures in them."""
    return write_conversations(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without weights."""
    folder = write_qwen_vl(tmp_path_factory.mktemp("bare") / "base")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter in the directory of a run on the base."""
    return write_adapter(base, tmp_path / "run" / "final")
