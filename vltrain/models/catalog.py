"""The model families, and the lookup by what a checkpoint's `config.json` says."""

from pathlib import Path

from vltrain.errors import VltrainError
from vltrain.models.checkpoint_json import read_json
from vltrain.models.family import ExamplePicture, Family, FeatureStage, Parts
from vltrain.models.qwen_vl.configuration import QwenVLConfig
from vltrain.models.qwen_vl.layouts import original_layout, transformers_layout
from vltrain.models.qwen_vl.modeling import QwenVLForConditionalGeneration
from vltrain.models.qwen_vl.processing import QwenVLImageProcessor, processor_from_folder


def example_picture(config: QwenVLConfig) -> ExamplePicture:
    """One picture of a Qwen-VL v1."""
    vision = config.vision
    pads = [vision.image_pad_id] * vision.n_queries
    side = vision.image_size
    ids = (vision.image_start_id, *pads, vision.image_end_id)
    return ExamplePicture(ids, QwenVLImageProcessor(side), side)


QWEN_VL = Family(
    name="Qwen-VL v1",
    model_types=("qwen", "qwen_vl"),
    accepts=lambda config: "visual" in config,  # the text-only Qwen has no such section
    read_config=QwenVLConfig.from_published,
    model_class=QwenVLForConditionalGeneration,
    read_processor=processor_from_folder,
    parts=Parts(
        vision=("transformer.visual",),
        projector=(
            "transformer.visual.attn_pool",
            "transformer.visual.ln_post",
            "transformer.visual.proj",
        ),
        language=("transformer", "lm_head"),
    ),
    default_projector=("transformer.visual.attn_pool",),
    lora_targets=("c_attn", "attn.c_proj", "w1", "w2"),
    embeddings=("transformer.wte", "lm_head"),
    constants=("transformer.visual.attn_pool.pos_embed",),
    see_always=QwenVLForConditionalGeneration.see_always,
    read_sizes=QwenVLConfig.model_sizes,
    example_picture=example_picture,
    feature_stages=(
        FeatureStage(
            input_name="image_embeds",
            fed_by=("vision", "projector"),
            shape=lambda config: (config.vision.n_queries, config.vision.output_dim),
            compute=lambda model, pixels: model.transformer.visual(pixels),
        ),
        FeatureStage(
            input_name="patch_embeds",
            fed_by=("vision",),
            shape=lambda config: (config.vision.patches, config.vision.width),
            compute=lambda model, pixels: model.transformer.visual.encode_patches(pixels),
        ),
    ),
    decoder="transformer.h",
    last_norm="transformer.ln_f",
    layouts={"original": original_layout, "transformers": transformers_layout},
)

FAMILIES = (QWEN_VL,)

ADAPTER_CONFIG = "adapter_config.json"


def family_of(folder: Path) -> Family:
    """The family a checkpoint belongs to, told by its `config.json`.

    Raises:
        VltrainError: no config, or one of a model that vltrain does not train.
    """
    if is_adapter(folder):
        raise VltrainError.at(
            str(folder),
            what="is an adapter, and a whole model is needed",
            fix="name its base, or merge the two: vltrain merge",
        )
    config = read_json(folder / "config.json")
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types and family.accepts(config):
            return family
    known = ", ".join(f"{family.name} ({' / '.join(family.model_types)})" for family in FAMILIES)
    raise VltrainError.at(
        str(folder / "config.json"),
        what=f"no known family has model_type {model_type!r} and these keys: {sorted(config)}",
        fix=f"use a model of {known}; Qwen-VL v1 has a `visual` section, text-only Qwen has none",
    )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, as `peft` writes one, and no whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def is_chat_tuned(folder: Path) -> bool:
    """Whether a checkpoint was tuned to chat: its generation_config.json names a chat_format."""
    path = folder / "generation_config.json"
    return path.is_file() and read_json(path).get("chat_format") == "chatml"
