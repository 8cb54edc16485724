"""`vltrain export`: a model's folder in another layout."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    model: Annotated[str, typer.Argument(help="A whole model's folder, or its name on the hub.")],
    out: Annotated[Path, typer.Argument(help="The folder to make; it must not exist yet.")],
    to: Annotated[
        Literal["original", "transformers"],
        typer.Option(
            "--to",
            help="original: as Qwen-VL was published, for its own code and servers that know it; "
            "transformers: for the Auto classes, once vltrain.models is imported.",
        ),
    ],
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Of a file of weights.")
    ] = "2GB",
) -> None:
    """Write a model in the layout that another program reads.

    The weights stay the same to the bit. export.json in the folder has the hash of every file.
    """
    from vltrain.workflows.export import export as export_model

    export_model(model, out, to, max_shard_size=max_shard_size)
