"""The two forms that a Qwen-VL folder comes in: as published, and as `transformers` writes it.

Names and values of the weights are the same in both. What differs is what stands beside them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vltrain.models.checkpoint_json import read_json
from vltrain.models.layout import Layout
from vltrain.models.qwen_vl.configuration import FOREIGN_KEYS, QwenVLConfig
from vltrain.models.qwen_vl.modeling import QwenVLForConditionalGeneration
from vltrain.models.qwen_vl.processing import QwenVLProcessor, processor_from_folder
from vltrain.models.qwen_vl.tokenization import TOKENIZER_CONFIG

ORIGINAL_CODE = ("configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py")
"""The files that `auto_map` speaks of."""

ORIGINAL_IDENTITY = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "model_type": "qwen",
}

ORIGINAL_DEFAULTS = {
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "no_bias": True,
    "onnx_safe": None,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "tokenizer_type": "QWenTokenizer",
    "use_flash_attn": "auto",
}
"""What the original's code reads and the network here has no choice about."""

ORIGINAL_TOKENIZER_CONFIG = {
    "model_max_length": 8192,
    "tokenizer_class": "QWenTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
}

ORIGINAL_GENERATION = {"chat_format": "chatml", "max_new_tokens": 512, "max_window_size": 6144}
"""What the original's `chat` cannot do without; ChatML is what vltrain trains."""

NOT_ORIGINAL = (
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""Files that `transformers` may write beside a model and the published folders do not have."""

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
GENERATION, PICTURES = "generation_config.json", "preprocessor_config.json"


def original_layout(folder: Path, dtype: torch.dtype) -> Layout:
    """What stands beside the weights in the published layout.

    A file whose content is right already is not among the texts, so that it is copied as it is.

    Args:
        folder: a checkpoint in either layout.
        dtype: of its weights, where its `config.json` names none.

    Raises:
        VltrainError: the tokenizer is missing.
    """
    processor = processor_from_folder(folder)
    generation = _read(folder / GENERATION)
    wanted = {
        CONFIG: original_config(_read(folder / CONFIG), dtype),
        TOKENIZER: original_tokenizer_config(_read(folder / TOKENIZER)),
        GENERATION: original_generation_config(generation, processor),
    }
    remarks = []
    if "chat_format" not in generation:
        remarks.append(
            f"nothing said whether it was tuned to chat: {GENERATION} now has chat_format chatml"
        )
    missing = [name for name in ORIGINAL_CODE if not (folder / name).is_file()]
    if missing:
        remarks.append(
            f"{', '.join(missing)} and what else the original code has are not in it, for "
            f"{folder} has none; copy the .py files of the published model there where that code "
            "is to load it"
        )
    texts = {**dict.fromkeys(NOT_ORIGINAL), **_changed(folder, wanted)}
    return Layout(texts, tuple(remarks))


def transformers_layout(folder: Path, dtype: torch.dtype) -> Layout:
    """What stands beside the weights where the Auto classes read them; arguments as above.

    Raises:
        VltrainError: the tokenizer is missing.
    """
    processor = processor_from_folder(folder)
    wanted = {
        CONFIG: transformers_config(_read(folder / CONFIG), dtype),
        TOKENIZER: transformers_tokenizer_config(_read(folder / TOKENIZER)),
        GENERATION: transformers_generation_config(_read(folder / GENERATION), processor),
        PICTURES: processor.image_processor.to_dict(),
    }
    return Layout(_changed(folder, wanted))


def original_config(values: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The published form of a `config.json`; sizes that it does not name are written out."""
    network = QwenVLConfig.from_published(dict(values))
    sizes = {
        name: getattr(network, name)
        for name in QwenVLConfig.__annotations__
        if name not in FOREIGN_KEYS and not name.startswith("keys_")
    }
    kept = {key: value for key, value in values.items() if key not in ("dtype", "torch_dtype")}
    named = {"torch_dtype": _named_dtype(values, dtype)}
    return dict(sorted((ORIGINAL_DEFAULTS | sizes | kept | named | ORIGINAL_IDENTITY).items()))


def transformers_config(values: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The form of a `config.json` that leads the Auto classes to the classes here."""
    foreign = ("auto_map", "torch_dtype", "dtype", "tokenizer_class")
    kept = {key: value for key, value in values.items() if key not in foreign}
    identity = {
        "architectures": [QwenVLForConditionalGeneration.__name__],
        "dtype": _named_dtype(values, dtype),
        "model_type": QwenVLConfig.model_type,
    }
    return dict(sorted((kept | identity).items()))


def original_tokenizer_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The published form of a `tokenizer_config.json`."""
    kept = {key: value for key, value in values.items() if key != "processor_class"}
    identity = {k: ORIGINAL_TOKENIZER_CONFIG[k] for k in ("tokenizer_class", "auto_map")}
    return ORIGINAL_TOKENIZER_CONFIG | kept | identity


def transformers_tokenizer_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The form of a `tokenizer_config.json` that leads `AutoTokenizer` to the class here."""
    kept = {key: value for key, value in values.items() if key != "auto_map"}
    return TOKENIZER_CONFIG | kept | {"tokenizer_class": TOKENIZER_CONFIG["tokenizer_class"]}


def original_generation_config(
    values: Mapping[str, Any], processor: QwenVLProcessor
) -> dict[str, Any]:
    """The published form of a `generation_config.json`: `chat` ends an answer by `chat_format`."""
    ends = {"eos_token_id": processor.pad_id, "pad_token_id": processor.pad_id}
    defaults = {k: v for k, v in (ORIGINAL_GENERATION | ends).items() if k not in values}
    several = isinstance(values.get("eos_token_id"), list)  # as in the layout of transformers
    one_end = ends if several else {}
    return dict(values) | defaults | one_end


def transformers_generation_config(
    values: Mapping[str, Any], processor: QwenVLProcessor
) -> dict[str, Any]:
    """Settings of `generate` with which an answer of a chat ends where its turn does."""
    end: int | list[int] = processor.pad_id
    if values.get("chat_format") == "chatml":
        end = [processor.turn_end_id, processor.pad_id]
    return dict(values) | {"eos_token_id": end, "pad_token_id": processor.pad_id}


def _named_dtype(values: Mapping[str, Any], dtype: torch.dtype) -> str:
    named = values.get("dtype") or values.get("torch_dtype")
    return named or str(dtype).removeprefix("torch.")


def _read(path: Path) -> dict[str, Any]:
    """The object of a JSON file; {} where there is none."""
    return read_json(path) if path.is_file() else {}


def _changed(folder: Path, wanted: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """The files, as text, whose content is not in the folder already."""
    return {
        name: json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        for name, values in wanted.items()
        if _read(folder / name) != values
    }
