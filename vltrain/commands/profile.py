"""`vltrain profile`: measured seconds, memory and utilisation of training steps."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from vltrain.commands.device import Device, choose_device
from vltrain.commands.options import Overrides, RecipePath
from vltrain.errors import VltrainError


def profile(
    recipe: RecipePath = None,
    method: Annotated[
        Literal["full", "lora", "qlora"] | None,
        typer.Option(
            "--method", help="What is measured, where the recipe does not say; else lora."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="A folder of weights, or a name on the hub; without it, a Qwen-VL of the "
            "published size with random weights.",
        ),
    ] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Random weights of the model's size: none are read.")
    ] = False,
    lengths: Annotated[
        str,
        typer.Option(
            "--lengths",
            metavar="N,N,…",
            help="Tokens of a sample, picture included; mixed: samples of all lengths between "
            "the least and the greatest that is given.",
        ),
    ] = "384,512,1024,2048,mixed",
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Measured for each length, after warming up.")
    ] = 5,
    device: Device = None,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="A file for the figures as JSON.")
    ] = None,
) -> None:
    """Measure training steps on this machine.

    Seconds for 8 samples of one picture each, peak memory, tokens a second, model FLOP utilisation
    and the share of the time that data is waited for, of real training steps on made-up samples.
    A length that does not fit says so, and the others go on.
    """
    choose_device(device)
    from vltrain.workflows.profile import profile_steps

    profile_steps(
        recipe,
        method=method,
        model=model,
        random=random,
        lengths=_lengths(lengths),
        steps=steps,
        overrides=overrides or (),
        output=output,
    )


def _lengths(text: str) -> list[int | Literal["mixed"]]:
    try:
        return [part if part == "mixed" else int(part) for part in text.split(",")]
    except ValueError:
        raise VltrainError.at(
            f"--lengths {text}",
            what="is no list of numbers",
            fix="write --lengths 384,2048 or --lengths 384,2048,mixed",
        ) from None
