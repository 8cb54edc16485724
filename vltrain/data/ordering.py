"""In which order samples are learned from: a function of seed and epoch alone.

So neither the number of workers nor a resume changes it, and every process of a run computes the
same. Orders are arrays: a list of a million of Python's numbers takes 40 MB.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MOST_STEPS_SORTED = 50  # steps whose samples are put in order of length together


def chance_of(seed: int, *numbers: int) -> np.random.Generator:
    """The chance of a seed and of what else it depends on, such as the epoch; none below 0."""
    return np.random.default_rng([seed, *numbers])


def grouped_by_length(
    order: NDArray[np.integer], lengths: ArrayLike, step_samples: int
) -> NDArray[np.integer]:
    """A random order, changed so that neighbours are of about the same length.

    It is cut into runs of many steps, and each run is put in order of length, the longest
    first. The longest of all comes first: what does not fit into memory is seen at once.

    Args:
        order: places of samples, each once, shuffled.
        lengths: tokens of the sample at each place.
        step_samples: samples of one optimizer step.
    """
    tokens = np.asarray(lengths)[order]
    steps = min(max(1, len(order) // (4 * step_samples)), _MOST_STEPS_SORTED)
    run = np.arange(len(order)) // (steps * step_samples)
    places = np.lexsort((-tokens, run))
    # The longest of all leads its run: that of the first run changes places with it.
    longest = int(np.argmax(tokens[places]))
    places[[0, longest]] = places[[longest, 0]]
    return order[places]
