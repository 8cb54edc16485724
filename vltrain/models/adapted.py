"""An adapter's folder and the base that it was trained on, back together as a model."""

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError

from vltrain.errors import VltrainError
from vltrain.models.adapters import wrap_plain_layers_first
from vltrain.models.catalog import ADAPTER_CONFIG, is_adapter, read_json
from vltrain.models.fingerprint import weights_hash
from vltrain.models.hub import ResolvedModel, resolve_model
from vltrain.models.loading import LISTED, load_model
from vltrain.models.saving import ORIGIN_FILE, Origin

RUN_ENVIRONMENT = "environment.json"  # names the base for all checkpoints of a run


def read_origin(adapter: Path) -> Origin:
    """The base of an adapter: from its own `vltrain.json`, or that of the run it lies in.

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
            )
    raise VltrainError.at(
        str(adapter),
        what=f"nothing says which base it was trained on: {ORIGIN_FILE} is missing",
        fix=f"copy the whole folder that the run wrote, {ORIGIN_FILE} included",
    )


def find_base(adapter: Path, base: str | None = None) -> ResolvedModel:
    """The base that an adapter was trained on, proven by the hash of its weights.

    Args:
        adapter: the adapter's folder.
        base: where the base is now, a folder or a name on the hub; default where it was.

    Raises:
        VltrainError: the base is not there any more, or its weights are others.
    """
    origin = read_origin(adapter)
    found = resolve_model(base or _whereabouts(origin, adapter))
    found_hash = weights_hash(found.path)
    if found_hash != origin.hash:
        raise VltrainError.at(
            str(found.path),
            what=f"its weights are not those that {adapter} was trained on "
            f"({found_hash[:19]}… is not {origin.hash[:19]}…)",
            fix=f"give `vltrain merge` the right --base; it was {origin.name}",
        )
    return found


def _whereabouts(origin: Origin, adapter: Path) -> str:
    """Where a base was: its folder if it is still there, else its name on the hub."""
    if origin.path.is_dir():
        return str(origin.path)
    if origin.revision is not None and origin.name != str(origin.path):
        return f"{origin.name.partition('@')[0]}@{origin.revision}"
    raise VltrainError.at(
        str(adapter),
        what=f"its base is not in {origin.path} any more",
        fix="tell `vltrain merge` with --base where it is now, and use what it writes",
    )


def load_adapted(
    adapter: Path, base: ResolvedModel, dtype: str | torch.dtype = "auto"
) -> PeftModel:
    """A base with its adapter beside the weights, not merged, in eval mode.

    Args:
        adapter: the adapter's folder.
        base: as `find_base` gives it.
        dtype: of the base's weights; "auto" is the checkpoint's own.

    Raises:
        VltrainError: the adapter does not fit the base, or has not been read whole.
    """
    model = load_model(base.path, dtype=dtype)
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        wrap_plain_layers_first(config)
        adapted = PeftModel.from_pretrained(model, str(adapter), config=config)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise VltrainError.at(
            str(adapter),
            what=f"does not fit its base or is not whole ({error})",
            fix="copy the whole folder that the run wrote",
        ) from error
    _refuse_incomplete(adapter, adapted)
    return adapted.eval()


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
