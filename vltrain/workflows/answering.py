"""A model to ask: a base, a merged one, or an adapter beside its base."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from vltrain.errors import VltrainError
from vltrain.models.catalog import is_adapter
from vltrain.models.int4_kernels import use_kernel
from vltrain.models.loading import dtype_for_machine, load_model, load_processor
from vltrain.models.quantization import is_gptq


def load_for_answers(folder: Path, adapter: Path | None = None) -> tuple[PreTrainedModel, Any]:
    """A model, on the GPU if there is one, and its processor.

    Weights are bfloat16 on a GPU that has it and float32 elsewhere. A base that GPTQ packed answers
    in a kernel that multiplies 4 bits where the GPU has one, with an adapter on it too.

    Args:
        folder: of a base or merged model; without `adapter` also of an adapter, whose base is
            found by itself.
        adapter: the folder of an adapter that was trained on the model in `folder`.

    Raises:
        VltrainError: something is not whole, or the adapter was trained on other weights.
    """
    dtype = dtype_for_machine()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if adapter is not None and is_adapter(folder):
        raise VltrainError.at(
            str(folder), what="is an adapter itself", fix="name the base, or leave out --adapter"
        )
    if adapter is not None or is_adapter(folder):
        from vltrain.models.adapted import find_base, load_adapted  # peft takes seconds to import

        base = find_base(adapter or folder, None if adapter is None else str(folder))
        network = load_adapted(adapter or folder, base, dtype=dtype).to(device)
        folder = base.path
    else:
        network = load_model(folder, dtype=dtype, device=device)
    if device == "cuda" and is_gptq(network):
        use_kernel(network)
    return network, load_processor(folder)
