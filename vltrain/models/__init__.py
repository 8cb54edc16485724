"""Networks and what belongs to them. Importing this registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from vltrain.models.loading import load_model, load_processor
from vltrain.models.qwen_vl import (
    QwenVLConfig,
    QwenVLForConditionalGeneration,
    QwenVLImageProcessor,
    QwenVLProcessor,
    QwenVLTokenizer,
)

__all__ = ["load_model", "load_processor"]

AutoConfig.register(QwenVLConfig.model_type, QwenVLConfig, exist_ok=True)
for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
    auto_class.register(QwenVLConfig, QwenVLForConditionalGeneration, exist_ok=True)
AutoProcessor.register(QwenVLConfig, QwenVLProcessor, exist_ok=True)
AutoTokenizer.register(QwenVLConfig, slow_tokenizer_class=QwenVLTokenizer, exist_ok=True)
AutoImageProcessor.register(
    QwenVLConfig, slow_image_processor_class=QwenVLImageProcessor, exist_ok=True
)
