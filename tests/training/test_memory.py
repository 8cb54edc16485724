"""Memory of a run: by hand, and that it moves the way it must."""

from dataclasses import replace

import pytest

from vltrain.models.sizes import (
    AdapterSizes,
    Census,
    DecoderSizes,
    ModelSizes,
    PlaceWeights,
    TowerSizes,
)
from vltrain.training.activations import BatchSizes, Compute, decoder_kept, decoder_layer
from vltrain.training.memory import (
    CONTEXT_BYTES,
    WORKSPACE_BYTES,
    estimate,
    largest_batch,
    scaled,
)
from vltrain.training.moments import Features, Work
from vltrain.training.optimizer_bytes import Optimizer
from vltrain.training.sharing import Sharing

SIZES = ModelSizes(
    DecoderSizes(layers=2, width=8, heads=2, attention_width=8, mlp_width=16, vocabulary=100),
    TowerSizes(layers=3, width=4, heads=2, mlp_width=8, patches=9, image_tokens=4, marks=2),
    loss_rows=None,
)


def frozen(count: int) -> PlaceWeights:
    return PlaceWeights(total=count, total_bytes=2 * count)


def learned(count: int) -> PlaceWeights:
    return PlaceWeights(count, count, count, 4 * count, 4 * count)


LORA = Census(
    {
        "embeddings": frozen(800),
        "layers": frozen(1280),
        "head": frozen(800),
        "vision": frozen(600),
        "projector": frozen(100),
        "adapter": learned(256),
    },
    AdapterSizes(inputs=64, ranks=8, outputs=112, dropout=True),
)
FULL = Census(
    {
        "embeddings": learned(800),
        "layers": learned(1280),
        "head": learned(800),
        "vision": frozen(600),
        "projector": frozen(100),
    },
    AdapterSizes(),
)
BATCH = BatchSizes(rows=1, row_tokens=10, learned_tokens=6, pictures=1)
WORK = Work(Compute(2), Optimizer("adamw_torch_fused"))
SENT = replace(WORK, sharing=Sharing("ddp", processes=2))


def moment(census: Census, work: Work, name: str, sizes: ModelSizes = SIZES):
    return {m.name: m for m in estimate(census, sizes, BATCH, work).moments}[name]


def test_an_adapter_run_is_weights_states_and_the_loss_on_its_way_back():
    memory = estimate(LORA, SIZES, BATCH, WORK)

    assert memory.weights == {
        "embeddings": 1600,
        "layers": 2560,
        "head": 1600,
        "vision": 1200,
        "projector": 200,
        "adapter": 1024,
    }
    assert memory.optimizer == 2 * 1024
    assert memory.peak.name == "the loss, backward"
    assert memory.peak.gradients == 1024
    assert memory.peak.activations == 10 * 2 * 2 * 8 + 10 * 4 * 8 + 6 * 2 * 8
    assert memory.peak.logits == 10 * 100 * 12
    assert memory.total == 8184 + 2048 + WORKSPACE_BYTES + 1024 + 736 + 12_000
    assert memory.needed == memory.total + CONTEXT_BYTES


def test_a_full_run_takes_sixteen_bytes_for_each_learned_weight_and_copies_of_them():
    memory = estimate(FULL, SIZES, BATCH, WORK)

    assert sum(memory.weights.values()) == 4 * 2880 + 2 * 700
    assert memory.optimizer == 8 * 2880
    assert moment(FULL, WORK, "the loss").gradients == 4 * 2880
    # Autocast copies the layers' matrices; embeddings are looked up as they are.
    assert moment(FULL, WORK, "the loss, backward").copies == 0
    # Of the head, which is less than a piece, and its gradient in bf16; and of 6 tokens.
    assert moment(FULL, WORK, "the loss").copies == 2 * (1280 + 800)
    assert moment(FULL, WORK, "the head, backward").copies == (2 + 2) * 800 + (4 + 2) * 6 * 8
    assert moment(FULL, WORK, "the embeddings, backward").copies == 3 * 4 * 10 * 8


def test_a_head_of_many_pieces_is_never_copied_whole():
    wide = replace(SIZES, decoder=replace(SIZES.decoder, vocabulary=20_000))

    assert moment(FULL, WORK, "the loss", wide).copies == 2 * (1280 + 8192 * 8)


