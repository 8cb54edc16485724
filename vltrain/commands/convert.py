"""`vltrain convert`: training JSON of annotations."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Make training JSON of the annotation files people have.",
)

AnnotationFile = Annotated[Path, typer.Argument(metavar="FILE", help="The annotations.")]
TrainingFile = Annotated[
    Path,
    typer.Option(
        "--output", "-o", help="The training file to make: a JSON list, or JSONL by its ending."
    ),
]
Images = Annotated[
    Path | None,
    typer.Option("--images", help="The folder that the annotations' picture names start from."),
]


@app.command()
def coco(
    file: AnnotationFile,
    output: TrainingFile,
    images: Images = None,
    question: Annotated[
        str, typer.Option("--question", help="What is asked about each category.")
    ] = "Detect every {category}.",
) -> None:
    """COCO's instances_*.json: one conversation for each picture.

    A question for each category on it; the answer names all its boxes. Crowds and boxes without
    area are left out and counted.
    """
    from vltrain.workflows.convert import convert_coco_file

    convert_coco_file(file, output, images=images, question=question)


@app.command()
def refcoco(
    file: AnnotationFile,
    output: TrainingFile,
    images: Images = None,
    boxes: Annotated[
        Literal["xywh", "xyxy", "normalised"],
        typer.Option(
            "--boxes",
            help="How boxes are written: corner and size or two corners in pixels, or two corners "
            "as shares of the sides.",
        ),
    ] = "xywh",
    splits: Annotated[
        list[str] | None, typer.Option("--split", help="Entries to take, by `split`; repeatable.")
    ] = None,
    instances: Annotated[
        Path | None,
        typer.Option("--instances", help="The instances.json with the boxes, where FILE has none."),
    ] = None,
    question: Annotated[
        str, typer.Option("--question", help="What is asked about each expression.")
    ] = "Where is {expression}?",
) -> None:
    """RefCOCO, RefCOCO+, RefCOCOg as JSON: one conversation for each expression.

    Entries are {"image", "expressions", "bbox", "width", "height"}, or refs(unc).p saved as JSON
    together with --instances. A pickle is refused.
    """
    from vltrain.workflows.convert import convert_refcoco_file

    convert_refcoco_file(
        file,
        output,
        images=images,
        boxes=boxes,
        splits=splits or (),
        instances=instances,
        question=question,
    )


@app.command()
def llava(file: AnnotationFile, output: TrainingFile, images: Images = None) -> None:
    """LLaVA's list: <image> in the text, the picture's name under `image`."""
    from vltrain.workflows.convert import convert_llava_file

    convert_llava_file(file, output, images=images)
