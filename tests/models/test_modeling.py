"""What the model does beyond the original's recorded cases: batches, training, long prompts."""

import pytest
import torch
from tiny import IMAGE_START_ID, QWEN_VL_CONFIG
from torch import Tensor, nn

from vltrain.config import FreezeConfig
from vltrain.models.adapters import Adapter, add_lora, set_learned
from vltrain.models.catalog import QWEN_VL
from vltrain.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration
from vltrain.models.qwen_vl.positions import log_n_scale, ntk_alpha
from vltrain.models.qwen_vl.vision import resize_positions, sincos_2d

SEQ_LENGTH = 64
PAD_ID = 256
PICTURE = [IMAGE_START_ID, *[IMAGE_START_ID + 2] * 4, IMAGE_START_ID + 1]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def tiny(**values) -> QwenVLForConditionalGeneration:
    """Two layers of random weights, large enough that every token matters; in eval mode."""
    torch.manual_seed(0)
    sizes = QWEN_VL_CONFIG | {"seq_length": SEQ_LENGTH, "initializer_range": 0.1} | values
    return QwenVLForConditionalGeneration(QwenVLConfig.from_published(sizes)).eval()


@pytest.fixture
def model() -> QwenVLForConditionalGeneration:
    return tiny()


def pixels(pictures: int) -> Tensor:
    return torch.randn(pictures, 3, 56, 56, generator=torch.Generator().manual_seed(1))


def words(count: int, first: int = 100) -> list[int]:
    return [first + 7 * place % 90 for place in range(count)]


