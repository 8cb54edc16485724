"""The words the user types. A command parses, calls one workflow, and imports it only then."""

import logging
import math
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal

import typer

from vltrain import __version__
from vltrain.commands.cache import cache
from vltrain.commands.chat import chat
from vltrain.commands.convert import app as convert
from vltrain.commands.export import export
from vltrain.commands.options import (
    AllowUrls,
    Data,
    DataFiles,
    DataFormat,
    ImageRoot,
    Labels,
    Model,
    Overrides,
    RecipePath,
    RunMethod,
    pictures_option,
)
from vltrain.commands.profile import profile
from vltrain.commands.quantize import quantize
from vltrain.commands.train import METHODS, TORCHRUN_SPELLING, TrainCommand, training_command
from vltrain.errors import Stopped, VltrainError
from vltrain.training.processes import (
    end_after_failure,
    is_first,
    started_by_torchrun,
    tie_to_launcher,
)
from vltrain.workflows.quiet import quiet_loggers

app = typer.Typer(
    name="vltrain",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help needs no rich, and answers in a third of the time
)
app.add_typer(convert, name="convert")


def main() -> None:
    """The console entry: what vltrain raises is a message and its exit code, not a traceback."""
    # Threads that wait for work give their core away; spinning, they make a tiny model on two busy
    # cores several times slower. Read when torch is imported, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Where a machine is lost, its peers would print a stack of C++ for each message they miss.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    quiet_loggers()
    tie_to_launcher()
    if not is_first():
        logging.getLogger().setLevel(logging.ERROR)
    try:
        app()
    except VltrainError as error:
        if started_by_torchrun():
            end_after_failure(f"error: {error}", error.exit_code)
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except Stopped as stopped:
        if started_by_torchrun():
            end_after_failure(str(stopped), stopped.exit_code, patience_seconds=1)
        print(stopped, file=sys.stderr)
        raise SystemExit(stopped.exit_code) from None
    except Exception:
        if started_by_torchrun():
            end_after_failure(traceback.format_exc(), code=1)
        raise


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vltrain {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    """Fine-tune vision-language models on your own pictures, conversations and boxes."""


for method in METHODS:
    app.command(method, cls=TrainCommand, context_settings=TORCHRUN_SPELLING)(
        training_command(method)
    )


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder: RUN/final.")],
    out: Annotated[Path, typer.Argument(help="The folder to make; it must not exist yet.")],
    base: Annotated[
        str | None, typer.Option("--base", help="The base, where it is no longer in its place.")
    ] = None,
    others: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="ADAPTER=WEIGHT",
            help="Another adapter of the same base, and the share of it to add; repeatable.",
        ),
    ] = None,
    into: Annotated[
        Literal["auto", "base", "dequantized"],
        typer.Option(
            "--into",
            help="Of adapters trained on 4 bits: the weights as those 4 bits have them, which auto "
            "is, or the 16-bit base.",
        ),
    ] = "auto",
    low_memory: Annotated[
        bool,
        typer.Option(
            "--low-memory",
            help="Never hold a whole model in memory; the proof is then tensor by tensor.",
        ),
    ] = False,
) -> None:
    """Make an adapter and its base one model.

    The weights stand alone and are proven equal to base and adapter before they get their name.
    merge.json in their folder says what was merged, and how near it came.
    """
    from vltrain.workflows.merge import merge as merge_adapter

    merge_adapter(
        adapter,
        out,
        base=base,
        others=[_share(text) for text in others or ()],
        into=into,
        low_memory=low_memory,
    )