def test_where_gradients_are_sent_they_are_there_whole_before_they_are_added():
    assert moment(FULL, SENT, "the loss").copies == 2 * (1280 + 800)
    assert moment(FULL, SENT, "the loss, backward").copies == 2 * 800
    # The head's gradient comes in bf16 and is widened, beside the copy of its weights.
    assert moment(FULL, SENT, "the head, backward").copies == (2 + 4 + 2) * 800
    assert moment(FULL, SENT, "the embeddings, backward").copies == 4 * 800


def test_copies_stay_where_layers_are_not_recomputed():
    bare = replace(WORK, compute=replace(WORK.compute, checkpointing=False))

    assert moment(FULL, bare, "the loss, backward").copies == 2 * 1280


def test_copies_of_recomputed_layers_are_made_anew():
    every_second = replace(SENT, compute=replace(WORK.compute, recompute_every=2))

    # Of two layers one; autocast lets go of the other's copies at the end of the forward.
    assert moment(FULL, every_second, "the loss, backward").copies == 2 * (640 + 800)
    assert moment(FULL, every_second, "the loss").copies == 2 * (1280 + 800)


def test_compiled_layers_make_copies_that_autocast_does_not_hold_on_to():
    compiled = replace(SENT, compute=replace(WORK.compute, compiled=True))

    assert moment(FULL, compiled, "the loss").copies == 2 * 800  # the head's


def test_layers_that_keep_a_share_keep_a_share_of_their_copies():
    half, none = (
        replace(WORK, compute=Compute(2, checkpointing=False, kept_share=share, compiled=True))
        for share in (0.5, 0.0)
    )

    assert moment(FULL, half, "the loss, backward").copies == 2 * 640
    assert moment(FULL, none, "the loss, backward").copies == 0
    # A layer that is on its way back has its own: 640 numbers; and a gradient of 8 x 24.
    assert moment(FULL, none, "the last layer, backward").copies == 2 * 640 + (2 + 4) * 8 * 24


def test_compiled_layers_hold_second_matrices_of_adapters_scaled_where_they_are_not_copied():
    narrow = LORA.rounded(2)
    bare = Compute(2, checkpointing=False)

    for compiled, copies in ((False, 0), (True, 2 * 163)):  # of 256 numbers 112 / (64 + 112)
        work = replace(WORK, compute=replace(bare, compiled=compiled))
        assert moment(narrow, work, "the loss, backward").copies == copies
        assert moment(LORA, work, "the loss, backward").copies == 2 * 256


def test_what_is_recomputed_within_a_layer_is_there_on_its_way_back():
    layer = decoder_layer(SIZES, LORA, BATCH, Compute(2, compiled=True))
    for share in (0.0, 0.5, 1.0):
        compute = Compute(2, checkpointing=False, kept_share=share, compiled=True)
        last = moment(LORA, replace(WORK, compute=compute), "the last layer, backward")
        kept = decoder_kept(SIZES, LORA, BATCH, compute)

        assert last.activations == kept + layer.working + round(layer.kept * (1 - share))


def test_in_float32_nothing_is_copied():
    whole = replace(WORK, compute=Compute(4))

    assert moment(FULL, whole, "the loss").copies == 0
    assert moment(FULL, whole, "the head, backward").copies == 4 * 800 + (4 + 4) * 6 * 8


def test_without_accumulation_no_gradient_is_there_before_the_way_back():
    alone = replace(WORK, accumulates=False)

    assert moment(FULL, alone, "the loss, backward").gradients == 0
    assert moment(FULL, alone, "the last layer, backward").gradients == 4 * 800  # the head's
    # All but the embeddings' and, of two layers, this one's.
    assert moment(FULL, alone, "the first layer, backward").gradients == 4 * (800 + 640)
    assert moment(FULL, alone, "the optimizer's step").gradients == 4 * 2880


def test_torchs_plain_adamw_holds_the_roots_of_the_second_moments_for_a_while():
    plain = replace(WORK, optimizer=Optimizer("adamw_torch"))

    assert moment(FULL, plain, "the optimizer's step").copies == 4 * 2880
    assert moment(FULL, WORK, "the optimizer's step").copies == 0


