"""What a GPU does in one training step, of a trace: computing, sending, or nothing."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainerState

Span = tuple[int, int]
"""Begin and end, in nanoseconds."""
SENDING = "nccl"  # begins the names of kernels that send to other GPUs


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same time in spans that do not overlap, in order."""
    whole: list[Span] = []
    for begin, end in sorted(spans):
        if whole and begin <= whole[-1][1]:
            whole[-1] = (whole[-1][0], max(end, whole[-1][1]))
        else:
            whole.append((begin, end))
    return whole


def length(spans: Iterable[Span]) -> int:
    """Nanoseconds in which any of the spans is."""
    return sum(end - begin for begin, end in merged(spans))


def kernels_of(events: Iterable[Any]) -> dict[str, list[Span]]:
    """When each kind of kernel ran, by its name.

    A trace also has the marks of the host's functions on the GPU, as DDP's `forward`, which span
    what lies between kernels too: their names are those of the host's events.
    """
    on_host = {event.name() for event in events if event.device_type() != DeviceType.CUDA}
    kernels: dict[str, list[Span]] = defaultdict(list)
    for event in events:
        if event.device_type() == DeviceType.CUDA and event.name() not in on_host:
            kernels[event.name()].append((event.start_ns(), event.start_ns() + event.duration_ns()))
    return kernels


def shares(kernels: dict[str, list[Span]], whole: int) -> dict[str, Any]:
    """How a step's time is made up.

    Args:
        kernels: when each kind of kernel ran, by its name.
        whole: nanoseconds of the step.

    Returns:
        Shares of the step: `computing`, `sending` (beside it or alone), `only_sending`, `idle`;
        and `kernels`: how many there are, and `longest`: the seconds of the kinds with most.
    """
    sent = [span for name, spans in kernels.items() if name.startswith(SENDING) for span in spans]
    made = [s for name, spans in kernels.items() if not name.startswith(SENDING) for s in spans]
    busy = length([*sent, *made])
    most = sorted(kernels, key=lambda name: -length(kernels[name]))[:8]
    return {
        "step_seconds": whole / 1e9,
        "computing": length(made) / whole,
        "sending": length(sent) / whole,
        "only_sending": (busy - length(made)) / whole,
        "idle": 1 - busy / whole,
        "kernels": sum(map(len, kernels.values())),
        "longest": {name[:60]: length(kernels[name]) / 1e9 for name in most},
    }


class TracedStep(TrainerCallback):
    """Traces one step, the GPU's part alone."""

    def __init__(self, step: int) -> None:
        """`step`: which, from 0."""
        self.step = step
        self.found: dict[str, Any] | None = None
        self._trace: Any = None

    def on_step_begin(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        if state.global_step == self.step and torch.cuda.is_available():
            torch.cuda.synchronize()
            self._trace = profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU])
            self._trace.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self._trace is None:
            return
        torch.cuda.synchronize()
        self._trace.stop()
        events = self._trace.profiler.kineto_results.events()
        self.found = shares(
            kernels_of(events),
            max(event.start_ns() + event.duration_ns() for event in events)
            - min(event.start_ns() for event in events),
        )
        self._trace = None
