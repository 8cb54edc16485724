"""Bytes of activations: by hand, and beside what autograd really keeps."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import varlen

import vltrain.models.attention
from vltrain.config import FreezeConfig
from vltrain.models.adapters import Adapter, add_lora, set_learned, widen_learned
from vltrain.models.attention import attend_packed
from vltrain.models.catalog import QWEN_VL
from vltrain.models.census import take_census
from vltrain.models.layer_runs import LayerRuns, arrange_layers
from vltrain.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration
from vltrain.models.qwen_vl.decoder import DecoderLayer
from vltrain.models.qwen_vl.positions import rotary_tables
from vltrain.models.sizes import (
    AdapterSizes,
    Census,
    DecoderSizes,
    ModelSizes,
    PlaceWeights,
    TowerSizes,
)
from vltrain.training.activations import (
    BatchSizes,
    Compute,
    decoder_kept,
    decoder_layer,
    decoder_output,
    image_tokens_given,
    logits_backward,
    logits_forward,
    logits_gradient,
    residual_bytes,
    vision_kept,
    vision_layer,
    vision_passing,
)

SIZES = ModelSizes(
    DecoderSizes(layers=2, width=8, heads=2, attention_width=8, mlp_width=16, vocabulary=100),
    TowerSizes(layers=3, width=4, heads=2, mlp_width=8, patches=9, image_tokens=4, marks=2),
    loss_rows=None,
)
FROZEN = PlaceWeights(total=800, total_bytes=1600)
LEARNED = PlaceWeights(800, 800, 800, 3200, 3200)
RESTING = Census({"embeddings": FROZEN, "layers": FROZEN}, AdapterSizes())
LEARNING = Census({"embeddings": LEARNED, "layers": LEARNED}, AdapterSizes())
BATCH = BatchSizes(rows=1, row_tokens=10, learned_tokens=6, pictures=1)
HALF, WHOLE = Compute(2), Compute(4)


def test_a_frozen_layer_keeps_norms_attention_and_mlp():
    # Norms 2 x 4 x (8 + 1), attention 6 x 2 x 8 and 4 x 2 heads, MLP 3 x 2 x 16: 272 a token.
    assert decoder_layer(SIZES, RESTING, BATCH, HALF).kept == 10 * 272


def test_a_layer_that_learns_keeps_what_its_weights_read_as_well():
    # 272, and 2 x 4 x 8 of the norms, 3 x 2 x 8 and 2 x 16 of the linear layers.
    assert decoder_layer(SIZES, LEARNING, BATCH, HALF).kept == 10 * (272 + 64 + 48 + 32)


def test_a_frozen_layer_whose_linear_ones_keep_what_they_read_keeps_that_as_well():
    keeping = replace(HALF, keeps_read=True)  # 272, and 2 x 2 x 8 and 2 x 16

    assert decoder_layer(SIZES, RESTING, BATCH, keeping).kept == 10 * (272 + 32 + 32)
    learning = decoder_layer(SIZES, LEARNING, BATCH, HALF).kept
    assert decoder_layer(SIZES, LEARNING, BATCH, keeping).kept == learning


def test_adapters_keep_what_they_read_its_mask_and_their_bottleneck():
    adapters = AdapterSizes(inputs=2 * 32, ranks=2 * 12, outputs=2 * 64, dropout=True)
    census = Census(RESTING.places, adapters)

    # In each of two layers: (2 + 1) x 32 and 2 x 12.
    assert decoder_layer(SIZES, census, BATCH, HALF).kept == 10 * (272 + 96 + 24)


def test_packed_attention_copies_the_values_and_keeps_no_more_of_the_projection():
    packed = replace(HALF, attention="packed")

    for arranged in (packed, replace(packed, compiled=True)):
        whole = decoder_layer(SIZES, RESTING, BATCH, replace(arranged, attention="sdpa")).kept
        assert decoder_layer(SIZES, RESTING, BATCH, arranged).kept == whole - 10 * 2 * 2 * 8


def test_a_compiled_layer_keeps_its_input_and_what_matrix_products_read_and_make():
    compiled = replace(HALF, compiled=True)

    # Input and what attention adds 2 x 2 x 8, norms 8, attention 6 x 2 x 8 and 4 x 2 heads, MLP
    # 2 x 2 x 16: 208 a token.
    assert decoder_layer(SIZES, RESTING, BATCH, compiled).kept == 10 * (32 + 8 + 104 + 64)
    # The input is float32 where embeddings learn; linear layers read 2 x 2 x 8 and 2 x 16.
    learning = decoder_layer(SIZES, LEARNING, BATCH, compiled).kept
    assert learning == 10 * (16 + 32 + 8 + 104 + 64 + 32 + 32)


def test_of_adapters_in_compiled_layers_one_mask_is_computed_again():
    adapters = AdapterSizes(inputs=2 * 32, ranks=2 * 12, outputs=2 * 64, dropout=True)
    census = Census(RESTING.places, adapters)
    compiled = replace(HALF, compiled=True)

    assert decoder_layer(SIZES, census, BATCH, compiled).kept == 10 * (208 + 96 + 24 - 8)
    bare = replace(census, adapters=replace(adapters, dropout=False))
    assert decoder_layer(SIZES, bare, BATCH, compiled).kept == 10 * (208 + 64 + 24)


def test_spelled_out_attention_keeps_two_squares_for_each_head():
    eager = replace(HALF, attention="eager")

    assert decoder_layer(SIZES, RESTING, BATCH, eager).kept == 10 * 272 + 100 * 2 * (4 + 2)


def test_rows_side_by_side_need_a_mask():
    two = BatchSizes(rows=2, row_tokens=10, learned_tokens=12, pictures=2)

    assert decoder_layer(SIZES, RESTING, two, HALF).kept == 20 * 272 + 2 * 100 * 2


def test_checkpointing_keeps_the_input_of_each_layer():
    # Two layers' inputs in bf16; the last norm's input in float32; what the head reads.
    assert decoder_kept(SIZES, RESTING, BATCH, HALF) == 10 * 2 * 2 * 8 + 10 * 4 * 8 + 6 * 2 * 8


def test_without_checkpointing_every_layer_is_kept():
    bare = replace(HALF, checkpointing=False)

    assert decoder_kept(SIZES, RESTING, BATCH, bare) == 10 * 2 * 272 + 10 * 4 * 8 + 6 * 2 * 8


def test_of_every_second_layer_only_the_input_is_kept():
    three = replace(SIZES, decoder=replace(SIZES.decoder, layers=3))
    half = replace(HALF, recompute_every=2)
    layer = decoder_layer(three, RESTING, BATCH, HALF).kept

    assert decoder_kept(three, RESTING, BATCH, half) == 2 * 320 // 2 + layer + 320 + 96


@pytest.mark.parametrize(("share", "kept"), [(1.0, 272), (0.5, 16 + 128), (0.0, 16)])
def test_a_share_is_of_all_that_layers_keep_beside_their_input(share, kept):
    part = replace(HALF, checkpointing=False, kept_share=share)

    assert decoder_kept(SIZES, RESTING, BATCH, part) == 20 * kept + 10 * 4 * 8 + 6 * 2 * 8


def test_to_recompute_all_is_done_within_compiled_layers_and_around_others():
    some = replace(HALF, recompute_every=3)

    assert some.all_recomputed() == Compute(2)
    within = Compute(2, checkpointing=False, kept_share=0.0, compiled=True)
    assert replace(some, compiled=True).all_recomputed() == within
    for all_of_them in (some.all_recomputed(), within):
        assert decoder_kept(SIZES, RESTING, BATCH, all_of_them) == 10 * (32 + 32) + 6 * 16
        assert all_of_them.recomputes_layers
    assert not replace(within, kept_share=0.5).recomputes_layers


def test_hidden_states_have_the_width_of_the_embeddings():
    assert residual_bytes(RESTING) == 2
    assert residual_bytes(LEARNING) == 4


def test_a_loss_of_one_piece_holds_the_logits_three_times():
    assert logits_forward(SIZES, BATCH, HALF) == 10 * 100 * (2 + 4 + 4)
    assert logits_forward(SIZES, BATCH, WHOLE) == 10 * 100 * (4 + 4)
    assert logits_backward(SIZES, BATCH, HALF) == 10 * 100 * 12
    assert logits_gradient(SIZES, BATCH, HALF) == 10 * 2 * (100 + 8)


def test_a_loss_in_blocks_holds_the_logits_of_learned_tokens_and_one_wide_block():
    blocks = replace(SIZES, loss_rows=4)

    assert logits_forward(blocks, BATCH, HALF) == 100 * (6 * 2 + 4 * 12)
    assert logits_backward(blocks, BATCH, HALF) == 100 * (6 * 2 + 4 * 12)
    assert logits_gradient(blocks, BATCH, HALF) == 6 * 2 * (100 + 8)


def test_kernels_of_a_gpu_widen_no_logits():
    kernels = replace(HALF, loss_kernels=True)
    blocks = replace(SIZES, loss_rows=4)

    assert logits_forward(blocks, BATCH, kernels) == 100 * 6 * 2
    assert logits_backward(blocks, BATCH, kernels) == 100 * 6 * 2
    # A loss of one piece has none.
    assert logits_backward(SIZES, BATCH, kernels) == logits_backward(SIZES, BATCH, HALF)


def test_the_last_norms_output_is_as_wide_as_the_hidden_states():
    assert decoder_output(SIZES, RESTING, BATCH) == 10 * 2 * 8
    assert decoder_output(SIZES, LEARNING, BATCH) == 10 * 4 * 8


def test_a_tower_and_a_projector_that_rest_keep_nothing():
    assert vision_kept(SIZES, RESTING, BATCH, HALF) == 0


def test_a_projector_that_learns_keeps_what_it_made_of_the_patches():
    census = Census(RESTING.places | {"projector": LEARNED}, AdapterSizes())

    patches, image_tokens = 9 * (2 * 4 + (4 + 8) * 8), 4 * (4 + 6) * 8
    assert vision_kept(SIZES, census, BATCH, HALF) == patches + image_tokens


def test_the_widest_moment_of_a_resting_tower_is_its_mlp_or_the_projector():
    narrow = replace(SIZES, decoder=replace(SIZES.decoder, width=1))

    assert vision_passing(SIZES, 1, HALF) == 9 * (2 * 4 + (10 + 8) * 8)
    assert vision_passing(narrow, 1, HALF) == 9 * (8 * 4 + 4 * 8)
    assert vision_passing(SIZES, 3, HALF) == 3 * 9 * (2 * 4 + (10 + 8) * 8)


def test_a_picture_takes_nothing_of_a_part_that_it_does_not_pass():
    assert vision_passing(SIZES, 1, HALF, ["projector"]) == 9 * (2 * 4 + (10 + 8) * 8)
    assert vision_passing(SIZES, 1, HALF, ["vision"]) == 9 * (8 * 4 + 4 * 8)
    assert vision_passing(SIZES, 1, HALF, []) == 0


def test_image_tokens_that_are_given_have_the_width_of_the_decoder():
    assert image_tokens_given(SIZES, replace(BATCH, pictures=3), HALF) == 3 * 4 * 2 * 8


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor], *, half: bool) -> int:
    """Bytes that autograd keeps of a forward, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        held = forward()  # its graph must live, or a tensor's address is given to the next
    assert held.requires_grad
    return sum(kept.values())


