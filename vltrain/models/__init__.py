"""Networks and what belongs to them. Importing this registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

# transformers 5.17 gives its own name for it only to those who have torchvision
from transformers.models.auto.image_processing_auto import AutoImageProcessor

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
