"""Options that several commands take."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from vltrain.data.pictures import Pictures

RecipePath = Annotated[
    Path | None,
    typer.Argument(help="The run as YAML; see recipes/. Without it, the built-in defaults."),
]
RunMethod = Annotated[
    Literal["full", "lora", "qlora"] | None,
    typer.Option("--method", help="Of the run, where the recipe does not say; else lora."),
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="A folder of weights, or a name on the hub: org/name[@revision]."),
]
Data = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        help="Conversations as JSON, JSONL or Parquet, a folder, or a dataset on the hub: "
        "org/name[@revision][:split]; repeatable.",
    ),
]
DataFiles = Annotated[
    list[Path],
    typer.Argument(
        help="Conversations: JSON, JSONL, Parquet, a folder of Parquet or of a saved dataset, or "
        "a dataset on the hub: org/name[@revision][:split]."
    ),
]
DataFormat = Annotated[
    Literal["auto", "qwen_vl", "messages", "llava", "sharegpt", "swift"],
    typer.Option("--format", help="How records are read; auto tells by their content."),
]
Labels = Annotated[
    Literal["assistant", "reference"],
    typer.Option("--labels", help="What a run learns of it, as its data.labels."),
]
Output = Annotated[
    Path | None, typer.Option("--output", help="The directory that the run is written to.")
]
Gpus = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        min=1,
        help="How many GPUs of this machine to train on. Default: one. For processes on a CPU "
        "call torchrun -m vltrain in its place.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any other key of the recipe, as in --set data.max_length=1024; repeatable.",
    ),
]
ImageRoot = Annotated[
    Path | None,
    typer.Option("--image-root", help="Where relative picture paths start, tried first."),
]
AllowUrls = Annotated[
    bool, typer.Option("--allow-urls", help="Download pictures that are http(s) URLs.")
]


def pictures_option(image_root: Path | None, allow_urls: bool) -> "Pictures":
    """Where a command looks for pictures."""
    from vltrain.data.pictures import pictures_at

    return pictures_at(image_root, allow_urls)