def small_config(*, decoder_layers: int = 1, vision_layers: int = 1) -> QwenVLConfig:
    config = QwenVLConfig(
        hidden_size=256,
        num_attention_heads=4,
        kv_channels=64,
        num_hidden_layers=decoder_layers,
        intermediate_size=1408,
        vocab_size=480,
        visual={
            "heads": 2,
            "image_size": 112,
            "image_start_id": 470,
            "layers": vision_layers,
            "mlp_ratio": 2.0,
            "n_queries": 4,
            "output_dim": 256,
            "patch_size": 14,
            "width": 96,
        },
    )
    config._attn_implementation = "sdpa"
    return config


@pytest.fixture
def packed_rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a batch of one packed row has beside its ids, where torch's variable-length attention
    is called on a CPU, which has no kernel of it: values are not computed, but kept."""

    def attend(query: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        lse = query.new_zeros(query.size(1), query.size(0), dtype=torch.float32)
        return torch.zeros_like(query), lse, torch.zeros(2, dtype=torch.uint64)

    varlen._varlen_attn.register_kernel("cpu")(attend)
    monkeypatch.setattr(vltrain.models.attention, "kernel_serves", lambda *_: True)
    boundaries = torch.tensor([0, 40, 64], dtype=torch.int32)
    return {"cu_seq_lens_q": boundaries, "max_length_q": 40}


@pytest.mark.parametrize(
    ("method", "half", "packed"),
    [
        ("full", True, False),
        ("full", False, False),
        ("lora", True, False),
        ("lora", True, True),
        ("full", True, True),
    ],
)
def test_a_decoder_layer_keeps_what_the_formula_says(method, half, packed, packed_rows):
    tokens, measured = 64, []
    rows = packed_rows if packed else {}
    ids = torch.arange(tokens)[None]
    for layers in (2, 3):
        config = small_config(decoder_layers=layers)
        model = QwenVLForConditionalGeneration(config)
        model = model.bfloat16() if half else model
        if packed:
            attend_packed(model)
        if method == "full":
            model = set_learned(model, QWEN_VL, FreezeConfig())
            widen_learned(model)
        else:
            adapter = Adapter(r=8, dropout=0.0)  # dropout's mask is bool on a GPU alone
            model = add_lora(model, QWEN_VL, FreezeConfig(), adapter, seed=0)
            model.enable_input_require_grads()
        model.config.use_cache = False
        model.train()
        loss = lambda model=model: model(input_ids=ids, labels=ids, **rows).loss  # noqa: E731
        measured.append(saved_bytes(model, loss, half=half))
    census = take_census(model, QWEN_VL)
    attention = "packed" if packed else "sdpa"
    compute = Compute(2 if half else 4, attention, checkpointing=False)
    batch = BatchSizes(1, tokens, tokens, 0)

    expected = decoder_layer(config.model_sizes(), census, batch, compute).kept
    if half:  # and autocast's copies of the layer's weights
        learned = census.at("layers" if method == "full" else "adapter").learned_matrices
        expected += 2 * learned // 3
    if packed:
        expected += 16  # the kernel's random state
    assert measured[1] - measured[0] == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "share"),
    [
        ("full", 1.0),
        ("lora", 1.0),
        ("projector", 1.0),
        *(("lora", share) for share in (0.75, 0.5, 0.0)),
        ("full", 0.0),
    ],
)
def test_a_compiled_decoder_layer_keeps_what_the_formula_says(method, share, packed_rows):
    """The compiler's own choice of what to keep, without the code that it would write."""
    config = small_config()
    model = QwenVLForConditionalGeneration(config).bfloat16()
    attend_packed(model)
    if method == "lora":
        model = add_lora(model, QWEN_VL, FreezeConfig(), Adapter(r=8), seed=0)
    else:
        freeze = FreezeConfig(language=method == "projector", projector=False)
        widen_learned(set_learned(model, QWEN_VL, freeze))
    model.train()
    partitioned = "aot_eager_decomp_partition"
    arrange_layers(model, LayerRuns(compiled=True, kept=share, backend=partitioned))
    layer = next(part for part in model.modules() if isinstance(part, DecoderLayer))
    census, measured = take_census(model, QWEN_VL), []
    for tokens in (512, 1024):
        wide = residual_bytes(census) == 4
        states = torch.randn(1, tokens, 256, dtype=torch.float32 if wide else torch.bfloat16)
        states.requires_grad_()
        rotary = rotary_tables(torch.arange(tokens)[None], torch.ones(1), config)
        mask = torch.empty(0, dtype=torch.bool)
        forward = partial(layer, states, mask, rotary, None, **packed_rows)
        measured.append(saved_bytes(model, forward, half=True))

    compute = Compute(2, "packed", checkpointing=False, kept_share=share, compiled=True)
    batch = BatchSizes(1, 512, 512, 0)
    whole = decoder_layer(config.model_sizes(), census, batch, compute).kept
    expected = compute.kept_of(whole, 512 * residual_bytes(census) * 256)
    kept = measured[1] - measured[0] - 512 * 2 * 4 * 64  # rotary tables, the same in all layers
    if 0 < share < 1:  # what fits in
        assert 0.8 * share * whole < kept <= expected
    else:
        assert kept == expected


def test_tower_and_projector_keep_what_the_formulas_say():
    measured = []
    pixels = torch.zeros(2, 3, 112, 112)
    for layers, frozen in ((2, True), (2, False), (3, False)):
        config = small_config(vision_layers=layers)
        model = QwenVLForConditionalGeneration(config)
        set_learned(model, QWEN_VL, FreezeConfig(vision=frozen))
        tower = model.transformer.visual
        see = lambda tower=tower: tower(pixels)  # noqa: E731
        measured.append(saved_bytes(model, see, half=False))
    sizes, compute = config.model_sizes(), Compute(4, checkpointing=False)
    resting = take_census(set_learned(model, QWEN_VL, FreezeConfig()), QWEN_VL)
    projector = vision_kept(sizes, resting, BatchSizes(1, 64, 64, 2), compute)

    assert measured[2] - measured[1] == 2 * vision_layer(sizes.tower, compute)
    assert projector == pytest.approx(measured[0], rel=0.01)  # norms' means are left out
