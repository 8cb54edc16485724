"""What optimizers keep for each learned weight, by the names that `TrainingArguments` knows."""

from dataclasses import dataclass

from vltrain.models.sizes import Census
from vltrain.training.activations import FLOAT
from vltrain.training.master_adamw import CHUNK

SCALED_BLOCK = 256  # 8-bit states that share a float32 scale, in bitsandbytes and torchao
STATES = {"ademamix": 3, "adam": 2, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0}
"""Numbers for each weight, by what the name of an optimizer holds; the first that fits."""


@dataclass(frozen=True)
class Optimizer:
    """An optimizer, as far as memory goes."""

    name: str  # `trainer.optim`
    residual: bool = False  # keeps what rounding takes of a bfloat16 weight, in 16 bits
    masters: bool = False  # keeps a float32 of a bfloat16 weight, and its moments in float32

    @property
    def known(self) -> bool:
        """Whether its states are counted as they are; another is counted as AdamW."""
        return any(kind in self.name for kind in STATES)

    @property
    def paged(self) -> bool:
        """Whether its states lie in memory that host and GPU share, beside torch's own."""
        return self.name.startswith("paged_")

    def states(self, census: Census) -> int:
        """Bytes of the states of all that learns."""
        learned = census.all
        if self.masters:
            return 3 * FLOAT * learned.learned
        numbers = next((n for kind, n in STATES.items() if kind in self.name), 2)
        if "8bit" in self.name:
            one = learned.learned + learned.learned * 4 // SCALED_BLOCK
        elif "4bit" in self.name:
            one = learned.learned // 2 + learned.learned * 4 // (SCALED_BLOCK // 2)
        else:
            one = learned.learned_bytes
        return numbers * one + (2 * learned.learned if self.residual else 0)

    def temporaries(self, census: Census) -> int:
        """Bytes that a step takes and gives back.

        torch's AdamW works on all weights at once and holds the roots of all second moments;
        the fused one, and bitsandbytes', need nothing.
        """
        if self.masters:
            return FLOAT * min(CHUNK, census.all.learned)  # gradients, some at a time
        return census.all.learned_bytes if self.name == "adamw_torch" else 0
