"""What other libraries say, and no user could act upon, stays off the screen."""

import logging
import warnings

MUTED = ("torchao", "torch.utils._pytree")
"""Loggers that warn whenever `transformers` is imported; their errors are shown."""

DROPPED = {
    "DeepSpeed": "Setting accelerator to CPU",
    "accelerate.accelerator": "[RANK 0] Gradient accumulation steps mismatch",  # DeepSpeed counts
    "transformers.training_args": "When using FSDP, prefer",  # FSDP's own renames parameters
    "huggingface_hub.repocard": "Repo card metadata block was not found",
    "transformers.trainer_utils": "mtime may not be reliable",  # two checkpoints in one second
}
"""For some loggers the beginning of the one message that is not shown."""


def quiet_loggers() -> None:
    """Silence what is said while libraries are imported; call it before they are."""
    for name in MUTED:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name, beginning in DROPPED.items():
        logging.getLogger(name).addFilter(
            lambda record, beginning=beginning: not record.getMessage().startswith(beginning)
        )
    for module in ("transformers", "torch.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)


def hide_weight_bars() -> None:
    """No bars of `transformers` for reading and writing weights; downloads keep theirs."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        enable_progress_bars,
    )
    from transformers.utils.logging import disable_progress_bar

    downloads_silent = are_progress_bars_disabled()
    disable_progress_bar()  # the hub's as well
    if not downloads_silent:
        enable_progress_bars()