def test_paged_states_are_not_on_the_gpu():
    paged = estimate(LORA, SIZES, BATCH, replace(WORK, optimizer=Optimizer("paged_adamw_32bit")))

    assert (paged.optimizer, paged.off_gpu) == (0, 2048)


TOKENS = replace(WORK, features=Features(("vision", "projector"), at_once=8))
PATCHES = replace(WORK, features=Features(("vision",), at_once=8))
READING = Census(LORA.places | {"projector": learned(100)}, LORA.adapters)  # the projector learns


def test_pictures_whose_image_tokens_are_kept_pass_neither_tower_nor_projector():
    pixels, tokens = (moment(LORA, work, "the vision tower's forward") for work in (WORK, TOKENS))

    assert pixels.vision == 9 * (2 * 4 + 18 * 8)  # a picture's patches in the projector
    assert tokens.vision == 4 * 2 * 8  # its image tokens, which the batch brings
    assert moment(LORA, TOKENS, "the loss, backward").vision == tokens.vision


def test_pictures_whose_patches_are_kept_pass_the_projector_that_learns():
    pixels, patches = (
        moment(READING, work, "the vision tower's forward") for work in (WORK, PATCHES)
    )

    assert patches == pixels  # the projector's moment is the wider one
    narrow = replace(SIZES, decoder=replace(SIZES.decoder, width=1))
    seen = 9 * (2 * 4 + 12) + 4 * 10  # what the projector keeps
    at_once = 9 * (2 * 4 + 18)
    found = moment(READING, PATCHES, "the vision tower's forward", narrow).vision
    assert found == seen + at_once


def test_features_are_computed_before_there_is_a_gradient():
    tokens, patches = (
        moment(census, work, "the features, before the first step")
        for census, work in ((LORA, TOKENS), (READING, PATCHES))
    )

    assert (tokens.gradients, tokens.vision) == (0, 8 * 9 * (2 * 4 + 18 * 8))
    assert (patches.gradients, patches.vision) == (0, 8 * 9 * (8 * 4 + 4 * 8))  # the tower alone


def test_weights_that_compute_features_stay_on_the_gpu():
    assert (
        estimate(LORA, SIZES, BATCH, TOKENS).weights == estimate(LORA, SIZES, BATCH, WORK).weights
    )


def shared(engine, *, stage=0, processes=4, **settings) -> Work:
    return replace(WORK, sharing=Sharing(engine, stage, processes, **settings))