def batch(rows: list[list[int]], *, padding: str) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    if padding == "left":
        ids = [[PAD_ID] * n + row for n, row in zip(pads, rows, strict=True)]
        mask = [[0] * n + [1] * len(row) for n, row in zip(pads, rows, strict=True)]
    else:
        ids = [row + [PAD_ID] * n for n, row in zip(pads, rows, strict=True)]
        mask = [[1] * len(row) + [0] * n for n, row in zip(pads, rows, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def with_labels(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs | {"labels": labels}


def greedy(model: nn.Module, inputs: dict[str, Tensor], **options) -> Tensor:
    settings = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": PAD_ID}
    said = model.generate(**inputs, **settings | {"eos_token_id": PAD_ID} | options)
    return said[:, inputs["input_ids"].size(1) :]


# --- pictures and their places ---


@pytest.mark.parametrize(
    ("ids", "pictures"),
    [
        (PICTURE + PICTURE, 1),
        (PICTURE, 2),
        (PICTURE, 0),
        (words(5), 1),
        (PICTURE[:3], 1),
    ],
    ids=["a picture too few", "one too many", "none", "no place for it", "a place cut in two"],
)
def test_pictures_that_do_not_fit_their_places_are_refused(model, ids, pictures):
    with pytest.raises(ValueError, match=r"input_ids have \d+ <imgpad>, but \d pictures of 4"):
        model(input_ids=torch.tensor([ids]), pixel_values=pixels(pictures))


def test_places_without_any_pixels_are_refused(model):
    with pytest.raises(ValueError, match="4 <imgpad>, but 0 pictures"):
        model(input_ids=torch.tensor([PICTURE]))


def test_image_tokens_stand_over_their_places_in_order_and_nowhere_else(model):
    ids = torch.tensor([[*words(2), *PICTURE], [*PICTURE, *words(2)]])
    pictures = pixels(2)

    with torch.no_grad():
        embedded = model.transformer.embed(ids, pictures)
        image_tokens = model.transformer.visual(pictures)

    assert torch.equal(embedded[0, 3:7], image_tokens[0])
    assert torch.equal(embedded[1, 1:5], image_tokens[1])
    words_alone = model.transformer.wte(ids)
    elsewhere = ids != IMAGE_START_ID + 2
    assert torch.equal(embedded[elsewhere], words_alone[elsewhere])


def test_a_batch_may_mix_rows_with_two_pictures_and_with_none(model):
    rows = [[*PICTURE, *words(3), *PICTURE, *words(2)], words(9)]
    pictures = pixels(2)

    with torch.no_grad():
        both = model(**batch(rows, padding="right"), pixel_values=pictures).logits
        first = model(input_ids=torch.tensor(rows[:1]), pixel_values=pictures).logits
        second = model(input_ids=torch.tensor(rows[1:])).logits

    torch.testing.assert_close(both[0], first[0], **CLOSE)
    torch.testing.assert_close(both[1, :9], second[0], **CLOSE)


def test_ids_or_embeddings_are_given_not_both(model):
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(input_ids=torch.tensor([[1]]), inputs_embeds=torch.zeros(1, 1, 128))


def test_pictures_beside_embeddings_are_refused(model):
    with pytest.raises(ValueError, match="places in input_ids"):
        model(inputs_embeds=torch.zeros(1, 1, 128), pixel_values=pixels(1))


# --- training ---


def test_a_picture_trains_under_checkpointing_with_frozen_embeddings(model):
    wrapped = add_lora(
        model, QWEN_VL, FreezeConfig(projector=False), Adapter(r=4, dropout=0), seed=1
    )
    wrapped.gradient_checkpointing_enable()
    wrapped.enable_input_require_grads()
    ids = torch.tensor([[*PICTURE, *words(6)]])

    wrapped.train()(input_ids=ids, pixel_values=pixels(1), labels=ids).loss.backward()

    gradients = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    assert gradients[
        "base_model.model.transformer.visual.attn_pool.modules_to_save.default.query"
    ].any()
    assert all(g.any() for name, g in gradients.items() if "lora_B" in name)


def test_checkpointing_changes_no_gradient(model):
    set_learned(model, QWEN_VL, FreezeConfig(vision=False, projector=False)).train()
    ids = torch.tensor([[*PICTURE, *words(6)]])

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=ids, pixel_values=pixels(1), labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable()
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("projector_learns", [False, True])
def test_a_frozen_tower_keeps_no_graph_and_is_run_once(model, projector_learns):
    freeze = FreezeConfig(projector=not projector_learns)
    wrapped = add_lora(model, QWEN_VL, freeze, Adapter(r=4), seed=1)
    wrapped.gradient_checkpointing_enable()
    wrapped.enable_input_require_grads()
    visual = wrapped.get_submodule("base_model.model.transformer.visual")
    runs, read, given = [], [], []
    visual.transformer.resblocks[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    visual.attn_pool.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    visual.register_forward_hook(lambda *call: given.append(call[2]))
    ids = torch.tensor([[*PICTURE, *words(6)]])

    wrapped.train()(input_ids=ids, pixel_values=pixels(1), labels=ids).loss.backward()

    assert len(runs) == 1
    assert not read[0].requires_grad
    assert read[0].grad_fn is None
    assert given[0].requires_grad is projector_learns


def test_one_batch_of_four_has_the_loss_of_four_batches_of_one(model):
    rows = [[*PICTURE, *words(9)], words(4), [*words(2), *PICTURE], words(13)]
    pictures = pixels(2)
    learned = sum(len(row) - 1 for row in rows)  # nothing comes before a row's first token
    model.train()

    whole = model(
        **with_labels(batch(rows, padding="right")),
        pixel_values=pictures,
        num_items_in_batch=torch.tensor(learned),
    ).loss
    parts = []
    for row, seen in zip(rows, (pictures[:1], None, pictures[1:], None), strict=True):
        one = with_labels(batch([row], padding="right"))
        parts.append(model(**one, pixel_values=seen, num_items_in_batch=learned).loss)

    torch.testing.assert_close(sum(parts), whole, **CLOSE)
    alone = model(**with_labels(batch(rows, padding="right")), pixel_values=pictures).loss
    torch.testing.assert_close(whole, alone, **CLOSE)  # no number given: the mean of the batch


def test_a_padded_batch_has_the_loss_of_its_rows_weighted_by_their_tokens(model):
    short, long = words(5), words(17, first=120)

    together = model(**with_labels(batch([short, long], padding="right"))).loss
    losses = [model(**with_labels(batch([row], padding="right"))).loss for row in (short, long)]

    torch.testing.assert_close(together, (4 * losses[0] + 16 * losses[1]) / 20, **CLOSE)


def test_the_loss_of_a_uniform_guess_is_the_log_of_the_vocabulary(model):
    nn.init.zeros_(model.lm_head.weight)
    ids = torch.tensor([words(6)])

    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(6.173786)  # ln 480


# --- past seq_length ---


@pytest.mark.parametrize(
    ("length", "alpha"),
    [(1, 1), (63, 1), (64, 1), (65, 3), (128, 3), (129, 7), (256, 7), (257, 15)],
)
def test_the_rotary_base_is_stretched_in_steps_of_powers_of_two(length, alpha):
    assert ntk_alpha(torch.tensor([length]), SEQ_LENGTH).tolist() == [alpha]


def test_queries_past_seq_length_are_scaled_by_the_log_of_their_place():
    positions = torch.tensor([[0, 62, 63, 64, 4095]])

    scale = log_n_scale(positions, SEQ_LENGTH).flatten().tolist()

    # places 1, 63 and 64; then ln 65 / ln 64, and ln 4096 / ln 64 = 12 / 6
    assert scale == pytest.approx([1, 1, 1, 1.003728, 2], abs=1e-6)


def test_each_row_of_a_padded_batch_is_stretched_by_its_own_length(model):
    rows = [words(100), words(20)]
    inputs = batch(rows, padding="left")
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    with torch.no_grad():
        both = model(**inputs, position_ids=positions).logits
        long, short = (model(input_ids=torch.tensor([row])).logits for row in rows)

    torch.testing.assert_close(both[0], long[0], **CLOSE)
    torch.testing.assert_close(both[1, 80:], short[0], **CLOSE)


def test_training_after_a_long_eval_is_as_if_there_had_been_none(model):
    ids = torch.tensor([words(20)])
    fresh = model.train()(input_ids=ids, labels=ids).loss

    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([words(200)]))

    assert torch.equal(model.train()(input_ids=ids, labels=ids).loss, fresh)


def test_a_short_answer_after_a_long_one_is_as_if_there_had_been_none(model):
    prompt = batch([words(20)], padding="left")
    fresh = greedy(model, prompt)

    greedy(model, batch([words(200)], padding="left"))

    assert torch.equal(greedy(model, prompt), fresh)


def test_nothing_is_stretched_in_training(model):
    ids = torch.tensor([words(100)])
    plain = tiny(use_dynamic_ntk=False, use_logn_attn=False)

    assert torch.equal(model.train()(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert not torch.equal(model.eval()(input_ids=ids).logits, plain(input_ids=ids).logits)


# --- answers ---


@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_of_a_padded_batch_are_answered_as_each_alone(model, use_cache):
    rows = [[*PICTURE, *words(9)], words(30), words(3), [*words(2), *PICTURE, *words(1)]]
    pictures = pixels(2)

    together = greedy(
        model, batch(rows, padding="left") | {"pixel_values": pictures}, use_cache=use_cache
    )

    for row, answer in zip(rows, together.tolist(), strict=True):
        inputs = batch([row], padding="left")
        if IMAGE_START_ID in row:
            inputs["pixel_values"] = pictures[:1] if row[0] == IMAGE_START_ID else pictures[1:]
        alone = greedy(model, inputs, use_cache=use_cache)[0].tolist()
        assert answer[: len(alone)] == alone


def test_the_cache_changes_no_answer_up_to_seq_length(model):
    inputs = batch([[*PICTURE, *words(20)]], padding="left") | {"pixel_values": pixels(1)}

    options = {"max_new_tokens": 30, "suppress_tokens": [PAD_ID]}  # it does not end before

    cached = greedy(model, inputs, use_cache=True, **options)

    assert cached.size(1) == 30  # 56 tokens in all
    assert torch.equal(cached, greedy(model, inputs, use_cache=False, **options))
    assert len(set(cached[0].tolist())) > 3


def test_attention_spelled_out_equals_the_fused_kernel(model):
    inputs = batch([[*PICTURE, *words(70)], words(30)], padding="right")
    inputs["pixel_values"] = pixels(1)
    real = inputs["attention_mask"].bool()

    with torch.no_grad():
        fused = model(**inputs).logits
        model.set_attn_implementation("eager")
        spelled_out = model(**inputs).logits

    torch.testing.assert_close(spelled_out[real], fused[real], atol=1e-4, rtol=1e-4)


def test_only_the_last_logits_are_made_where_no_more_are_asked_for(model):
    ids = torch.tensor([words(10)])

    with torch.no_grad():
        last = model(input_ids=ids, logits_to_keep=2).logits
        torch.testing.assert_close(last, model(input_ids=ids).logits[:, -2:], **CLOSE)


# --- positions of the vision tower ---


def test_positions_of_the_same_grid_stay_as_they_are():
    positions = torch.randn(16, 3)

    assert resize_positions(positions, 16) is positions


def test_positions_are_stretched_bicubically_over_both_axes():
    # the column's number as a value: 0 1 2 3 in each of four rows
    positions = torch.arange(4.0).repeat(4)[:, None]

    stretched = resize_positions(positions, 64).view(8, 8)

    assert torch.allclose(stretched, stretched[:1].expand(8, 8))
    # twice as fine: the fourth stands at 1.25; the kernel (a = -3/4) at 1.25, 0.25, 0.75 and
    # 1.75 is -27/256, 225/256, 67/256 and -9/256: 225 + 2 x 67 - 3 x 9 = 332
    assert stretched[0, 3:5].tolist() == pytest.approx([332 / 256, 3 - 332 / 256], abs=1e-6)
    assert stretched[0].tolist() == sorted(stretched[0].tolist())


def test_places_that_are_no_square_are_refused():
    with pytest.raises(ValueError, match="square grids, not 16 -> 15"):
        resize_positions(torch.zeros(16, 3), 15)


def test_fixed_positions_say_the_column_first_and_then_the_row():
    table = sincos_2d(width=8, side=2)

    # frequencies 1 and 1/100; sin 1, sin .01, cos 1, cos .01
    zero, one = [0, 0, 1, 1], [0.841471, 0.0099998, 0.540302, 0.99995]
    expected = [zero + zero, one + zero, zero + one, one + one]
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float32), **CLOSE)


def test_a_model_that_was_built_has_the_fixed_positions(model):
    assert torch.equal(model.transformer.visual.attn_pool.pos_embed, sincos_2d(128, 2))
