"""Answers from a compiled step: the same text, over a cache that is kept and grows."""

from types import SimpleNamespace

import pytest
import torch
from tiny import write_qwen_vl
from transformers import CompileConfig

from vltrain.evaluation import compiled
from vltrain.evaluation.compiled import CompiledSteps, cache_size, reason_against
from vltrain.evaluation.generation import Decoding, Prompt, say
from vltrain.models import load_model, load_processor


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = write_qwen_vl(tmp_path_factory.mktemp("tiny") / "model")
    return load_model(folder), load_processor(folder)


@pytest.fixture
def graphs() -> list:
    """What the step was compiled to, under `compiling`."""
    return []


@pytest.fixture
def compiling(graphs) -> CompileConfig:
    """Tracing as for a GPU, without a compiler behind it."""

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    how = CompileConfig(backend=backend, mode=None, dynamic=False)
    how._compile_all_devices = True
    return how


def prompts(processor) -> list[Prompt]:
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    seen = Prompt([*processor.image_ids("a.png"), *processor.text_ids("what?")], lambda: pixels)
    return [seen, Prompt(processor.text_ids("a question without a picture")), seen]


@pytest.mark.slow
def test_answers_of_a_compiled_step_are_those_of_a_plain_one(asked, compiling, graphs):
    model, processor = asked
    steps = CompiledSteps(model, compiling)

    for prompt in prompts(processor):
        plain = say(model, processor, prompt, Decoding(8))
        pieces: list[str] = []
        said = say(model, processor, prompt, Decoding(8), steps=steps, listener=pieces.append)

        assert said == plain == "".join(pieces)
    assert len(graphs) == 1


@pytest.mark.slow
def test_a_longer_conversation_gets_a_larger_cache_and_keeps_it(asked, compiling, monkeypatch):
    monkeypatch.setattr(compiled, "SMALLEST", 16)
    model, processor = asked
    steps = CompiledSteps(model, compiling)
    held = []
    for words in ("short", "some words that are more than sixteen", "short"):
        prompt = Prompt(processor.text_ids(words))
        said = say(model, processor, prompt, Decoding(4), steps=steps)
        held.append(steps._cache.get_max_length())

        assert said == say(model, processor, prompt, Decoding(4))
    assert held == [20, 68, 68]


def test_a_step_that_does_not_compile_leaves_the_answers_as_they_are(asked, caplog):
    def backend(*_):
        raise RuntimeError("no compiler here\nand more")

    how = CompileConfig(backend=backend, mode=None)
    how._compile_all_devices = True
    model, processor = asked
    prompt = prompts(processor)[0]
    steps = CompiledSteps(model, how)

    said = [say(model, processor, prompt, Decoding(4), steps=steps) for _ in range(2)]

    assert said == [say(model, processor, prompt, Decoding(4))] * 2
    assert sum("not compiled" in record.message for record in caplog.records) == 1


def test_a_model_on_the_cpu_is_not_compiled(asked):
    assert reason_against(asked[0]) == "the model is not on an NVIDIA GPU"


@pytest.mark.parametrize(
    ("lacking", "reason"),
    [
        (None, None),
        ("capability", "too old"),
        ("triton", "triton is not installed"),
        ("compiler", "no C compiler"),
        ("quantizer", "quantized layers"),
    ],
)
def test_a_model_on_a_gpu_is_compiled_where_all_is_there(monkeypatch, lacking, reason):
    capability = (6, 1) if lacking == "capability" else (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(compiled, "find_spec", lambda _: None if lacking == "triton" else "there")
    monkeypatch.setattr(
        compiled.shutil, "which", lambda _: None if lacking == "compiler" else "/bin/cc"
    )
    quantizer = SimpleNamespace(is_compileable=False) if lacking == "quantizer" else None
    model = SimpleNamespace(device=torch.device("cuda", 0), hf_quantizer=quantizer)

    found = reason_against(model)

    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(("prompt", "size"), [(3, 2560), (2048, 2560), (2049, 4608), (6655, 8704)])
def test_a_cache_has_room_for_the_next_power_of_two_and_the_answer(prompt, size):
    assert cache_size(prompt, 512) == size
