"""Attention over packed rows: no token sees another sample, by mask and by kernel."""

import copy
import inspect

import pytest
import torch
from tiny import write_qwen_vl
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import varlen
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, create_causal_mask

from vltrain.models import attention, load_model
from vltrain.models.attention import attend_packed, kernel_serves, packed_attention, packed_mask

ROW = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 11]]),
    "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]),
    "cu_seq_lens_q": torch.tensor([0, 3, 7], dtype=torch.int32),
    "max_length_q": 4,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    model = load_model(write_qwen_vl(tmp_path_factory.mktemp("attention") / "base"))
    model.config.use_cache = False
    attend_packed(model)
    return model.train()


def plain_mask(device: str, dtype: torch.dtype, **changes) -> Tensor | None:
    """What `packed_mask` makes of a row in which positions restart, but for `changes`."""
    asked = {
        "batch_size": 1,
        "q_length": 3,
        "kv_length": 3,
        "mask_function": causal_mask_function,
        "attention_mask": None,
        "allow_is_causal_skip": False,
    }
    return packed_mask(**asked | changes, dtype=dtype, device=torch.device(device))


def test_a_row_gives_each_sample_the_logits_that_it_has_alone(model):
    packed = model(**ROW).logits[0]

    alone = [
        model(input_ids=ROW["input_ids"][:, part]).logits[0] for part in (slice(3), slice(3, 7))
    ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_a_token_changes_nothing_in_another_sample(model):
    changed = ROW | {"input_ids": torch.tensor([[99, 98, 97, 8, 9, 10, 11]])}

    assert torch.equal(model(**ROW).logits[0, 3:], model(**changed).logits[0, 3:])


def test_padded_rows_are_attended_to_as_before(model):
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])

    padded = model(input_ids=ids, attention_mask=mask).logits

    alone = model(input_ids=ids[1:, :2]).logits
    torch.testing.assert_close(padded[1:, :2], alone, rtol=1e-5, atol=1e-5)


def test_without_a_gpu_the_mask_is_a_block_for_each_sample(model):
    mask = create_causal_mask(
        config=model.config,
        inputs_embeds=torch.zeros(1, 4, 8),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.tensor([[0, 1, 0, 1]]),
    )

    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("device", "dtype", "serves"),
    [
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float16, True),
        ("cuda", torch.float32, False),
        ("cpu", torch.bfloat16, False),
    ],
)
def test_the_kernel_serves_half_precision_on_cuda(device, dtype, serves):
    assert kernel_serves(torch.device(device), dtype) is serves


def test_the_kernel_does_not_serve_gpus_before_ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))

    assert not kernel_serves(torch.device("cuda"), torch.float16)


def test_positions_that_restart_without_boundaries_are_an_error():
    part = torch.zeros(1, 2, 4, 8)

    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        packed_attention(nn.Module(), part, part, part, torch.empty(0, dtype=torch.bool))


def sample_by_sample(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
):
    """What the kernel is documented to do, spelled out: [T, H, head_dim] each."""
    assert (window_size, max_q, max_k) == ((-1, 0), 4, 4)
    assert torch.equal(cu_seq_q, cu_seq_k)
    parts = [
        F.scaled_dot_product_attention(
            *(part[a:b].transpose(0, 1) for part in (query, key, value)),
            is_causal=True,
            scale=scale,
        ).transpose(0, 1)
        for a, b in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True)
    ]
    return torch.cat(parts)


def block_mask() -> Tensor:
    """Of the samples of `ROW`."""
    sample = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    return ((sample[:, None] == sample) & torch.ones(7, 7, dtype=torch.bool).tril())[None, None]


@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_kernel_gets_and_gives_heads_and_tokens_in_its_own_order(monkeypatch, key_heads):
    monkeypatch.setattr(varlen, "varlen_attn", sample_by_sample)
    torch.manual_seed(0)
    query = torch.randn(1, 4, 7, 8)
    key, value = torch.randn(2, 1, key_heads, 7, 8)
    module = nn.Module()
    module.num_key_value_groups = 4 // key_heads

    attended, _ = packed_attention(
        module,
        query,
        key,
        value,
        torch.empty(0, dtype=torch.bool),
        scaling=0.3,
        cu_seq_lens_q=ROW["cu_seq_lens_q"],
        max_length_q=4,
    )

    masked, _ = sdpa_attention_forward(module, query, key, value, block_mask(), scaling=0.3)
    torch.testing.assert_close(attended, masked)


def test_a_model_carries_the_boundaries_to_the_kernel(model, monkeypatch):
    by_mask = model(**ROW).logits
    monkeypatch.setattr(attention, "kernel_serves", lambda device, dtype: True)
    monkeypatch.setattr(varlen, "varlen_attn", sample_by_sample)

    by_kernel = model(**ROW).logits

    torch.testing.assert_close(by_kernel, by_mask, rtol=1e-5, atol=1e-5)


def test_torchs_kernel_takes_the_arguments_that_it_is_given():
    known = inspect.signature(varlen.varlen_attn).parameters

    assert set(inspect.signature(sample_by_sample).parameters) <= set(known)


@pytest.mark.gpu
@pytest.mark.parametrize("key_heads", [4, 2])
def test_kernel_and_mask_agree_in_bfloat16(key_heads):
    torch.manual_seed(0)
    query = torch.randn(1, 4, 7, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    key, value = (
        torch.randn(1, key_heads, 7, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2)
    )
    module = nn.Module()
    module.num_key_value_groups = 4 // key_heads
    boundaries = {"cu_seq_lens_q": ROW["cu_seq_lens_q"].cuda(), "max_length_q": 4}

    results = []
    for mask in (plain_mask("cuda", torch.bfloat16), block_mask().cuda()):
        attended, _ = packed_attention(module, query, key, value, mask, 0.125, **boundaries)
        gradients = torch.autograd.grad(attended.float().square().sum(), (query, key, value))
        results.append((attended, *gradients))

    for by_kernel, by_mask in zip(*results, strict=True):
        torch.testing.assert_close(by_kernel, by_mask, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"allow_is_causal_skip": True},
        {"local_size": 2},
        {"allow_is_bidirectional_skip": False},
        {"kv_length": 5},
        {"attention_mask": torch.ones(1, 3, dtype=torch.bool)},
    ],
)
def test_the_kernel_is_left_out_where_a_mask_says_more_than_boundaries(changes):
    changes = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in changes.items()}

    mask = plain_mask("cuda", torch.bfloat16, **changes)

    assert mask is None or mask.numel()


@pytest.mark.gpu
def test_a_model_gives_a_row_by_kernel_what_it_gives_by_mask(model):
    on_gpu = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in ROW.items()}
    model = copy.deepcopy(model).to("cuda", torch.bfloat16)
    by_kernel = model(**on_gpu).logits
    model.set_attn_implementation("sdpa")
    by_mask = model(**on_gpu).logits

    torch.testing.assert_close(by_kernel, by_mask, rtol=2e-2, atol=2e-2)
