"""An adapter's folder and the base that it was trained on, back together as a model."""

import logging
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from transformers import PreTrainedModel

from vltrain.config import FreezeConfig
from vltrain.errors import VltrainError
from vltrain.hub_names import HUB_NAME
from vltrain.models.adapters import learn_beside, wrap_plain_layers_first
from vltrain.models.catalog import ADAPTER_CONFIG, is_adapter, read_json
from vltrain.models.family import Family
from vltrain.models.fingerprint import weights_hash
from vltrain.models.hub import ResolvedModel, resolve_model
from vltrain.models.loading import LISTED, load_model
from vltrain.models.quantization import Nf4
from vltrain.models.saving import ORIGIN_FILE, Origin

logger = logging.getLogger(__name__)

RUN_ENVIRONMENT = "environment.json"  # names the base for all checkpoints of a run

BESIDE = "freeze and lora.embeddings"
SHAPE_KEYS = {
    "lora.r": "r",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.targets": "target_modules",
    "lora.rank_pattern": "rank_pattern",
    "lora.alpha_pattern": "alpha_pattern",
    "lora.dora": "use_dora",
    "lora.rslora": "use_rslora",
    BESIDE: "modules_to_save",
}
"""A recipe's keys and what `peft` calls them."""


def read_origin(adapter: Path) -> Origin:
    """The base of an adapter: from its own `vltrain.json`, or that of the run it lies in.

    An adapter of another program has neither; then its `peft` config names the base, and no hash
    is known.

    Raises:
        VltrainError: the folder is no adapter, or nothing says which base it belongs to.
    """
    if not is_adapter(adapter):
        raise VltrainError.at(
            str(adapter),
            what=f"there is no {ADAPTER_CONFIG}, so this is no adapter",
            fix="name the folder of an adapter, as `vltrain lora` leaves it in RUN/final",
        )
    for file in (adapter / ORIGIN_FILE, adapter.parent / RUN_ENVIRONMENT):
        base = read_json(file).get("base") if file.is_file() else None
        if isinstance(base, dict) and {"path", "hash"} <= base.keys():
            return Origin(
                name=base.get("name") or base["path"],
                path=Path(base["path"]),
                revision=base.get("revision"),
                hash=base["hash"],
                nf4=Nf4(**base["nf4"]) if base.get("nf4") else None,
            )
    config = read_json(adapter / ADAPTER_CONFIG)
    name = config.get("base_model_name_or_path")
    if not name:
        raise VltrainError.at(
            str(adapter),
            what=f"nothing says which base it was trained on: {ORIGIN_FILE} is missing",
            fix=f"copy the whole folder that the run wrote, {ORIGIN_FILE} included",
        )
    return Origin(name=name, path=Path(name), revision=config.get("revision"), hash=None)


def find_base(adapter: Path, base: str | None = None, *, other_form: bool = False) -> ResolvedModel:
    """The base that an adapter was trained on, proven by the hash of its weights.

    Without a hash only the sizes of its tensors can be held against it, which is warned about.

    Args:
        adapter: the adapter's folder.
        base: where the base is now, a folder or a name on the hub; default where it was.
        other_form: whether `base` may hold the weights in another form, as a 16-bit checkpoint
            beside one that is packed to 4 bits, of which no hash can tell.

    Raises:
        VltrainError: the base is not there any more, or its weights are others.
    """
    origin = read_origin(adapter)
    found = resolve_model(base or _whereabouts(origin, adapter))
    if origin.hash is None or other_form:
        logger.warning(
            "%s: no hash tells whether it belongs to %s; only the sizes of its tensors do",
            adapter,
            found.path,
        )
        return found
    found_hash = weights_hash(found.path)
    if found_hash != origin.hash:
        raise VltrainError.at(
            str(found.path),
            what=f"its weights are not those that {adapter} was trained on "
            f"({found_hash[:19]}… is not {origin.hash[:19]}…)",
            fix=f"name the right base; it was {origin.name}",
        )
    return found


def _whereabouts(origin: Origin, adapter: Path) -> str:
    """Where a base was: its folder if it is still there, else its name on the hub."""
    if origin.path.is_dir():
        return str(origin.path)
    if origin.revision is not None and origin.name != str(origin.path):
        return f"{origin.name.partition('@')[0]}@{origin.revision}"
    if origin.hash is None and HUB_NAME.fullmatch(origin.name):
        return origin.name if origin.revision is None else f"{origin.name}@{origin.revision}"
    raise VltrainError.at(
        str(adapter),
        what=f"its base is not in {origin.path} any more",
        fix="tell `vltrain merge` with --base where it is now, and use what it writes",
    )


