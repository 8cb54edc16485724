"""Fine-tune vision-language models on your own pictures, conversations and boxes.

`vltrain.chat(model, processor, query)` and `vltrain.complete(model, processor, text)` talk to a
model, `vltrain.draw_bbox_on_latest_picture(answer, history)` shows where its boxes are; what they
need is imported when they are asked for, and not before.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["chat", "complete", "draw_bbox_on_latest_picture"]


def __getattr__(name: str) -> Any:
    """A function of `dialogue`, with all that it imports, the first time it is named."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vltrain.workflows import dialogue

    return getattr(dialogue, name)
