"""What tests of all commands stand on."""

import pytest

import vltrain.workflows.cache
import vltrain.workflows.chat
import vltrain.workflows.convert
import vltrain.workflows.demo
import vltrain.workflows.estimate
import vltrain.workflows.export
import vltrain.workflows.inspect
import vltrain.workflows.merge
import vltrain.workflows.preview
import vltrain.workflows.profile
import vltrain.workflows.quantize
import vltrain.workflows.stats
import vltrain.workflows.train


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The calls that reach a workflow: its name, positional and named arguments."""
    calls: list[tuple] = []
    for module, name in (
        (vltrain.workflows.train, "train"),
        (vltrain.workflows.merge, "merge"),
        (vltrain.workflows.export, "export"),
        (vltrain.workflows.cache, "cache_features"),
        (vltrain.workflows.chat, "answer_file"),
        (vltrain.workflows.quantize, "quantize"),
        (vltrain.workflows.inspect, "check"),
        (vltrain.workflows.convert, "convert_coco_file"),
        (vltrain.workflows.convert, "convert_refcoco_file"),
        (vltrain.workflows.convert, "convert_llava_file"),
        (vltrain.workflows.preview, "preview"),
        (vltrain.workflows.stats, "stats"),
        (vltrain.workflows.estimate, "estimate_run"),
        (vltrain.workflows.profile, "profile_steps"),
        (vltrain.workflows.demo, "write_demo"),
        (vltrain.workflows.demo, "score_demo"),
    ):

        def record(*args, _name=name, **kwargs) -> int:
            calls.append((_name, args, kwargs))
            return 0

        monkeypatch.setattr(module, name, record)
    return calls