def load_adapted(
    adapter: Path,
    base: ResolvedModel,
    dtype: str | torch.dtype = "auto",
    quantize: Nf4 | None = None,
) -> PeftModel:
    """A base with its adapter beside the weights, not merged, in eval mode.

    Args:
        adapter: the adapter's folder.
        base: as `find_base` gives it.
        dtype: of the base's weights; "auto" is the checkpoint's own.
        quantize: the layers to hold in 4 bits, as the adapter was trained on them.

    Raises:
        VltrainError: the adapter does not fit the base, or has not been read whole.
    """
    return attach(load_model(base.path, dtype=dtype, quantize=quantize), adapter).eval()


def attach(model: PreTrainedModel, adapter: Path, *, learning: bool = False) -> PeftModel:
    """A model with an adapter beside its weights, every tensor of it accounted for.

    Args:
        model: the adapter's base, loaded.
        adapter: the adapter's folder.
        learning: whether the adapter goes on learning.

    Raises:
        VltrainError: the adapter does not fit the base, or has not been read whole.
    """
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        wrap_plain_layers_first(config)
        adapted = PeftModel.from_pretrained(
            model, str(adapter), config=config, is_trainable=learning
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise VltrainError.at(
            str(adapter),
            what=f"does not fit its base or is not whole ({error})",
            fix="copy the whole folder that the run wrote",
        ) from error
    _refuse_incomplete(adapter, adapted)
    return adapted


def saved_shape(adapter: Path) -> LoraConfig:
    """The shape of a saved LoRA adapter.

    Raises:
        VltrainError: the folder is no adapter, or one of another kind.
    """
    config = PeftConfig.from_pretrained(str(adapter)) if is_adapter(adapter) else None
    if not isinstance(config, LoraConfig):
        raise VltrainError.at(
            str(adapter),
            what="is no LoRA adapter",
            fix="name the folder of one, as `vltrain lora` leaves it in RUN/final",
        )
    return config


def refuse_other_shape(adapter: Path, base: Path, wanted: LoraConfig, default: LoraConfig) -> None:
    """Raise VltrainError where a recipe cannot go on from an adapter; no weight is loaded.

    Args:
        adapter: the adapter's folder. Its shape is taken over.
        base: the folder of the recipe's base.
        wanted: the shape that the recipe describes.
        default: the one of a recipe that says nothing of it.
    """
    saved = saved_shape(adapter)
    if read_origin(adapter).hash != weights_hash(base):
        raise VltrainError.at(
            str(adapter),
            what=f"was not trained on the weights in {base}",
            fix="name the adapter's own base as the model",
        )
    faults = [
        f"{key} ({_plain(getattr(saved, name))} there, {_plain(getattr(wanted, name))} here)"
        for key, name in SHAPE_KEYS.items()
        if _plain(getattr(wanted, name)) != _plain(getattr(saved, name))
        and (key == BESIDE or _plain(getattr(wanted, name)) != _plain(getattr(default, name)))
    ]
    if faults:
        raise VltrainError.at(
            str(adapter),
            what="the recipe describes an adapter of another shape: " + ", ".join(faults),
            fix="leave them out, or as the adapter has them",
        )


def _plain(value: Any) -> Any:
    """A value of a config, lists and sets of names in one order."""
    return sorted(value) if isinstance(value, list | set | tuple) else value or None


def continue_adapter(
    model: PreTrainedModel, adapter: Path, family: Family, freeze: FreezeConfig
) -> PeftModel:
    """An earlier adapter beside its base, learning on, with the whole modules that it has."""
    adapted = attach(model, adapter, learning=True)
    learn_beside(adapted, family, freeze)
    return adapted


def _refuse_incomplete(adapter: Path, adapted: PeftModel) -> None:
    """Raise unless every tensor of the adapter's file is in the model; peft only warns."""
    written = load_peft_weights(str(adapter), device="cpu")
    loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    lost = sorted(
        name
        for name in written.keys() | loaded.keys()
        if name not in written
        or name not in loaded
        or not torch.equal(written[name].to(loaded[name].dtype), loaded[name].cpu())
    )
    if lost:
        raise VltrainError.at(
            str(adapter),
            what=f"{len(lost)} tensors are not in the model as the file has them: "
            + ", ".join(lost[:LISTED]),
            fix="copy the whole folder that the run wrote",
        )
