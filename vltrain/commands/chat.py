"""`vltrain chat`: a file of questions, one question, or a conversation in the terminal."""

from pathlib import Path
from typing import Annotated

import typer

from vltrain.commands.options import AllowUrls, DataFormat, ImageRoot, pictures_option


def chat(
    model: Annotated[
        str, typer.Argument(help="A base, merged or adapter folder, or a name on the hub.")
    ],
    questions: Annotated[
        Path,
        typer.Option("--input", help="Conversations to answer: whatever is trained on."),
    ],
    answers: Annotated[
        Path,
        typer.Option("--output", help="JSONL to write: one object for each assistant turn."),
    ],
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Questions answered side by side.")
    ] = 32,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Tokens after which an answer is cut.")
    ] = 512,
    data_format: DataFormat = "auto",
    image_root: ImageRoot = None,
    allow_urls: AllowUrls = False,
) -> None:
    """Answer every question of a file.

    Each token is the likeliest one. A run that was cut off goes on where it stopped.
    """
    from vltrain.evaluation.generation import Decoding
    from vltrain.workflows.chat import answer_file

    answer_file(
        model,
        questions,
        answers,
        batch_size=batch_size,
        decoding=Decoding(max_new_tokens),
        format=data_format,
        pictures=pictures_option(image_root, allow_urls),
    )
