"""`vltrain quantize`: a 16-bit model packed to 4 bits."""

from pathlib import Path
from typing import Annotated

import typer

from vltrain.commands.device import Device, choose_device
from vltrain.commands.options import AllowUrls, DataFormat, ImageRoot, pictures_option


def quantize(
    model: Annotated[str, typer.Argument(help="A whole model's folder, or its name on the hub.")],
    out: Annotated[Path, typer.Argument(help="The folder to make; it must not exist yet.")],
    data: Annotated[
        list[Path],
        typer.Option("--data", help="Your conversations, as they are trained on; repeatable."),
    ],
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Conversations that are calibrated on.")
    ] = 128,
    max_length: Annotated[
        int,
        typer.Option("--max-length", min=1, help="Tokens; longer conversations are passed over."),
    ] = 2048,
    seed: Annotated[int, typer.Option("--seed", help="Of the choice among conversations.")] = 0,
    device: Device = None,
    data_format: DataFormat = "auto",
    image_root: ImageRoot = None,
    allow_urls: AllowUrls = False,
) -> None:
    """Pack a model's decoder to 4 bits by GPTQ, as Qwen-VL-Chat-Int4 is published.

    It is calibrated on your own conversations; some are held out to tell what was lost, layer by
    layer and in perplexity. One layer at a time is on the device. `quantize.json` says it all.
    """
    choose_device(device)
    from vltrain.workflows.quantize import Calibration
    from vltrain.workflows.quantize import quantize as quantize_model

    pictures = pictures_option(image_root, allow_urls)
    calibration = Calibration(tuple(data), samples, max_length, seed, data_format, pictures)
    quantize_model(model, out, calibration)
