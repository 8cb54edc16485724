"""Model folders at toy size, in the published layout, for tests of every floor."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from vltrain.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration

# 256 single bytes, then the special tokens: `<img>` is the 215th of them.
IMAGE_START_ID = 470

QWEN_VL_CONFIG = {
    "model_type": "qwen",
    "architectures": ["QWenLMHeadModel"],
    "hidden_size": 128,
    "num_attention_heads": 4,
    "kv_channels": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "vocab_size": 480,
    "seq_length": 512,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "visual": {
        "heads": 2,
        "image_size": 56,
        "image_start_id": IMAGE_START_ID,
        "layers": 2,
        "mlp_ratio": 2.0,
        "n_queries": 4,
        "output_dim": 128,
        "patch_size": 14,
        "width": 32,
    },
}


def write_qwen_vl(
    folder: Path,
    *,
    seed: int = 0,
    chat_tuned: bool = True,
    config: Mapping[str, Any] = QWEN_VL_CONFIG,
) -> Path:
    """A Qwen-VL of 2 layers with random weights: every byte is a token, 56-pixel pictures.

    Args:
        folder: made if it is not there.
        seed: of the weights.
        config: its `config.json`; the weights are of the dtype that it names.
        chat_tuned: whether its generation settings say so, as the published chat model's do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = (b"%s %d" % (base64.b64encode(bytes([byte])), byte) for byte in range(256))
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(ranks) + b"\n")
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "QWenTokenizer"}')
    settings = {"chat_format": "chatml" if chat_tuned else "raw", "do_sample": True, "top_p": 0.3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    torch.manual_seed(seed)
    model = QwenVLForConditionalGeneration(QwenVLConfig.from_published(dict(config)))
    model.to(getattr(torch, config["torch_dtype"]))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_gptq(folder: Path, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """`write_qwen_vl`, its decoder packed to 4 bits as Qwen-VL-Chat-Int4 is published.

    Groups of 128 inputs, symmetric, and a bias on every packed layer, of zeros where the plain one
    has none.

    Returns:
        The weights that the packed layers stand for, float32 [out, in] by layer.
    """
    write_qwen_vl(folder, seed=seed)
    tensors = load_file(folder / "model.safetensors")
    plain = {}
    linear = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
    for layer in [f"transformer.h.{number}.{name}" for number in range(2) for name in linear]:
        outputs, inputs = tensors.pop(f"{layer}.weight").shape
        codes = torch.randint(0, 16, (inputs, outputs))
        scales = torch.rand(inputs // 128, outputs).add(0.5).mul(0.005).half()
        groups = torch.arange(inputs) // 128
        plain[layer] = ((codes - 8) * scales[groups].float()).T.contiguous()
        tensors[f"{layer}.qweight"] = _pack(codes.T, inputs).T.contiguous()
        # this layout stores each zero point, 8, less one
        tensors[f"{layer}.qzeros"] = _pack(torch.full(scales.shape, 7), outputs)
        tensors[f"{layer}.scales"] = scales
        tensors[f"{layer}.g_idx"] = groups.int()
        tensors.setdefault(f"{layer}.bias", torch.zeros(outputs))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings | {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    return plain


def _pack(codes: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers of 4 bits, int64 [rows, count], as int32 [rows, count / 8], the first one lowest."""
    shifts = torch.arange(0, 32, 4)
    words = (codes.reshape(-1, count // 8, 8) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def write_conversations(folder: Path) -> Path:
    """Four conversations about pictures, with boxes in the answers; `train.json` of the folder.

    One of them has two pictures, one two turns.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    squares = {"red": (8, 8), "green": (30, 4), "blue": (4, 34), "black": (28, 28)}
    for color, (left, top) in squares.items():
        picture = Image.new("RGB", (56, 56), "white")
        ImageDraw.Draw(picture).rectangle((left, top, left + 19, top + 19), color)
        picture.save(folder / "images" / f"{color}.png")

    def seen(*colors: str) -> str:
        marks = (f"Picture {n}: <img>images/{c}.png</img>\n" for n, c in enumerate(colors, 1))
        return "".join(marks)

    conversations = [
        [(seen("red") + "Where?", "<ref>red</ref><box>(142,142),(500,500)</box>")],
        [(seen("green") + "Where?", "<ref>green</ref><box>(535,71),(892,428)</box>")],
        [(seen("blue", "black") + "在哪里？", "蓝<box>(71,607),(428,964)</box>")],
        [(seen("black") + "Hi", "Hello!"), ("Where?", "<box>(500,500),(857,857)</box>")],
    ]
    records = [
        {
            "id": f"r{number}",
            "conversations": [
                {"from": who, "value": text}
                for question, answer in turns
                for who, text in (("user", question), ("assistant", answer))
            ],
        }
        for number, turns in enumerate(conversations)
    ]
    file = folder / "train.json"
    file.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return file
