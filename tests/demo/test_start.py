import numpy as np
import torch
from torch import nn

from vltrain.demo.scenes import CANVAS_SIZE
from vltrain.demo.start import CONFIG, sincos_positions, write_start
from vltrain.models import load_model, load_processor
from vltrain.models.qwen_vl.vision import resize_positions, sincos_2d


def test_the_start_loads_as_a_published_model_with_ids_for_its_whole_vocabulary(tmp_path):
    write_start(tmp_path / "start")

    model = load_model(tmp_path / "start", dtype="fp32")
    processor = load_processor(tmp_path / "start")

    assert model.config.vocab_size == len(processor.tokenizer) == 768
    assert processor.image_ids("x.png") == [765, *[767] * 16, 766]
    assert processor.n_queries == CONFIG["visual"]["n_queries"] == 16
    assert (tmp_path / "start" / "model.safetensors").stat().st_size < 6e6


def test_positions_are_those_of_the_model():
    assert np.allclose(sincos_positions(128, 4), sincos_2d(128, 4).numpy(), atol=1e-6)


def test_a_query_of_the_resampler_begins_by_looking_at_its_own_patches(tmp_path):
    write_start(tmp_path / "start")
    tower = load_model(tmp_path / "start", dtype="fp32").transformer.visual
    pixels = torch.randn(2, 3, CANVAS_SIZE, CANVAS_SIZE, generator=torch.manual_seed(0))

    pool = tower.attn_pool
    with torch.no_grad():
        value = pool.ln_kv(pool.kv_proj(tower.encode_patches(pixels)))
        key = value + resize_positions(pool.pos_embed, 64)
        query = (pool.ln_q(pool.query) + pool.pos_embed)[:, None].expand(-1, 2, -1)
        sides = [query, key.transpose(0, 1), value.transpose(0, 1)]  # places, then pictures
        weights = nn.MultiheadAttention.forward(pool.attn, *sides)[1].mean(0).view(4, 4, 8, 8)

    own = [
        weights[r, c, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].sum()
        for r in range(4)
        for c in range(4)
    ]
    assert float(torch.stack(own).mean()) > 0.4  # four of 64 patches: 0.06 if it looked at all
