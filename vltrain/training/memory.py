"""Bytes of GPU memory that a run takes: arithmetic on plain numbers.

A run's memory has a part that stays (weights, optimizer's states) and one that comes and goes.
`estimate` goes through the moments of a step at which it can be largest and takes the worst. What
is counted is what torch allocates for tensors; the driver's own share is `CONTEXT_BYTES`, the
allocator's `PIECES_SHARE`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vltrain.models.sizes import Census, ModelSizes, Place
from vltrain.training.activations import FLOAT, BatchSizes
from vltrain.training.moments import Moment, Step, Work

GIB = 2**30
# cuBLAS takes 32 MiB for each thread that multiplies, on GPUs from Hopper on (less before): one
# goes forward, autograd's own goes back.
WORKSPACE_BYTES = 2 * 32 * 2**20
CONTEXT_BYTES = 768 * 2**20  # of driver and kernels, beside torch's memory: 0.75 GiB on an H100
# What the allocator holds beside tensors, in pieces that no tensor fits: of what it has given out,
# 0.4 % (LoRA) to 9 % (full) were measured at the real size. Where memory is short it gives back.
PIECES_SHARE = 0.09
MOST_ROWS = 4096  # looked at for the largest batch that fits


@dataclass(frozen=True)
class Estimate:
    """Memory of one process on its GPU. Bytes."""

    weights: Mapping[Place, int]
    optimizer: int
    workspace: int
    moments: tuple[Moment, ...]
    off_gpu: int  # optimizer's states that are paged or offloaded to the host

    @property
    def peak(self) -> Moment:
        """The moment at which most is held."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def total(self) -> int:
        """What torch has allocated at its peak."""
        return sum(self.weights.values()) + self.optimizer + self.workspace + self.peak.total

    @property
    def needed(self) -> int:
        """What the GPU must have: the driver's share is in it."""
        return self.total + CONTEXT_BYTES

    @property
    def comfortable(self) -> int:
        """What a GPU has that the run fits in for certain: with the allocator's pieces."""
        return self.needed + round(self.total * PIECES_SHARE)


def estimate(census: Census, sizes: ModelSizes, batch: BatchSizes, work: Work) -> Estimate:
    """The memory of a run on each GPU.

    Args:
        census: of the model as it learns.
        sizes: of the model.
        batch: the largest that a process takes at a time.
        work: everything else.
    """
    sharing, width = work.sharing, work.compute.bytes
    held = census.rounded(width) if sharing.engine == "deepspeed" else census
    computed = census.rounded(width) if sharing.engine in ("deepspeed", "fsdp2") else census
    weights = {
        place: 0 if sharing.offload_weights else there.total_bytes // sharing.share(3)
        for place, there in held.places.items()
    }
    masters = FLOAT * census.all.learned if sharing.engine == "deepspeed" else 0
    optimizer = (work.optimizer.states(census) + masters) // sharing.share(1)
    leaves = work.optimizer.paged or sharing.offload_optimizer
    return Estimate(
        weights=weights,
        optimizer=0 if leaves else optimizer,
        workspace=WORKSPACE_BYTES + _buckets(held, work),
        moments=Step(held, computed, sizes, batch, work).moments(),
        off_gpu=optimizer if leaves else 0,
    )


def largest_batch(
    census: Census, sizes: ModelSizes, batch: BatchSizes, work: Work, gpu_bytes: int
) -> int:
    """How many rows like those of `batch` fit a GPU for certain; 0 where not even one does.

    Args:
        gpu_bytes: the memory of the GPU, whole.
    """

    def fits(rows: int) -> bool:
        return estimate(census, sizes, scaled(batch, rows), work).comfortable <= gpu_bytes

    if not fits(1):
        return 0
    low, high = 1, MOST_ROWS + 1  # low fits; high does not, or is not looked at
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def scaled(batch: BatchSizes, rows: int) -> BatchSizes:
    """A batch of as many rows like those of `batch`."""
    return replace(
        batch,
        rows=rows,
        learned_tokens=-(-batch.learned_tokens * rows // batch.rows),
        pictures=-(-batch.pictures * rows // batch.rows),
    )


def _buckets(held: Census, work: Work) -> int:
    """Gradients on their way to the other processes.

    DDP keeps a second copy of all of them in its buckets; DeepSpeed fills one bucket while another
    is reduced. Under ZeRO-3 one of them is there in its full size from the start.
    """
    if work.sharing.engine == "ddp":
        return held.all.learned_bytes
    filled = 2 * min(work.sharing.bucket, held.all.learned)
    if work.sharing.zero_stage == 3:
        filled = max(filled, work.sharing.bucket)
    return filled * work.compute.bytes