def _share(text: str) -> tuple[Path, float]:
    """An adapter and its weight, as `--with` has them."""
    folder, _, weight = text.rpartition("=")
    try:
        share = float(weight)
    except ValueError:
        share = math.nan
    if not folder or not math.isfinite(share):
        raise VltrainError.at(
            f"--with {text}",
            what="is no adapter and a number",
            fix="write --with runs/other/final=0.5",
        )
    return Path(folder), share


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name on the hub.")],
    answer: Annotated[
        bool,
        typer.Option(
            "--answer/--no-answer",
            help="Load it and ask about a picture; without, a tensor at a time is in memory.",
        ),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say whether a model is whole: downloaded, merged or exported.

    Every file of the index, its size and tensors, that all values are finite, that tokenizer and
    config fit each other, and an answer to a picture. The exit code is 1 where it is not.
    """
    from vltrain.workflows.verify import verify as verify_model

    raise typer.Exit(verify_model(model, answer=answer, as_json=as_json))


app.command()(export)
app.command()(cache)
app.command()(profile)
app.command()(quantize)
app.command()(chat)


@app.command()
def check(
    data: DataFiles,
    model: Annotated[
        str | None, typer.Option("--model", help="Whose tokens to count: a folder or a hub name.")
    ] = None,
    image_root: ImageRoot = None,
    allow_urls: AllowUrls = False,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=1, help="The longest sample, in tokens; needs --model."),
    ] = None,
    too_long: Annotated[
        Literal["error", "drop"],
        typer.Option("--too-long", help="What a longer sample is: an error, or to be dropped."),
    ] = "error",
    data_format: DataFormat = "auto",
    labels: Labels = "assistant",
    decode: Annotated[
        bool,
        typer.Option("--decode", help="Decode every picture; else headers and ends are read."),
    ] = False,
    bad_pictures: Annotated[
        Literal["error", "drop"],
        typer.Option(
            "--bad-pictures", help="What a record with a bad picture is: an error, or dropped."
        ),
    ] = "error",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Report all that is wrong with data files.

    The exit code is 1 if there is an error, 0 if there are only warnings or nothing.
    """
    from vltrain.workflows.inspect import check as check_data

    raise typer.Exit(
        check_data(
            data,
            pictures=pictures_option(image_root, allow_urls),
            model=model,
            max_length=max_length,
            too_long=too_long,
            format=data_format,
            labels=labels,
            decode=decode,
            bad_pictures=bad_pictures,
            as_json=as_json,
        )
    )


@app.command()
def preview(
    data: DataFiles,
    model: Annotated[
        str, typer.Option("--model", help="Who is to see it: a folder or a hub name.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML page to write.")],
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="How many records to show, drawn at random.")
    ] = 20,
    seed: Annotated[int, typer.Option("--seed", help="Decides which records are drawn.")] = 0,
    data_format: DataFormat = "auto",
    labels: Labels = "assistant",
    image_root: ImageRoot = None,
    allow_urls: AllowUrls = False,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=1, help="Mark samples with more tokens.")
    ] = None,
) -> None:
    """Show samples as the model gets them, on a page.

    Pictures with their boxes, the text token by token, what is learned of it, and what check
    finds. Only the model's tokenizer is loaded.
    """
    from vltrain.workflows.preview import preview as preview_data

    preview_data(
        data,
        output,
        model=model,
        samples=samples,
        seed=seed,
        format=data_format,
        labels=labels,
        pictures=pictures_option(image_root, allow_urls),
        max_length=max_length,
    )


@app.command()
def stats(
    data: DataFiles,
    model: Annotated[
        str, typer.Option("--model", help="Whose tokens to count: a folder or a hub name.")
    ],
    data_format: DataFormat = "auto",
    labels: Labels = "assistant",
    image_root: ImageRoot = None,
    allow_urls: AllowUrls = False,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=1, help="A limit, in tokens, to count and pack for."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Say how long the samples are, and what is in them.

    Tokens, pictures, boxes, the learned share, scripts; what a max_length would drop, and how
    well the samples pack.
    """
    from vltrain.workflows.stats import stats as print_stats

    print_stats(
        data,
        model=model,
        format=data_format,
        labels=labels,
        pictures=pictures_option(image_root, allow_urls),
        max_length=max_length,
        as_json=as_json,
    )


@app.command()
def estimate(
    recipe: RecipePath = None,
    method: RunMethod = None,
    model: Model = None,
    data: Data = None,
    overrides: Overrides = None,
    pictures: Annotated[
        int,
        typer.Option(
            "--pictures", min=0, help="In each sample, where no data is given; samples are full."
        ),
    ] = 1,
    memory_gib: Annotated[
        float | None,
        typer.Option("--memory-gib", min=0, help="Of the GPU; without it, the one that is there."),
    ] = None,
    gpus: Annotated[
        int, typer.Option("--gpus", min=1, help="Of the run; the memory is that of each.")
    ] = 1,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe/--no-probe", help="Measure some steps on random weights, if there is a GPU."
        ),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Say what memory and time a run will take.

    GPU memory by part, and the largest batch that fits. No GPU and no weights are needed: of a
    name on the hub only the configuration and the tokenizer come down. The time of an epoch is
    measured, so it needs a GPU and data.
    """
    from vltrain.workflows.estimate import estimate_run

    estimate_run(
        recipe,
        method=method,
        model=model,
        data=data or (),
        overrides=overrides or (),
        pictures=pictures,
        memory_gib=memory_gib,
        gpus=gpus,
        probe=probe,
        as_json=as_json,
    )


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The demo's folder.")],
    score: Annotated[
        bool,
        typer.Option("--score", help="Score the answers of base and merged model that are there."),
    ] = False,
) -> None:
    """Write a tiny model and data to try all on.

    A Qwen-VL of 2.3 million parameters and pictures of real handwritten digits, with questions
    and boxes: every command runs with them on a laptop's CPU.
    """
    from vltrain.workflows.demo import score_demo, write_demo

    if score:
        score_demo(folder)
    else:
        write_demo(folder)
