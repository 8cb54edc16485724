"""What a folder answers when a process reads it that knows of nothing else.

`python -m vltrain.workflows.reload FOLDER [LOGITS]` is that process: it holds the folder against
its own lists, and writes the logits of fixed inputs where a file is named.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vltrain.data.encoding import encode
from vltrain.errors import VltrainError
from vltrain.models.loading import load_model, load_processor
from vltrain.workflows.verify import folder_findings

PROBES = (
    [
        {"from": "user", "value": "What lies on <ref>the table</ref>? 桌子上有什么？"},
        {"from": "assistant", "value": "<box>(12,345),(678,901)</box> 3 apples, 一个梨。"},
    ],
    [
        {"from": "user", "value": "Picture 1: <img>probe.png</img>\nHow many dots are red?"},
        {"from": "assistant", "value": "Some 2,000 of them."},
    ],
)
"""The fixed inputs of the comparison: text alone, and a picture (of noise)."""


def probe_inputs(processor: Any) -> list[dict[str, Tensor]]:
    """The model's inputs for each of `PROBES`: ids int64 [1, L], pixels where it has a picture."""
    noise = np.random.RandomState(0).randint(0, 256, (64, 96, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    inputs = []
    for turns in PROBES:
        sample = encode({"conversations": turns}, processor)
        ids = torch.tensor([sample.input_ids])
        values = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if sample.images:
            values |= processor.image_processor(images=[picture], return_tensors="pt")
        inputs.append(values)
    return inputs


@torch.inference_mode()
def probe_logits(model: nn.Module, inputs: list[dict[str, Tensor]]) -> Tensor:
    """float32 [tokens of all probes, vocabulary]; pixels take the dtype of the embeddings."""
    dtype, device = model.get_input_embeddings().weight.dtype, model.device
    logits = []
    for values in inputs:
        placed = {
            key: value.to(device, dtype if value.is_floating_point() else None)
            for key, value in values.items()
        }
        logits.append(model(**placed).logits[0].float().cpu())
    return torch.cat(logits)


def reload_in_a_fresh_process(folder: Path, scratch: Path | None) -> Tensor | None:
    """Read a model anew, every file and tensor of it.

    Args:
        folder: of the model.
        scratch: a file that the logits may pass through; None: the model is not run, and never
            whole in memory.

    Returns:
        float32 [tokens of all probes, vocabulary], or None without `scratch`.

    Raises:
        VltrainError: the folder is not whole.
    """
    command = [sys.executable, "-m", "vltrain.workflows.reload", str(folder)]
    command += [] if scratch is None else [str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise VltrainError.at(
            str(folder),
            what=f"what was written does not load in a fresh process ({last[0]})",
            fix="nothing was kept; free memory and disk, and run the same command again",
        )
    return None if scratch is None else load_file(scratch)["logits"]


def reload_folder(folder: Path, logits: Path | None) -> None:
    """Hold a folder against its lists; write its logits where a file is named."""
    faults = [f"{f.file}: {f.message}" for f in folder_findings(folder) if f.severity == "error"]
    if faults:
        raise SystemExit("; ".join(faults))
    if logits is not None:
        model, processor = load_model(folder), load_processor(folder)
        save_file({"logits": probe_logits(model, probe_inputs(processor))}, logits)


if __name__ == "__main__":
    reload_folder(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
