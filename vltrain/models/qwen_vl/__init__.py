"""Qwen-VL v1, native: Qwen-7B, OpenCLIP ViT-bigG and a 256-query resampler (arXiv:2308.12966)."""

from vltrain.models.qwen_vl.configuration import QwenVLConfig
from vltrain.models.qwen_vl.modeling import QwenVLForConditionalGeneration
from vltrain.models.qwen_vl.processing import QwenVLImageProcessor, QwenVLProcessor
from vltrain.models.qwen_vl.tokenization import QwenVLTokenizer

__all__ = [
    "QwenVLConfig",
    "QwenVLForConditionalGeneration",
    "QwenVLImageProcessor",
    "QwenVLProcessor",
    "QwenVLTokenizer",
]
