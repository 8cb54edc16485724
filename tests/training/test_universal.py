"""Whether a checkpoint in DeepSpeed's shares can be shared out anew."""

from pathlib import Path

import pytest
import torch

from vltrain.errors import VltrainError
from vltrain.training.universal import (
    ANY_NUMBER,
    refuse_fixed_shares,
    refuse_no_room_to_share,
    share_count,
)


def write_shares(checkpoint: Path, kept: dict[str, int]) -> Path:
    """The shares of two processes, with what an optimizer keeps of one weight."""
    folder = checkpoint / "global_step4"
    folder.mkdir(parents=True)
    base = {"state": {0: kept} if kept else {}, "param_groups": []}
    for rank in range(2):
        share = {"optimizer_state_dict": {"base_optimizer_state": base}}
        torch.save(share, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return checkpoint


def test_shares_are_counted_by_their_files(tmp_path):
    adam = {"step": 4, "exp_avg": 0, "exp_avg_sq": 0}

    assert share_count(write_shares(tmp_path / "checkpoint-4", adam)) == 2
    assert share_count(tmp_path) == 0
    refuse_fixed_shares(tmp_path / "checkpoint-4", 1)


@pytest.mark.parametrize("kept", [{"step": 4, "state1": 0, "state2": 0}, {}])
def test_shares_of_another_optimizer_than_adam_are_refused(tmp_path, kept):
    checkpoint = write_shares(tmp_path / "checkpoint-4", kept)

    with pytest.raises(VltrainError) as error:
        refuse_fixed_shares(checkpoint, 1)

    assert "in the shares of 2 processes" in str(error.value)
    assert "resume on 2 processes, or begin anew" in str(error.value)


def test_sharing_out_anew_wants_twice_the_size_of_the_shares(tmp_path: Path, free):
    checkpoint = tmp_path / "checkpoint-4"
    shares = checkpoint / "global_step4"
    shares.mkdir(parents=True)
    for rank in range(2):
        (shares / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(bytes(300))
    (checkpoint / "model.safetensors").write_bytes(bytes(5000))  # is linked to

    free(1200)
    refuse_no_room_to_share(checkpoint)
    free(1199)
    with pytest.raises(VltrainError, match=r"takes 0.0 MiB for a while.*\n.*on 2 processes"):
        refuse_no_room_to_share(checkpoint)


def test_what_an_earlier_try_has_left_counts_as_space(tmp_path: Path, free):
    checkpoint = write_shares(tmp_path / "checkpoint-4", {})
    left = tmp_path / ANY_NUMBER
    left.mkdir()
    (left / "model.safetensors").symlink_to(tmp_path / "large")
    free(0)

    with pytest.raises(VltrainError, match="for a while"):
        refuse_no_room_to_share(checkpoint)
    size = sum(file.stat().st_size for file in checkpoint.rglob("*.pt"))
    (left / "zero").write_bytes(bytes(2 * size))
    refuse_no_room_to_share(checkpoint)
