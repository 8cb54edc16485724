"""A run as a user starts it, at the real size: `vltrain` with a model and data, and nothing set.

    python benchmarks/real_run.py --folder /dev/shm --tokens 384 --steps 40

The model has the published sizes, random weights and a vocabulary of bytes; each record shows a
JPEG of 12 megapixels. Seconds a step are those of the run's own `metrics.jsonl`, everything that a
run does between steps included, and are to be held beside those of `vltrain profile`. With `--gpus`
each of `--engines` runs it, one after the other. `--tiny` runs all of it on a CPU.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from engine_bench import ENGINES, ROOT, WIDE, WIDE_VISION
from json_lines import tell

STEP_SAMPLES, WARMUP_STEPS = 8, 5


def write_base(folder: Path, *, toy: bool) -> Path:
    """A model of the published sizes; the vocabulary is one of bytes, in matrices as wide."""
    import tiny
    import torch

    config = dict(tiny.QWEN_VL_CONFIG)
    if not toy:
        config |= WIDE | {"torch_dtype": "bfloat16", "num_hidden_layers": 32}
        config |= {"vocab_size": 151_936}
        config["visual"] = config["visual"] | WIDE_VISION | {"layers": 48}
    with torch.device("cpu" if toy else "cuda"):
        base = tiny.write_qwen_vl(folder / "base", config=config)
    if not toy:
        torch.cuda.empty_cache()  # or the run would find less of the GPU
    return base


def write_data(folder: Path, base: Path, tokens: int, count: int) -> Path:
    """Records of so many tokens, each with a picture."""
    from vltrain.data import encode
    from vltrain.models import load_processor
    from vltrain.training.made_up import write_photo

    write_photo(folder / "photo.jpg")
    processor, records = load_processor(base), []
    for number in range(count):
        question = f"Picture 1: <img>{folder / 'photo.jpg'}</img>\nNumber {number}?"
        turns = [{"from": "user", "value": question}, {"from": "assistant", "value": "a"}]
        record = {"id": str(number), "conversations": turns}
        turns[1]["value"] = "a" * (1 + tokens - len(encode(record, processor).input_ids))
        records.append(record)
    file = folder / "train.json"
    file.write_text(json.dumps(records))
    return file


def run(folder: Path, base: Path, data: Path, engine: str, options: argparse.Namespace) -> dict:
    """The command, and what its log says of its steps; its run is left in the folder."""
    out = folder / "run"
    chosen = [f"{key}={value}" for key, value in ENGINES.get(engine, {}).items()]
    settings = [f"trainer.max_steps={options.steps}", *chosen, *options.set]
    words = [options.method, "--model", base, "--data", data, "--output", out]
    words += [word for setting in settings for word in ("--set", setting)]
    words += ["--gpus", options.gpus] if options.gpus > 1 else []
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "vltrain", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    if done.returncode:
        return {"engine": engine, "error": f"exit code {done.returncode}"}
    lines = (out / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    tokens = STEP_SAMPLES * options.gpus * options.tokens
    seconds = [tokens / row["tokens_per_second"] for row in rows]
    environment = json.loads((out / "environment.json").read_text())
    return {
        "engine": engine,
        "gpus": options.gpus,
        "method": options.method,
        "tokens": options.tokens,
        "seconds_per_step": statistics.median(seconds[WARMUP_STEPS:]),
        "first_steps": seconds[:WARMUP_STEPS],
        "command_seconds": time.perf_counter() - started,
        "hardware": environment["hardware"],
        "packages": environment["packages"],
    }


def main() -> None:
    """Write model and data, and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="for 40 GB that are fast")
    parser.add_argument("--results", type=Path, default=Path("real_run.jsonl"))
    parser.add_argument("--method", default="lora")
    parser.add_argument("--tokens", type=int, default=384)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--engines", nargs="+", choices=["auto", *ENGINES], default=["auto"])
    parser.add_argument("--set", action="append", default=[], help="a key of the recipe")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        base = write_base(folder, toy=options.tiny)
        count = STEP_SAMPLES * options.steps * options.gpus
        data = write_data(folder, base, options.tokens, count)
        for engine in options.engines:
            with tempfile.TemporaryDirectory(dir=folder) as own:  # the next needs its room
                tell(run(Path(own), base, data, engine, options), options.results)


if __name__ == "__main__":
    main()
