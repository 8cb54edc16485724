"""`vltrain export`: a model's folder in another layout."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from vltrain.errors import VltrainError


def export(
    model: Annotated[str, typer.Argument(help="A whole model's folder, or its name on the hub.")],
    out: Annotated[Path, typer.Argument(help="The folder to make; it must not exist yet.")],
    to: Annotated[
        Literal["original", "transformers", "gptq-int4"],
        typer.Option(
            "--to",
            help="original: as Qwen-VL was published, for its own code and servers that know it; "
            "transformers: for the Auto classes, once vltrain.models is imported; gptq-int4 is "
            "`vltrain quantize`, for it needs conversations.",
        ),
    ],
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Of a file of weights.")
    ] = "2GB",
) -> None:
    """Write a model in the layout that another program reads.

    The weights stay the same to the bit. export.json in the folder has the hash of every file.
    """
    if to == "gptq-int4":
        raise VltrainError.at(
            f"--to {to}",
            what="4 bits are chosen on conversations, and export takes none",
            fix=f"vltrain quantize {model} {out} --data train.json",
        )
    from vltrain.workflows.export import export as export_model

    export_model(model, out, to, max_shard_size=max_shard_size)
