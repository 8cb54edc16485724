"""`vltrain cache`: what a frozen vision tower makes of pictures, before a run."""

from vltrain.commands.options import Data, Model, Overrides, RecipePath, RunMethod


def cache(
    recipe: RecipePath = None,
    method: RunMethod = None,
    model: Model = None,
    data: Data = None,
    overrides: Overrides = None,
) -> None:
    """Compute the features of a run's pictures beforehand.

    A run with data.cache_features: true (or auto) reads what the frozen vision tower makes of each
    picture from the disk, and computes what is lacking before its first step. This does it alone,
    on one GPU or a CPU; torchrun -m vltrain cache shares it out over several. Whatever is there
    already is not computed again.
    """
    from vltrain.training.processes import leave_group
    from vltrain.workflows.cache import cache_features

    cache_features(recipe, method=method, model=model, data=data or (), overrides=overrides or ())
    leave_group()
