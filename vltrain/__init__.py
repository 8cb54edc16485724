"""Fine-tune vision-language models on your own pictures, conversations and boxes.

`vltrain.chat(model, processor, query)` and `vltrain.complete(model, processor, text)` talk to a
model; what they need is imported when they are asked for, and not before.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["chat", "complete"]


def __getattr__(name: str) -> Any:
    """`chat` and `complete`, with all that they import, the first time they are named."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vltrain.workflows import dialogue

    return getattr(dialogue, name)
