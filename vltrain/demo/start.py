"""Weights to pretrain the demo's base from: random, but started where learning is quick.

With the usual random weights a model of this size stays at guessing for thousands of steps: the
resampler averages the whole picture, so nothing that the decoder sees speaks of a place. Here
each of its queries begins by looking at its own part of the picture, attention begins nearly
uniform, and image tokens begin larger than words.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vltrain.demo.questions import every_text
from vltrain.demo.scenes import CANVAS_SIZE
from vltrain.demo.vocabulary import learn_ranks, tiktoken_file

Weights = dict[str, NDArray[np.float32]]

RANKS = 551  # tokens of the vocabulary file; 3 control tokens, 205 extras and 9 tags follow
VOCAB_SIZE = 768
IMAGE_START_ID = RANKS + 3 + 205 + 6  # <img>, behind the six tags of boxes

WIDTH = 128
HEADS = 4
LAYERS = 4
MLP_WIDTH = 256  # each of the two halves
VISION_WIDTH = 160  # not WIDTH: the original code has no `kv_proj` between equal widths
VISION_HEADS = 5
VISION_LAYERS = 4
VISION_MLP_RATIO = 4.0
PATCH_SIZE = 14  # pixels
QUERIES = 16  # image tokens of a picture
POSITIONS = 256  # rows of the ViT's positions, whatever the picture's size

ATTENTION_SHARE = 0.2  # of the usual size: query and key weights
IMAGE_GAIN = 3.0  # times the size of a word's embedding: image tokens
PLACE_WAVES = 8  # of the WIDTH / 4 waves of a position, the quickest
PEAK = 5.0  # how sharply a query of the resampler looks at its own place
KERNEL_CELLS = 5  # a patch kernel is this many random cells a side, smoothed
KERNEL_GAIN = 0.5
COLOUR_KERNELS = 16  # of VISION_WIDTH, those that answer to an even colour

CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "kv_channels": WIDTH // HEADS,
    "intermediate_size": 2 * MLP_WIDTH,
    "layer_norm_epsilon": 1e-6,
    "initializer_range": 0.02,
    "max_position_embeddings": 1024,
    "seq_length": 1024,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "no_bias": True,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "tokenizer_class": "QWenTokenizer",
    "torch_dtype": "bfloat16",
    "visual": {
        "image_size": CANVAS_SIZE,
        "patch_size": PATCH_SIZE,
        "width": VISION_WIDTH,
        "layers": VISION_LAYERS,
        "heads": VISION_HEADS,
        "mlp_ratio": VISION_MLP_RATIO,
        "output_dim": WIDTH,
        "n_queries": QUERIES,
        "image_start_id": IMAGE_START_ID,
    },
}
TOKENIZER_CONFIG = {"model_max_length": 1024, "tokenizer_class": "QWenTokenizer"}
GENERATION_CONFIG = {
    "chat_format": "chatml",
    "do_sample": False,
    "eos_token_id": RANKS,
    "pad_token_id": RANKS,
    "max_new_tokens": 48,
}


def write_start(folder: Path, seed: int = 0) -> None:
    """Write a model to pretrain, in the published layout, into a new folder."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for name, content in (
        ("config.json", CONFIG),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
        ("generation_config.json", GENERATION_CONFIG),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    vocabulary = tiktoken_file(learn_ranks(every_text(), RANKS))
    (folder / "qwen.tiktoken").write_text(vocabulary, encoding="utf-8")
    weights = starting_weights(np.random.default_rng(seed))
    tensors = {name: torch.from_numpy(value).bfloat16() for name, value in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def starting_weights(rng: np.random.Generator) -> Weights:
    """Every tensor of the model, float32, under the published names."""
    weights = {
        "transformer.wte.weight": _normal(rng, (VOCAB_SIZE, WIDTH), 1 / math.sqrt(WIDTH)),
        "transformer.ln_f.weight": _ones(WIDTH),
        "lm_head.weight": _normal(rng, (VOCAB_SIZE, WIDTH), 0.02),
    }
    for layer in range(LAYERS):
        weights |= _under(f"transformer.h.{layer}.", _decoder_layer(rng))
    return weights | _under("transformer.visual.", _vision(rng))


def sincos_positions(width: int, side: int) -> NDArray[np.float32]:
    """Fixed 2-D positions, float32 [side * side, width], row by row of the grid.

    The first half of the width speaks of the column, the second of the row; each half is
    sines, then cosines.
    """
    frequencies = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    angles = np.arange(side)[:, None] * frequencies
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns, rows = np.tile(line, (side, 1)), np.repeat(line, side, axis=0)
    return np.concatenate([columns, rows], axis=1).astype(np.float32)


def _decoder_layer(rng: np.random.Generator) -> Weights:
    into = 1 / math.sqrt(WIDTH)
    back = into / math.sqrt(2 * LAYERS)  # two sums into the residual stream per layer
    mixed = _normal(rng, (3 * WIDTH, WIDTH), into)
    mixed[: 2 * WIDTH] *= ATTENTION_SHARE
    return {
        "ln_1.weight": _ones(WIDTH),
        "attn.c_attn.weight": mixed,
        "attn.c_attn.bias": _zeros(3 * WIDTH),
        "attn.c_proj.weight": _normal(rng, (WIDTH, WIDTH), back),
        "ln_2.weight": _ones(WIDTH),
        "mlp.w1.weight": _normal(rng, (MLP_WIDTH, WIDTH), into),
        "mlp.w2.weight": _normal(rng, (MLP_WIDTH, WIDTH), into),
        "mlp.c_proj.weight": _normal(rng, (WIDTH, MLP_WIDTH), back),
    }


def _vision(rng: np.random.Generator) -> Weights:
    weights = {
        "conv1.weight": _patch_kernels(rng),
        "positional_embedding": sincos_positions(VISION_WIDTH, math.isqrt(POSITIONS)),
        **_layer_norm("ln_pre", VISION_WIDTH),
        **_layer_norm("ln_post", WIDTH),
        # An embedding's entries are 1 / sqrt(WIDTH) in size, those behind `ln_post` 1.
        "proj": np.eye(WIDTH, dtype=np.float32) * np.float32(IMAGE_GAIN / math.sqrt(WIDTH)),
    }
    for layer in range(VISION_LAYERS):
        weights |= _under(f"transformer.resblocks.{layer}.", _vision_layer(rng))
    return weights | _under("attn_pool.", _resampler(rng))


def _vision_layer(rng: np.random.Generator) -> Weights:
    hidden = int(VISION_WIDTH * VISION_MLP_RATIO)
    into = 1 / math.sqrt(VISION_WIDTH)
    back = into / math.sqrt(2 * VISION_LAYERS)
    mixed = _normal(rng, (VISION_HEADS, 3, VISION_WIDTH // VISION_HEADS, VISION_WIDTH), into)
    mixed[:, :2] *= ATTENTION_SHARE
    return {
        **_layer_norm("ln_1", VISION_WIDTH),
        "attn.in_proj.weight": mixed.reshape(3 * VISION_WIDTH, VISION_WIDTH),
        "attn.in_proj.bias": _zeros(3 * VISION_WIDTH),
        "attn.out_proj.weight": _normal(rng, (VISION_WIDTH, VISION_WIDTH), back),
        "attn.out_proj.bias": _zeros(VISION_WIDTH),
        **_layer_norm("ln_2", VISION_WIDTH),
        "mlp.c_fc.weight": _normal(rng, (hidden, VISION_WIDTH), into),
        "mlp.c_fc.bias": _zeros(hidden),
        "mlp.c_proj.weight": _normal(rng, (VISION_WIDTH, hidden), back / 2),
        "mlp.c_proj.bias": _zeros(VISION_WIDTH),
    }


def _patch_kernels(rng: np.random.Generator) -> NDArray[np.float32]:
    """What the ViT first sees of a patch: float32 [width, 3, pixels, pixels].

    Smooth, as strokes are. Most kernels sum to zero, so that they answer to ink and not to the
    canvas' colour.
    """
    coarse = rng.normal(size=(VISION_WIDTH * 3, KERNEL_CELLS, KERNEL_CELLS))
    places = (np.arange(PATCH_SIZE) + 0.5) / PATCH_SIZE * KERNEL_CELLS - 0.5
    nearness = np.exp(-((places[:, None] - np.arange(KERNEL_CELLS)) ** 2))  # [pixels, cells]
    kernels = nearness @ coarse @ nearness.T
    kernels = kernels.reshape(VISION_WIDTH, 3, PATCH_SIZE, PATCH_SIZE)
    contrast = kernels[COLOUR_KERNELS:]
    contrast -= contrast.mean(axis=(2, 3), keepdims=True)
    kernels /= np.sqrt((kernels**2).sum(axis=(1, 2, 3), keepdims=True))
    kernels[:COLOUR_KERNELS] /= PATCH_SIZE  # an even patch sums up over all of its pixels
    return (kernels * KERNEL_GAIN).astype(np.float32)


def _resampler(rng: np.random.Generator) -> Weights:
    """One head, whose queries and keys begin as nothing but their places.

    Only the quickest waves of the positions tell one place from its neighbour. Their channels
    are what query and key begin with, and `kv_proj` leaves them free of content.
    """
    quick = np.tile(np.arange(WIDTH // 4) < PLACE_WAVES, 4)
    place = np.diag(quick).astype(np.float32) * np.float32(PEAK)
    content = _normal(rng, (WIDTH, VISION_WIDTH), 1 / math.sqrt(VISION_WIDTH))
    content[quick] = 0
    value = np.eye(WIDTH, dtype=np.float32)
    return {
        "pos_embed": sincos_positions(WIDTH, math.isqrt(QUERIES)),
        "query": _normal(rng, (QUERIES, WIDTH), 0.02),
        "kv_proj.weight": content,
        "attn.in_proj_weight": np.concatenate([place, place, value]),
        "attn.in_proj_bias": _zeros(3 * WIDTH),
        "attn.out_proj.weight": value.copy(),
        "attn.out_proj.bias": _zeros(WIDTH),
        "ln_q.weight": _ones(WIDTH) * np.float32(0.1),  # a query is nearly its position alone
        "ln_q.bias": _zeros(WIDTH),
        **_layer_norm("ln_kv", WIDTH),
    }


def _under(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def _layer_norm(name: str, width: int) -> Weights:
    return {f"{name}.weight": _ones(width), f"{name}.bias": _zeros(width)}


def _normal(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> NDArray[np.float32]:
    return rng.normal(0, std, size=shape).astype(np.float32)


def _ones(width: int) -> NDArray[np.float32]:
    return np.ones(width, dtype=np.float32)


def _zeros(width: int) -> NDArray[np.float32]:
    return np.zeros(width, dtype=np.float32)
