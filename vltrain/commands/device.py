"""`--device`: the one that a command computes on."""

import os
from typing import Annotated

import typer

from vltrain.errors import VltrainError

Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda or cuda:N. Default: the first GPU, else the CPU."),
]


def choose_device(device: str | None) -> None:
    """Let torch, which has yet to be imported, see one device alone.

    Raises:
        VltrainError: there is no such device.
    """
    if device is None:
        return
    kind, colon, number = device.partition(":")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    if kind != "cuda" or (colon and not number.isdecimal()):
        raise VltrainError.at(
            f"--device {device}", what="is no device", fix="write cpu, cuda, or cuda:1 for another"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name for name in (visible or "").split(",") if name]
    place = int(number or 0)
    if visible is None or place < len(names):
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place) if visible is None else names[place]
        import torch

        if torch.cuda.is_available():
            return
    raise VltrainError.at(
        f"--device {device}", what="this machine has no such GPU", fix="write --device cpu"
    )
