"""What makes a run smaller, in order of what it costs and with what it comes to."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from vltrain.config import Recipe
from vltrain.errors import VltrainError
from vltrain.models.sizes import Place, PlaceWeights
from vltrain.training.memory import GIB, scaled
from vltrain.training.optimizer_bytes import Optimizer
from vltrain.workflows.memory import RunMemory

# The estimate may be a tenth too high: only what is over by more than that is refused.
CERTAIN_SHARE = 0.9


@dataclass(frozen=True)
class Advice:
    """One change to a recipe."""

    words: str  # what to write, and what it costs
    smaller: Callable[[RunMemory], RunMemory] | None = None  # None: what it comes to is not known


def memory_advice(recipe: Recipe, run: RunMemory | None = None) -> list[str]:
    """What makes a run smaller, the cheapest first; what is done already is left out.

    Args:
        run: as it is now; each change then has the memory that the run would need with it.
    """
    lines = []
    for advice in _changes(recipe, run):
        if run is None or advice.smaller is None:
            lines.append(advice.words)
        else:
            needed = advice.smaller(run).estimate.needed / GIB
            lines.append(f"{advice.words} (about {needed:.1f} GiB)")
    return lines


def refuse_what_cannot_fit(recipe: Recipe, run: RunMemory, gpu_bytes: int) -> None:
    """Raise VltrainError where a run needs more than a GPU has, the estimate's error allowed for.

    The fix names what helps, the cheapest change first, each with what it comes to.
    """
    needed = run.estimate.needed
    if needed * CERTAIN_SHARE <= gpu_bytes:
        return
    raise VltrainError.at(
        "memory",
        what=(
            f"the run needs about {needed / GIB:.1f} GiB of GPU memory, "
            f"and the GPU has {gpu_bytes / GIB:.1f}"
        ),
        fix="\n       ".join(
            [*memory_advice(recipe, run), "memory_check: false; the run is tried as it is"]
        ),
    )


def _changes(recipe: Recipe, run: RunMemory | None) -> Iterator[Advice]:
    trainer, data = recipe.trainer, recipe.data
    batch = trainer["per_device_train_batch_size"]
    steps = trainer["gradient_accumulation_steps"]
    bare = recipe.memory is None and not trainer["gradient_checkpointing"]
    compute = None if run is None else run.work.compute
    all_of_it = compute is not None and compute == compute.all_recomputed()
    if bare or (recipe.memory not in (None, "lean") and not all_of_it):
        key = "trainer.gradient_checkpointing: true" if bare else "memory: lean"
        yield Advice(f"{key}; the losses stay, a step takes longer", _recomputing)
    if batch > 1:
        half = (batch + 1) // 2
        yield Advice(
            f"trainer.per_device_train_batch_size: {half} and "
            f"trainer.gradient_accumulation_steps: {steps * 2}; the losses stay",
            lambda run: replace(run, batch=scaled(run.batch, half)),
        )
    wide = 0 if run is None or recipe.batch.samples is None else run.batch.row_tokens
    if wide > data.max_length:
        half = max(data.max_length, wide // 2)
        yield Advice(f"data.row_tokens: {half}; the losses stay", _half_as_long)
    elif data.packs and recipe.batch.samples is None:
        yield Advice(
            f"data.max_length: {data.max_length // 2}; rows are as long as that", _half_as_long
        )
    elif data.too_long != "drop":
        yield Advice(
            "a lower data.max_length with data.too_long: drop; the longest samples are left out"
        )
    yield from _full_changes(recipe, run) if recipe.method == "full" else _adapter_changes(recipe)


def _full_changes(recipe: Recipe, run: RunMemory | None) -> Iterator[Advice]:
    """Fewer bits for what learns: of the weights in one process, of the moments alone elsewhere."""
    weights = recipe.full.weights
    shared = run is not None and run.engine.name != "none"
    if shared or recipe.dtype == "fp32":
        yield Advice(
            "trainer.optim: adamw_bnb_8bit; a quarter of the optimizer's memory",
            lambda run: _with_optimizer(run, Optimizer("adamw_bnb_8bit")),
        )
    else:
        if weights in ("auto", "fp32"):
            yield Advice(
                "full.weights: residual; 8 bytes for each learned weight in the place of 16",
                lambda run: _in_bf16(run, residual=True),
            )
        if weights != "stochastic":
            yield Advice(
                "full.weights: stochastic; 6 bytes for each learned weight, rounded at random",
                lambda run: _in_bf16(run, residual=False),
            )
    yield Advice("vltrain lora; adapters learn in the place of all weights")


def _adapter_changes(recipe: Recipe) -> Iterator[Advice]:
    """Embeddings that rest, a lower rank, and a base in 4 bits."""
    if recipe.lora.embeddings is not False:
        yield Advice(
            "lora.embeddings: false; the embeddings do not learn then", _resting_embeddings
        )
    yield Advice(f"lora.r: {max(1, recipe.lora.r // 2)}; smaller adapters", _half_the_rank)
    if recipe.method == "lora":
        yield Advice("vltrain qlora; the base's layers in 4 bits")
    elif recipe.freeze.vision and not recipe.quantize.vision:
        yield Advice("quantize.vision: true; the vision tower in 4 bits too", _packed_vision)


def _recomputing(run: RunMemory) -> RunMemory:
    work = replace(run.work, compute=run.work.compute.all_recomputed())
    return replace(run, work=work)


def _half_as_long(run: RunMemory) -> RunMemory:
    batch = replace(
        run.batch,
        row_tokens=run.batch.row_tokens // 2,
        learned_tokens=run.batch.learned_tokens // 2,
        pictures=-(-run.batch.pictures // 2),
    )
    return replace(run, batch=batch)


def _with_optimizer(run: RunMemory, optimizer: Optimizer) -> RunMemory:
    return replace(run, work=replace(run.work, optimizer=optimizer))


def _in_bf16(run: RunMemory, *, residual: bool) -> RunMemory:
    smaller = replace(run, census=run.census.rounded(2))
    return _with_optimizer(smaller, Optimizer("adamw_8bit", residual=residual))


def _packed_vision(run: RunMemory) -> RunMemory:
    """Nearly all of the tower's weights are in its linear layers."""
    count = run.census.at("vision").total
    packed = PlaceWeights(count, total_bytes=count // 2 + count // 64)
    return replace(run, census=replace(run.census, places={**run.census.places, "vision": packed}))


def _resting_embeddings(run: RunMemory) -> RunMemory:
    """Without the copies of embeddings and head that learn beside an adapter."""
    places: tuple[Place, ...] = ("embeddings", "head")
    resting = {
        place: PlaceWeights(
            total=there.total - there.learned, total_bytes=there.total_bytes - there.learned_bytes
        )
        for place, there in ((place, run.census.at(place)) for place in places)
    }
    return replace(run, census=replace(run.census, places={**run.census.places, **resting}))


def _half_the_rank(run: RunMemory) -> RunMemory:
    own = run.census.at("adapter")
    half = PlaceWeights(
        own.total // 2,
        own.learned // 2,
        own.learned_matrices // 2,
        own.total_bytes // 2,
        own.learned_bytes // 2,
    )
    census = replace(
        run.census,
        places={**run.census.places, "adapter": half},
        adapters=replace(run.census.adapters, ranks=run.census.adapters.ranks // 2),
    )
    return replace(run, census=census)
