"""Networks and what belongs to them. Importing this registers them with the Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from vltrain.models.loading import load_model, load_processor
from vltrain.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration

__all__ = ["load_model", "load_processor"]

AutoConfig.register(QwenVLConfig.model_type, QwenVLConfig, exist_ok=True)
for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
    auto_class.register(QwenVLConfig, QwenVLForConditionalGeneration, exist_ok=True)
