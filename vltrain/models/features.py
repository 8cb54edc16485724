"""What a frozen vision tower makes of pictures, apart from training: where, from what, and how."""

import hashlib
from contextlib import AbstractContextManager, nullcontext

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from vltrain.models.adapters import published_name
from vltrain.models.family import Family, FeatureStage


def frozen_stage(model: PreTrainedModel | PeftModel, family: Family) -> FeatureStage | None:
    """The last point on a picture's way up to which nothing learns; None where all of it may."""
    learned = {
        family.parts.of(published_name(name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    stages = family.feature_stages
    return next((stage for stage in stages if learned.isdisjoint(stage.fed_by)), None)


def stage_fingerprint(
    model: PreTrainedModel | PeftModel, family: Family, stage: FeatureStage
) -> str:
    """sha256 of the weights that a stage's values follow from, as the model holds them.

    Names, dtypes and bytes count; so weights in 4 bits have another one than those that they were
    made of.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        plain = published_name(name)
        if not isinstance(value, Tensor) or family.parts.of(plain) not in stage.fed_by:
            continue
        digest.update(f"{plain} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().contiguous().cpu().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def compute_features(
    model: PreTrainedModel | PeftModel,
    stage: FeatureStage,
    pixel_values: Tensor,
    *,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
) -> Tensor:
    """What a training step would compute of pictures up to a stage.

    Args:
        model: on its device.
        stage: of its family; nothing before it learns.
        pixel_values: float [N, 3, S, S].
        dtype: of the result.
        autocast: in which the step runs its matrix products; None: in the weights' own.

    Returns:
        [N, *shape of the stage] on the model's device.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    precision: AbstractContextManager = nullcontext()
    if autocast is not None:
        precision = torch.autocast(base.device.type, dtype=autocast)
    was_training = base.training
    base.train()  # as a step has it, whatever else that means
    try:
        with torch.no_grad(), precision:
            return stage.compute(base, pixel_values.to(base.device)).to(dtype)
    finally:
        base.train(was_training)
