"""`vltrain chat`: a file of questions, one question, or a conversation in the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vltrain.commands.options import AllowUrls, DataFormat, ImageRoot, pictures_option

if TYPE_CHECKING:
    from vltrain.data.pictures import Pictures
    from vltrain.workflows.talk import Manner


Prompt = Annotated[
    str | None, typer.Option("--prompt", help="One question: print its answer and exit.")
]
Images = Annotated[
    list[str] | None,
    typer.Option("--image", help="A picture to show with the first question; repeatable."),
]
Questions = Annotated[
    Path | None,
    typer.Option("--input", help="Conversations to answer: whatever is trained on."),
]
Answers = Annotated[
    Path | None,
    typer.Option("--output", help="JSONL to write: one object for each assistant turn."),
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Questions of --input side by side [32]."),
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Tokens after which an answer is cut.")
]
Temperature = Annotated[
    float,
    typer.Option("--temperature", min=0, help="0 takes the likeliest token; above, it draws."),
]
TopP = Annotated[
    float, typer.Option("--top-p", help="Draw from the likeliest tokens of this probability.")
]
System = Annotated[str | None, typer.Option("--system", help="The system turn [the model's own].")]
MaxWindowSize = Annotated[
    int | None,
    typer.Option("--max-window-size", min=1, help="Tokens shown of a conversation [6144]."),
]
Completes = Annotated[
    bool,
    typer.Option("--complete", help="Go on with a text, as a base that was not tuned to chat."),
]
Compiled = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Compile the step that says a token [a conversation on an NVIDIA GPU].",
    ),
]


def chat(
    model: Annotated[
        str, typer.Argument(help="A base, merged or adapter folder, or a name on the hub.")
    ],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="An adapter's folder, to put beside MODEL.")
    ] = None,
    prompt: Prompt = None,
    images: Images = None,
    questions: Questions = None,
    answers: Answers = None,
    batch_size: BatchSize = None,
    data_format: DataFormat = "auto",
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn.")] = 0,
    system: System = None,
    max_window_size: MaxWindowSize = None,
    completes: Completes = False,
    compiled: Compiled = None,
    image_root: ImageRoot = None,
    allow_urls: AllowUrls = False,
) -> None:
    """Talk with a model, ask it one question, or answer a file.

    Without --prompt and --input it is a conversation in the terminal; /help there lists what it
    can do. With --input each question of a file is answered; a run that was cut off goes on where
    it stopped.
    """
    of_talk = (prompt, images, system, max_window_size, completes or None, compiled)
    of_file = (batch_size, answers, None if data_format == "auto" else data_format)
    _refuse_mixed(questions, answers, of_talk, of_file)
    from vltrain.evaluation.generation import Decoding

    decoding = Decoding(max_new_tokens, temperature, top_p)
    pictures = pictures_option(image_root, allow_urls)
    if questions is not None and answers is not None:
        from vltrain.workflows.chat import answer_file

        answer_file(
            model,
            questions,
            answers,
            adapter=adapter,
            batch_size=batch_size or 32,
            decoding=decoding,
            seed=seed,
            format=data_format,
            pictures=pictures,
        )
        return
    from vltrain.workflows.dialogue import MAX_WINDOW_SIZE
    from vltrain.workflows.talk import Manner

    manner = Manner(decoding, system, max_window_size or MAX_WINDOW_SIZE, completes)
    _talk(model, prompt, images or (), manner, pictures, adapter, seed, compiled)


def _refuse_mixed(
    questions: Path | None,
    answers: Path | None,
    of_talk: Sequence[object],
    of_file: Sequence[object],
) -> None:
    """Raise BadParameter for options that do not go together.

    Args:
        of_talk, of_file: options of a conversation and of a file; None where one is not given.
    """
    if questions is not None and any(value is not None for value in of_talk):
        words = "--prompt, --image, --system, --max-window-size, --complete and --compile"
        raise typer.BadParameter(f"{words} do not go with --input")
    if questions is None and any(value is not None for value in of_file):
        raise typer.BadParameter("--output, --batch-size and --format need --input")
    if (questions is None) != (answers is None):
        raise typer.BadParameter("--input needs --output")


def _talk(
    model: str,
    prompt: str | None,
    images: Sequence[str],
    manner: "Manner",
    pictures: "Pictures",
    adapter: Path | None,
    seed: int,
    compiled: bool | None,
) -> None:
    """One question, or a conversation."""
    from vltrain.workflows.terminal import ask_once, converse

    if prompt is None:
        converse(model, images, manner, pictures, adapter=adapter, seed=seed, compiled=compiled)
    else:
        ask_once(
            model, prompt, images, manner, pictures, adapter=adapter, seed=seed, compiled=compiled
        )
