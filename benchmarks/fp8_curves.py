"""Loss curves of one training with its base in float32, in bf16, and in bf16 with layers in fp8.

    python benchmarks/fp8_curves.py --folder /tmp/fp8_curves --output fp8_curves.json

The demo's adapter is trained on the demo's data, the same batches in the same order each time, and
the held-out conversations are evaluated at the end. The curve in float32 says how far rounding
moves a loss anyway. Without a GPU fp8 is emulated, to the same rounding and without the speed. Runs
that were cut off go on; those that are done are read.
"""

import argparse
import json
import platform
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from vltrain.config import load_recipe
from vltrain.training.run_dir import RunDir
from vltrain.workflows.demo import write_demo
from vltrain.workflows.train import train

RECIPE = Path(__file__).parents[1] / "recipes" / "demo_lora.yaml"
WAYS = {
    "float32": ("dtype=fp32",),
    "bf16": ("dtype=bf16",),
    "fp8": ("dtype=bf16", "lora.base=fp8"),
}


def curve(
    demo: Path, run: Path, way: str, steps: int, seed: int, console: Console
) -> dict[str, list]:
    """Train one way; losses by step, as they are logged, and the held-out loss at the end."""
    settings = (
        f"trainer.max_steps={steps}",
        f"trainer.seed={seed}",
        f"trainer.save_steps={max(1, steps // 5)}",
        "trainer.report_to=none",
        f"data.eval_files=[{demo / 'heldout.json'}]",
        "trainer.eval_strategy=steps",
        f"trainer.eval_steps={steps}",
    )
    recipe = load_recipe(
        RECIPE,
        method="lora",
        model=str(demo / "model"),
        data=[demo / "train.json"],
        output=run,
        overrides=[*settings, *WAYS[way]],
    )
    train(recipe, console)
    rows = RunDir(run).read_metrics()
    return {
        "losses": [[row["step"], row["loss"]] for row in rows if "loss" in row],
        "held_out": [row["eval_loss"] for row in rows if "eval_loss" in row],
    }


def show(curves: dict[str, dict[str, list]], console: Console) -> None:
    """Print the curves side by side, and how far each is from that in bf16."""
    others = [way for way in curves if way != "bf16"]
    table = Table("step", *curves, *(f"{way} - bf16" for way in others))
    rows = [
        (str(points[0][0]), *(loss for _, loss in points))
        for points in zip(*(curves[way]["losses"] for way in curves), strict=True)
    ]
    rows.append(("held out", *(curves[way]["held_out"][-1] for way in curves)))
    for step, *losses in rows:
        of = dict(zip(curves, losses, strict=True))
        apart = (f"{of[way] - of['bf16']:+.4f}" for way in others)
        table.add_row(step, *(f"{loss:.4f}" for loss in losses), *apart)
    console.print(table)


def main() -> None:
    """Train all ways one after the other and print their curves."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="for the demo and the runs")
    parser.add_argument("--steps", type=int, default=100, help="of 32 conversations each")
    parser.add_argument("--seed", type=int, default=42, help="of the adapter and the order")
    parser.add_argument("--output", type=Path, help="a file for the curves as JSON")
    options = parser.parse_args()
    console = Console()
    demo = options.folder / "demo"
    if not demo.is_dir():
        write_demo(demo, console)
    steps, seed = options.steps, options.seed
    curves = {
        way: curve(demo, options.folder / f"{way}-{steps}-{seed}", way, steps, seed, console)
        for way in WAYS
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    machine = f"{device or 'CPU'}; torch {torch.__version__}"
    console.print(f"{machine}, transformers {transformers.__version__}")
    show(curves, console)
    if options.output is not None:
        options.output.write_text(json.dumps({"machine": machine, "curves": curves}, indent=1))


if __name__ == "__main__":
    main()
