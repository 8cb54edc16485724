"""The curve of a run's loss, as a picture."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def plot_loss(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draw the loss over the steps, and the eval loss where it was measured, to a PNG.

    Args:
        rows: lines of metrics.jsonl; each has `step` and `loss` or `eval_loss`, of which those
            that are None, a loss that was no number, leave a gap.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(rows)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [
            (row["step"], math.nan if row[key] is None else row[key]) for row in rows if key in row
        ]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats a learned token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path)
