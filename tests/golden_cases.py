"""The original code's recorded cases, as our model takes them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@dataclass(frozen=True)
class Fixture:
    """A checkpoint of the original at toy size."""

    name: str
    image_start_id: int
    image_size: int  # pixels

    @property
    def folder(self) -> Path:
        return GOLDEN / self.name

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def tensors(self, case: str) -> dict[str, Tensor]:
        return load_file(self.folder / "cases" / f"{case}.safetensors")


SMALL = Fixture("model_tiny_small", 500, 112)
REAL448 = Fixture("model_tiny_real448", 151857, 448)
CASES = [
    (fixture, path.stem)
    for fixture in (SMALL, REAL448)
    for path in sorted((fixture.folder / "cases").glob("*.safetensors"))
    if "." not in path.stem
]


def write_embeddings(folder: Path) -> None:
    """The second shard of `model_tiny_real448`, whose two large matrices are a recipe."""
    recipe = json.loads((folder / "embeddings_recipe.json").read_text())
    tensors = {}
    for name in ("transformer.wte.weight", "lm_head.weight"):
        entry = recipe[name]
        state = np.random.RandomState(entry["seed"])
        values = state.randint(-127, 128, size=entry["shape"], dtype=np.int8)
        scaled = values.astype(np.float32) * np.float32(2.0 ** -entry["shift"])
        tensors[name] = torch.from_numpy(scaled)
    save_file(tensors, folder / recipe["writes"], metadata={"format": "pt"})


def with_image_pads(ids: list[int], image_start_id: int) -> tuple[list[int], list[str]]:
    """Golden ids with `<imgpad>` where they carry a picture's path, and the paths."""
    ids, paths, inside = list(ids), [], False
    for i, token in enumerate(ids):
        if token == image_start_id + 1:
            inside = False
        elif token == image_start_id:
            inside = True
            paths.append(bytearray())
        elif inside:
            if token != image_start_id + 2:
                paths[-1].append(token)
            ids[i] = image_start_id + 2
    return ids, [path.decode() for path in paths]


def pixels(path: str, size: int) -> Tensor:
    """float32 [3, size, size] of a golden picture, by the published recipe."""
    with Image.open(GOLDEN / path) as image:
        square = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float()
    return (values / 255 - MEAN) / STD


def model_inputs(fixture: Fixture, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and, where a case has pictures, `pixel_values`."""
    rows = [with_image_pads(row, fixture.image_start_id) for row in tensors["input_ids"].tolist()]
    paths = [path for _, found in rows for path in found]
    inputs = {
        "input_ids": torch.tensor([ids for ids, _ in rows]),
        "attention_mask": tensors["attention_mask"],
    }
    if paths:
        stored = tensors.get("pixel_values")
        inputs["pixel_values"] = (
            torch.stack([pixels(path, fixture.image_size) for path in paths])
            if stored is None
            else stored
        )
    return inputs