def test_ddp_holds_all_of_it_and_the_gradients_once_more():
    alone, ddp = (estimate(FULL, SIZES, BATCH, work) for work in (WORK, shared("ddp")))

    assert ddp.total == alone.total + 4 * 2880


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [
        (1, 2 * 2880 + 1400, 2 * 2880, 12 * 2880 // 4),
        (2, 2 * 2880 + 1400, 2 * 2880 // 4, 12 * 2880 // 4),
        (3, (2 * 2880 + 1400) // 4, 2 * 2880 // 4, 12 * 2880 // 4),
    ],
)
def test_each_stage_of_zero_shares_one_thing_more_out(stage, weights, gradients, optimizer):
    memory = estimate(FULL, SIZES, BATCH, shared("deepspeed", stage=stage))

    assert sum(memory.weights.values()) == weights
    assert memory.peak.gradients == gradients
    assert memory.optimizer == optimizer


def test_shared_weights_are_gathered_layer_by_layer():
    zero3 = shared("deepspeed", stage=3)

    assert moment(FULL, zero3, "the loss, backward").copies == 2 * (640 + 800)  # layer and head


def test_zero3_goes_ahead_in_whole_matrices():
    def copies(**sizes: int) -> int:
        work = shared("deepspeed", stage=3)
        work = replace(work, sharing=replace(work.sharing, **sizes))
        return moment(FULL, work, "the loss, backward").copies

    assert copies(ahead=100, most_ahead=10**9) == 2 * (640 + 100 + 800)
    assert copies(ahead=100, most_ahead=700) == 2 * (700 + 800)
    assert copies(ahead=100, most_ahead=1) == 2 * (640 + 800)
    assert copies(ahead=10**6, most_ahead=10**6) == 2 * FULL.all.total


def test_a_bucket_of_zero3_is_there_whole():
    work = shared("deepspeed", stage=3)
    bucket = replace(work, sharing=replace(work.sharing, bucket=10**6))

    plain, with_bucket = (estimate(LORA, SIZES, BATCH, w).workspace for w in (work, bucket))
    assert with_bucket - plain == 2 * 10**6


def test_fsdp2_that_sums_late_has_whole_gradients():
    late = shared("fsdp2")
    late = replace(late, sharing=replace(late.sharing, sums_late=True))

    assert estimate(FULL, SIZES, BATCH, late).peak.gradients == 4 * 2880


def test_engines_that_round_weights_need_no_copies_and_no_wide_hidden_states():
    for engine in ("deepspeed", "fsdp2"):
        loss = moment(FULL, shared(engine, stage=1), "the loss")

        assert loss.copies == (2 * (640 + 800) if engine == "fsdp2" else 0)
        # And the last norm's output, as wide as the hidden states.
        assert loss.activations == 10 * 2 * 2 * 8 + 10 * 4 * 8 + 6 * 2 * 8 + 10 * 2 * 8


def test_fsdp2_shares_float32_weights_gradients_and_states_out():
    memory = estimate(FULL, SIZES, BATCH, shared("fsdp2"))

    assert sum(memory.weights.values()) == (4 * 2880 + 1400) // 4
    assert memory.optimizer == 8 * 2880 // 4
    assert memory.peak.gradients == 4 * 2880 // 4


def test_what_is_offloaded_lies_on_the_host():
    work = shared("deepspeed", stage=3, offload_optimizer=True, offload_weights=True)
    memory = estimate(FULL, SIZES, BATCH, work)

    assert (memory.optimizer, sum(memory.weights.values())) == (0, 0)
    assert memory.off_gpu == 12 * 2880 // 4


@pytest.mark.parametrize("census", [LORA, FULL], ids=["lora", "full"])
def test_more_of_anything_never_takes_less(census):
    small = estimate(census, SIZES, BATCH, WORK).total
    longer = replace(BATCH, row_tokens=1000, learned_tokens=600)
    for batch in (longer, scaled(BATCH, 100), replace(BATCH, pictures=1000)):
        assert estimate(census, SIZES, batch, WORK).total > small
    for work in (
        replace(WORK, compute=replace(WORK.compute, checkpointing=False)),
        replace(WORK, optimizer=Optimizer("ademamix")),
    ):
        assert estimate(census, SIZES, BATCH, work).total >= small


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
def test_more_processes_never_take_more_of_each(engine):
    totals = [
        estimate(FULL, SIZES, BATCH, shared(engine, stage=3, processes=count)).total
        for count in (1, 2, 4, 8)
    ]

    assert totals == sorted(totals, reverse=True)


def test_the_allocators_pieces_are_counted_where_a_run_is_to_fit_for_certain():
    memory = estimate(LORA, SIZES, BATCH, WORK)

    assert memory.comfortable == memory.needed + round(0.09 * memory.total)


def test_the_largest_batch_fits_and_one_row_more_does_not():
    gpu = CONTEXT_BYTES + round(1.2 * WORKSPACE_BYTES)

    rows = largest_batch(LORA, SIZES, BATCH, WORK, gpu)

    def comfortable(count):
        return estimate(LORA, SIZES, scaled(BATCH, count), WORK).comfortable

    assert 1 < rows < 4096
    assert comfortable(rows) <= gpu < comfortable(rows + 1)


def test_no_more_rows_are_looked_at_than_anyone_would_take():
    assert largest_batch(LORA, SIZES, BATCH, WORK, 2**50) == 4096


def test_no_batch_fits_where_the_model_does_not():
    assert largest_batch(LORA, SIZES, BATCH, WORK, CONTEXT_BYTES) == 0


def test_a_batch_grows_with_its_rows():
    two = BatchSizes(rows=2, row_tokens=10, learned_tokens=7, pictures=3)

    assert scaled(two, 4) == BatchSizes(rows=4, row_tokens=10, learned_tokens=14, pictures=6)
    assert scaled(two, 1) == BatchSizes(rows=1, row_tokens=10, learned_tokens=4, pictures=2)
