"""Host memory of `vltrain merge`: its peak beside the size of the model that it merges.

    python benchmarks/merge_memory.py --layers 1 --vision-layers 1 --folder /tmp/merge_memory

A base of Qwen-VL's real widths and vocabulary in bf16, with fewer layers and random weights, is
written shard by shard, and an adapter of rank 64 for it. `vltrain merge` then runs in a process of
its own, once as it is and once with `--low-memory`, while what it and the processes that it starts
have in memory is read from /proc. What Python and the libraries take after their import is
subtracted for each process. `anonymous` is what belongs to a process alone; `resident` counts
pages of mapped files too, which the system takes back when it needs them. Linux only.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from vltrain.config import FreezeConfig
from vltrain.models.adapters import Adapter, lora_config, wrap_plain_layers_first
from vltrain.models.catalog import QWEN_VL
from vltrain.models.census import skeleton
from vltrain.models.fingerprint import weights_hash
from vltrain.models.quantization import Nf4
from vltrain.models.qwen_vl import QwenVLConfig
from vltrain.models.saving import Origin, save_shards, write_origin

POLL_SECONDS = 0.02
BLANK = "import vltrain.workflows.merge, vltrain.workflows.reload, sys; sys.stdin.read()"


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    anonymous: int
    resident: int  # with pages of mapped files

    def above(self, other: "Memory") -> "Memory":
        """What is more than in another one."""
        return Memory(
            max(0, self.anonymous - other.anonymous), max(0, self.resident - other.resident)
        )


def cut_config(layers: int, vision_layers: int) -> QwenVLConfig:
    """The published widths with fewer layers."""
    config = QwenVLConfig(num_hidden_layers=layers)
    return QwenVLConfig(num_hidden_layers=layers, visual=config.visual | {"layers": vision_layers})


def installed_vocabulary() -> Path:
    """`qwen.tiktoken` of the package dashscope."""
    package = Path(importlib.util.find_spec("dashscope").origin).parent
    return package / "resources" / "qwen.tiktoken"


def write_base(folder: Path, config: QwenVLConfig, vocabulary: Path) -> Path:
    """A published folder with random weights in bf16, written shard by shard."""
    folder.mkdir()
    values = {**config.to_dict(), "model_type": "qwen", "torch_dtype": "bfloat16"}
    values.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(values))
    shutil.copyfile(vocabulary, folder / "qwen.tiktoken")
    model = skeleton(QWEN_VL, QwenVLConfig.from_published(values), torch.bfloat16)
    shapes = dict(model.named_parameters())
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def read(name: str) -> torch.Tensor:
        tensor = torch.empty(shapes[name].shape, dtype=torch.bfloat16, device=device)
        tensor.normal_(std=0.02)
        return (tensor + 1 if "ln_" in name and name.endswith("weight") else tensor).cpu()

    save_shards(shapes, read, folder)
    return folder


def write_adapter(folder: Path, base: Path, scale: float = 0.01, nf4: Nf4 | None = None) -> Path:
    """An adapter of rank 64 on the base's default layers, with random matrices.

    Args:
        folder: to make.
        base: what it says it was trained on.
        scale: standard deviation of its numbers.
        nf4: how it says the base was held meanwhile.
    """
    folder.mkdir()
    values = json.loads((base / "config.json").read_text())
    values.pop("quantization_config", None)
    model = skeleton(QWEN_VL, QwenVLConfig.from_published(values), torch.bfloat16)
    config = lora_config(QWEN_VL, FreezeConfig(), Adapter())
    config.init_lora_weights = False  # there is nothing to begin from without memory
    wrap_plain_layers_first(config)
    with torch.device("meta"):
        wrapped = get_peft_model(model, config)
    shapes = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    tensors = {name: torch.randn(tensor.shape) * scale for name, tensor in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.init_lora_weights = True
    config.base_model_name_or_path = str(base)
    config.save_pretrained(folder)
    write_origin(Origin(str(base), base, None, weights_hash(base), nf4), folder)
    return folder


def memory_of(pid: int) -> Memory | None:
    """What a process has in memory; None where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = dict(line.split(":", 1) for line in lines)
    if "RssAnon" not in fields:
        return None
    return Memory(*(int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS")))


def tree(pid: int) -> list[int]:
    """A process and all that it has started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(below for child in children for below in tree(int(child)))]


def memory_of_imports() -> Memory:
    """What a process has that has imported what a merge imports, and done nothing."""
    blank = subprocess.Popen([sys.executable, "-c", BLANK], stdin=subprocess.PIPE)
    last = None
    while (now := memory_of(blank.pid)) != last or now is None or now.resident < 2e8:
        last = now
        time.sleep(2)
    blank.communicate(b"")
    return now


def peak_of(command: list[str], imports: Memory, limit: float = math.inf) -> tuple[Memory, float]:
    """The peaks of a command and what it starts, together, above imports; and its seconds.

    Raises:
        SystemExit: it failed, or has not ended within `limit` seconds and was killed.
    """
    began = time.monotonic()
    process = subprocess.Popen(command)
    anonymous = resident = 0
    while process.poll() is None:
        found = [m.above(imports) for pid in tree(process.pid) if (m := memory_of(pid))]
        anonymous = max(anonymous, sum(m.anonymous for m in found))
        resident = max(resident, sum(m.resident for m in found))
        if time.monotonic() - began > limit:
            for pid in tree(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()
            raise SystemExit(
                f"{' '.join(command)} has not ended in {limit:.0f} s; so far "
                f"{anonymous / 2**30:.2f} GiB anonymous"
            )
        time.sleep(POLL_SECONDS)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return Memory(anonymous, resident), time.monotonic() - began


def main() -> None:
    """Write, merge both ways, print a line of the table each, and delete what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1, help="of 32")
    parser.add_argument("--vision-layers", type=int, default=1, help="of 48")
    parser.add_argument("--folder", type=Path, required=True, help="must not exist; is deleted")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    arguments.folder.mkdir(parents=True)
    try:
        config = cut_config(arguments.layers, arguments.vision_layers)
        base = write_base(arguments.folder / "base", config, installed_vocabulary())
        adapter = write_adapter(arguments.folder / "adapter", base)
        size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        names = ("torch", "transformers", "peft", "safetensors")
        print(", ".join(f"{name} {version(name)}" for name in names))
        imports = memory_of_imports()
        print(f"model {size / 2**30:.2f} GiB, imports {imports.resident / 2**30:.2f} GiB")
        for flags in ([], ["--low-memory"]):
            out = arguments.folder / "merged"
            command = [sys.executable, "-m", "vltrain", "merge", str(adapter), str(out), *flags]
            peak, seconds = peak_of(command, imports)
            print(
                f"merge {' '.join(flags)}: anonymous {peak.anonymous / 2**30:.2f} GiB "
                f"({peak.anonymous / size:.2f} x), resident {peak.resident / 2**30:.2f} GiB "
                f"({peak.resident / size:.2f} x), {seconds:.0f} s",
                flush=True,
            )
            shutil.rmtree(out)
    finally:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
