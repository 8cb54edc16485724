"""Decoding over a cache of a fixed size, which can be compiled: the same tokens, one graph."""

import pytest
import torch
from tiny import IMAGE_START_ID, write_qwen_vl
from torch import Tensor
from transformers import CompileConfig, StaticCache

from vltrain.models import load_model

PAD = 256
PICTURE = [IMAGE_START_ID, *[IMAGE_START_ID + 2] * 4, IMAGE_START_ID + 1]
SEQ_LENGTH = 512  # of the toy config: past it positions and queries are rescaled


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(write_qwen_vl(tmp_path_factory.mktemp("tiny") / "model"))


def answers(model, prompts: list[list[int]], pictures: int, tokens: int = 12, **how) -> Tensor:
    """What is said greedily, int64 [B, tokens], behind prompts padded on the left."""
    longest = max(map(len, prompts))
    pixels = torch.randn(pictures, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    said = model.generate(
        input_ids=torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
        pixel_values=pixels if pictures else None,
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=None,
        pad_token_id=PAD,
        **how,
    )
    return said[:, longest:]


def prompt(length: int, seed: int) -> list[int]:
    """A picture and text, `length` ids."""
    text = torch.randint(0, 256, (length - 6,), generator=torch.Generator().manual_seed(seed))
    return PICTURE + text.tolist()


@pytest.mark.parametrize(
    "lengths",
    [(30,), (40, 17), (SEQ_LENGTH - 6,), (SEQ_LENGTH + 40,), (SEQ_LENGTH + 40, 30)],
    ids=["one", "padded", "crosses-the-length", "rescaled", "one-of-two-rescaled"],
)
def test_a_static_cache_says_what_a_dynamic_one_does(model, lengths):
    prompts = [prompt(length, seed) for seed, length in enumerate(lengths)]

    dynamic = answers(model, prompts, len(prompts))
    static = answers(model, prompts, len(prompts), cache_implementation="static")

    assert static.tolist() == dynamic.tolist()
    assert len(set(dynamic[0].tolist())) > 3  # or any model would say the same


def test_a_cache_that_was_emptied_knows_nothing_of_what_it_held(model):
    long, short = prompt(SEQ_LENGTH + 40, seed=1), prompt(30, seed=2)
    cache = StaticCache(config=model.config, max_cache_len=640)

    answers(model, [long], 1, past_key_values=cache)
    assert cache.ntk_alpha.tolist() == [3.0]
    cache.reset()
    again = answers(model, [short], 1, past_key_values=cache)

    assert cache.ntk_alpha.tolist() == [1.0]
    assert again.tolist() == answers(model, [short], 1).tolist()


def test_a_step_asks_the_device_for_no_value(model, monkeypatch):
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]), past_key_values=cache)
        mask = (torch.arange(64) <= 3)[None, None, None]

        def refuse(*_):
            raise AssertionError("a value was asked for")

        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__"):
            monkeypatch.setattr(Tensor, name, refuse)
        model(
            input_ids=torch.full((1, 1), 4),
            position_ids=torch.full((1, 1), 3),
            attention_mask=mask,
            past_key_values=cache,
        )


@pytest.mark.slow
def test_a_step_is_one_graph_that_serves_all_lengths(model):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = CompileConfig(fullgraph=True, backend=backend, mode=None, dynamic=False)
    compiled._compile_all_devices = True
    for length in (20, 35, SEQ_LENGTH - 6, SEQ_LENGTH + 40):
        cache = StaticCache(config=model.config, max_cache_len=640)
        how = {"past_key_values": cache, "compile_config": compiled}
        asked = [prompt(length, seed=length)]

        assert answers(model, asked, 1, **how).tolist() == answers(model, asked, 1).tolist()

    assert len(graphs) == 1
