"""Model folders at toy size, in the published layout, for tests of every floor."""

import base64
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

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


def write_qwen_vl(folder: Path, *, seed: int = 0, chat_tuned: bool = True) -> Path:
    """A Qwen-VL of 2 layers with random weights: every byte is a token, 56-pixel pictures.

    Args:
        folder: made if it is not there.
        seed: of the weights.
        chat_tuned: whether its generation settings say so, as the published chat model's do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = (b"%s %d" % (base64.b64encode(bytes([byte])), byte) for byte in range(256))
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(ranks) + b"\n")
    (folder / "config.json").write_text(json.dumps(QWEN_VL_CONFIG, indent=1))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "QWenTokenizer"}')
    settings = {"chat_format": "chatml" if chat_tuned else "raw", "do_sample": True, "top_p": 0.3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    torch.manual_seed(seed)
    model = QwenVLForConditionalGeneration(QwenVLConfig.from_published(dict(QWEN_VL_CONFIG)))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
