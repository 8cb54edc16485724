"""What follows a fine-tune at Qwen-VL's real size: quantize, answer in Int4, merge Q-LoRA.

    python benchmarks/after_gpu.py --output after.jsonl --folder /dev/shm/after

A checkpoint with random weights is written first, in the published layout and bfloat16 (19 GB), and
an adapter of rank 64 with random matrices that says it was trained on it in NF4. Three lanes of
parts then run side by side, one on the GPU and two that mostly need the CPU, each part in a process
of its own with a limit of time; `--parts` chooses. What they measure stands in `after_parts.py`.
Each row is one JSON object in the output as soon as it is known, or why it failed. `--tiny` runs
all on a small model on a CPU. Linux only.
"""

import argparse
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import after_parts
import torch
import transformers
from after_parts import Row, Work
from json_lines import tell
from merge_memory import write_adapter, write_base
from own_process import rows_of
from real_size_lora import TOY

from vltrain.models.quantization import Nf4
from vltrain.models.qwen_vl import QwenVLConfig

LANES: tuple[dict[str, float], ...] = (
    {"int4": 240, "quantize": 200},
    {"merge": 300, "low-memory": 150},
    {"logits": 300},
)
"""The parts of each lane in their order, and the seconds after which one is given up.

The first has the GPU; `logits` takes some seconds of it.
"""

ADAPTER_SCALE = 0.02  # of both matrices: their product is some 4 % of a weight
OWN_TOKENS = 151643 - 256  # of a vocabulary as large as the published one, beside single bytes

Write = Callable[[dict[str, Any]], None]


def made_up_vocabulary(file: Path) -> Path:
    """A vocabulary of the published size that splits all text into bytes."""
    from base64 import b64encode

    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [number.to_bytes(4) for number in range(OWN_TOKENS)]
    lines = [f"{b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    file.write_text("\n".join(lines) + "\n")
    return file


def sized_config(tiny: bool, layers: int = 0) -> QwenVLConfig:
    """The published sizes, or small ones; fewer decoder layers where so many are named."""
    sizes = TOY if tiny else {}
    return QwenVLConfig(**sizes | ({"num_hidden_layers": layers} if layers else {}))


def write_inputs(options: argparse.Namespace) -> tuple[Work, Row]:
    """Everything that the parts read, and how long it took."""
    started = time.perf_counter()
    folder = options.folder or Path(tempfile.mkdtemp()) / "after"
    folder.mkdir(parents=True)
    vocabulary = options.vocabulary or made_up_vocabulary(folder / "made_up.tiktoken")
    torch.manual_seed(0)
    base = write_base(folder / "base", sized_config(options.tiny), vocabulary)
    to_quantize = base
    if options.quantize_layers and "quantize" in options.parts:
        cut = sized_config(options.tiny, options.quantize_layers)
        to_quantize = write_base(folder / "cut", cut, vocabulary)
    adapter = write_adapter(folder / "adapter", base, ADAPTER_SCALE, Nf4())
    data = after_parts.write_conversations(folder / "data", count=options.samples * 5 // 4)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # or the parts would find less of the device
    work = Work(folder, base, to_quantize, adapter, data, options)
    gib = sum(file.stat().st_size for file in base.glob("*.safetensors")) / 2**30
    made = {"part": "inputs", "seconds": time.perf_counter() - started, "base_gib": gib}
    return work, made | {"vocabulary": "made up" if options.vocabulary is None else "given"}


def measure(part: str, work: Work, seconds: float, answer: Connection) -> None:
    """Send the rows of a part, then None."""
    try:
        for row in after_parts.PARTS[part](work, seconds, answer.send):
            answer.send(row)
    except (Exception, SystemExit) as error:  # any of them is a row, and no end of the others
        answer.send({"failed": f"{type(error).__name__}: {error}"[:800]})
    answer.send(None)


def lane(parts: dict[str, float], work: Work, deadline: float, write: Write) -> None:
    """Run some parts one after the other."""
    for part, limit in parts.items():
        if part not in work.options.parts:
            continue
        seconds = min(limit, deadline - time.monotonic())
        if seconds < 10:
            write({"part": part, "failed": "no time left"})
            continue
        for row in rows_of(measure, (part, work, seconds - 2), seconds):
            write({"part": part} | row)


def main() -> None:
    """Write the inputs, run the lanes, delete what was written."""
    every = [part for parts in LANES for part in parts]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="must not exist; is deleted; takes 60 GB")
    parser.add_argument("--vocabulary", type=Path, help="qwen.tiktoken; default a made-up one")
    parser.add_argument("--parts", nargs="+", choices=every, default=every)
    parser.add_argument("--quantize-layers", type=int, default=0, help="of 32; default all")
    parser.add_argument("--samples", type=int, default=32, help="conversations to calibrate on")
    parser.add_argument("--context", type=int, default=2048, help="tokens, the answer's included")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--adapter-tokens", type=int, default=64, help="with an adapter on Int4")
    parser.add_argument("--threads", type=int, default=6, help="of each process on the CPU")
    parser.add_argument("--seconds", type=float, default=270, help="for all together")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    if options.tiny:
        options.context, options.new_tokens, options.adapter_tokens = 320, 16, 8
        options.samples, options.threads = 8, 1
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # the processes take it over
    began, lock = time.monotonic(), threading.Lock()

    def write(row: Row) -> None:
        row["at_seconds"] = time.monotonic() - began
        row |= {"torch": torch.__version__, "transformers": transformers.__version__}
        row["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        with lock:
            tell(row, options.output)

    work, made = write_inputs(options)
    try:
        write(made)
        lanes = [
            threading.Thread(target=lane, args=(parts, work, deadline, write)) for parts in LANES
        ]
        for one in lanes:
            one.start()
        for one in lanes:
            one.join()
    finally:
        shutil.rmtree(work.folder)


if __name__ == "__main__":
    main()
