"""A process of a group that trains a model shared out by `fully_shard`, on the CPU.

python -m torch.distributed.run --nproc-per-node 2 tests/sharded.py BASE BATCHES OUT [compiled]
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

LEARNING_RATE = 1e-3


def step(model: nn.Module, optimizer: Any, batch: dict[str, Any], learned: int) -> torch.Tensor:
    """One optimizer step on a batch; its share of the loss of all `learned` tokens."""
    loss = model(**batch, num_items_in_batch=learned).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def main(base: str, batches: str, out: str, layers: str = "plain") -> None:
    from vltrain.config import FreezeConfig
    from vltrain.models import load_model
    from vltrain.models.adapters import set_learned
    from vltrain.models.catalog import QWEN_VL
    from vltrain.models.layer_runs import LayerRuns, arrange_layers
    from vltrain.models.saving import save_like
    from vltrain.models.shares import whole_tensors

    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    model = set_learned(load_model(base), QWEN_VL, FreezeConfig(projector=False)).train()
    QWEN_VL.see_always(model)
    if layers == "compiled":
        backend = "aot_eager_decomp_partition"
        arrange_layers(model, LayerRuns(True, kept=0.5, gathered=True, backend=backend))
    for module in list(model.modules()):
        if type(module).__name__ in QWEN_VL.layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [p for p in parameters if p.requires_grad], LEARNING_RATE, foreach=False
    )
    losses = []
    for batch, learned in torch.load(batches)[rank]:
        # Gradients are averaged over the processes, so each loss is that of all of them.
        loss = step(model, optimizer, batch, learned / world)
        distributed.all_reduce(loss)
        losses.append(float(loss) / world)
    tensors = whole_tensors(model.named_parameters(), keep=rank == 0)
    if rank == 0:
        shared = sum(isinstance(p, DTensor) for p in parameters)
        Path(out).mkdir()
        save_like(Path(base), tensors, Path(out))
        said = {"losses": losses, "shared": shared, "parameters": len(parameters)}
        (Path(out) / "said.json").write_text(json.dumps(said))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
