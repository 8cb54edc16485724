"""DeepSpeed's checkpoints, which lie in shares, for another number of processes than wrote them.

RUN/checkpoint-8/                 shares of as many processes as saved it
RUN/checkpoint-any.partial/       the same for any number: DeepSpeed's universal checkpoint,
                                  while a run takes it up
"""

import contextlib
import io
import shutil
import stat
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from vltrain.errors import VltrainError
from vltrain.training.disk import size_in_words
from vltrain.training.files import PARTIAL
from vltrain.training.processes import is_first, wait_for_all

SHARES = "global_step*"  # the folder of a checkpoint that DeepSpeed writes
SHARE_FILES = f"{SHARES}/*_optim_states.pt"  # one of each process
ANY_NUMBER = f"checkpoint-any{PARTIAL}"
ROOM = 2  # times the size of shares: they are taken apart, and then put together, all on the disk
MOMENTS = {"exp_avg", "exp_avg_sq"}
"""What an optimizer keeps of a weight that DeepSpeed can share out anew; Adam's names."""


def share_count(checkpoint: Path) -> int:
    """How many processes' shares a checkpoint has; 0 where it is not in shares."""
    return len(list(checkpoint.glob(SHARE_FILES)))


def refuse_fixed_shares(checkpoint: Path, processes: int) -> None:
    """Raise VltrainError where so many processes cannot go on from a checkpoint in shares."""
    wrote = share_count(checkpoint)
    kept = _optimizer_state(_read(next(checkpoint.glob(SHARE_FILES))))["state"]
    if kept and all(state.keys() >= MOMENTS for state in kept.values()):
        return
    raise VltrainError.at(
        str(checkpoint),
        what=f"it is in the shares of {wrote} processes, and these are {processes}; DeepSpeed "
        "shares out anew what Adam and AdamW keep, and this is of another optimizer",
        fix=f"resume on {wrote} processes, or begin anew with another --output",
    )


def refuse_no_room_to_share(checkpoint: Path) -> None:
    """Raise VltrainError where a checkpoint cannot be shared out anew for want of space beside it.

    What an earlier try has left counts as space: it is removed first.
    """
    needed = ROOM * _bytes_of(next(checkpoint.glob(SHARES)))
    place = checkpoint.with_name(ANY_NUMBER)
    free = shutil.disk_usage(checkpoint).free + (_bytes_of(place) if place.exists() else 0)
    if needed > free:
        raise VltrainError.at(
            str(checkpoint),
            what=f"to share it out anew takes {size_in_words(needed)} for a while, and "
            f"{size_in_words(free)} are free",
            fix=f"make space, or resume on {share_count(checkpoint)} processes",
        )


def _bytes_of(folder: Path) -> int:
    files = (file.lstat() for file in folder.rglob("*"))
    return sum(file.st_size for file in files if stat.S_ISREG(file.st_mode))


def shared_out_anew(checkpoint: Path) -> Path:
    """A folder like a checkpoint whose shares any number of processes can read.

    The first process makes it, the others wait. While it is made it takes about `ROOM` times the
    checkpoint's shares; what is not in shares is not copied.
    """
    place = checkpoint.with_name(ANY_NUMBER)
    if is_first():
        _convert(checkpoint, place)
    wait_for_all()
    return place


def _convert(checkpoint: Path, place: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    shares = next(checkpoint.glob(SHARES))
    for file in checkpoint.iterdir():
        if file != shares:
            (place / file.name).symlink_to(file.resolve())
    wanted = Namespace(
        input_folder=str(shares),
        output_folder=str(place / shares.name),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    silent = io.StringIO()  # it prints each file's name, and a bar
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        ds_to_universal.main(wanted)


def part_groups(optimizer: Optimizer, place: Path) -> None:
    """Give each group of an optimizer its own settings back, and each state its own step.

    Under ZeRO-3 DeepSpeed gives all groups the settings of the first (weight decay to norms and
    biases, and one learning rate to parts that have different ones), and all states one tensor
    to count their steps in, which every one of them would add to.
    """
    file = next(place.glob(f"{SHARES}/zero/optimizer_state.pt"))
    for group, saved in zip(optimizer.param_groups, _read(file)["param_groups"], strict=True):
        group |= {key: value for key, value in saved.items() if key != "params"}
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def drop_shares(place: Path) -> None:
    """Delete what all processes have taken up, which is large; links to other files stay."""
    wait_for_all()
    for shares in place.glob(SHARES) if is_first() else ():
        shutil.rmtree(shares)


def _read(file: Path) -> dict[str, Any]:
    """A file of DeepSpeed's; its tensors stay on the disk."""
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


def _optimizer_state(share: dict[str, Any]) -> dict[str, Any]:
    """What torch's optimizer keeps, in the file of one process: ZeRO-3 and the others differ."""
    state = share["optimizer_state_dict"]
    return state.get("base_optimizer_state") or state["optimizer_state_dict"]
