"""Training in bfloat16 at a learning rate of 1e-5: its losses are those of float32, or are not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_qwen_vl
from transformers import PrinterCallback, TrainingArguments

from vltrain.config import FreezeConfig
from vltrain.data.collation import Collator
from vltrain.models import load_model
from vltrain.models.adapters import set_learned
from vltrain.models.catalog import QWEN_VL
from vltrain.training.bf16_adamw import Bf16AdamW
from vltrain.training.trainer import Trainer

BETAS = (0.9, 0.95)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("bf16") / "base")


class Texts(torch.utils.data.Dataset):
    """Four random texts of 40 tokens, all learned."""

    lengths = (40,) * 4

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(0, 255, (40,), generator=generator).tolist()
        return {"input_ids": ids, "labels": ids, "pixel_values": torch.zeros(0, 3, 56, 56)}


def train(
    base: Path, out: Path, *, rounding: str | None, steps: int, accumulation: int = 1, **settings
) -> list[dict[str, float]]:
    """The logged rows of a full run on all four texts a step.

    Args:
        rounding: of `Bf16AdamW`; "none" for torch's own on bfloat16, None for float32.
    """
    model = set_learned(
        load_model(base, dtype="bf16" if rounding else "fp32"), QWEN_VL, FreezeConfig()
    )
    arguments = TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="constant",
        adam_beta2=BETAS[1],
        bf16=rounding is not None,
        use_cpu=True,
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        **{"learning_rate": 1e-5} | settings,
    )
    optimizer = None
    if rounding not in (None, "none"):
        learning_rate = arguments.learning_rate
        optimizer = (Bf16AdamW, {"lr": learning_rate, "betas": BETAS, "rounding": rounding})
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Texts(),
        data_collator=Collator(pad_id=256),
        optimizer_cls_and_kwargs=optimizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def losses(rows: list[dict[str, float]]) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in rows])


@pytest.mark.slow
def test_at_1e_5_both_ways_of_rounding_learn_as_float32_does_and_plain_bfloat16_does_not(
    base, tmp_path
):
    exact = losses(train(base, tmp_path, rounding=None, steps=30))
    fall = (exact[0] - exact[-1]).item()
    off = {
        rounding: (losses(train(base, tmp_path, rounding=rounding, steps=30)) - exact).abs().max()
        for rounding in ("residual", "stochastic", "none")
    }

    assert fall > 0.15
    # a loss computed in bfloat16 is itself off by 0.01
    assert off["residual"] < 0.12 * fall
    assert off["stochastic"] < 0.12 * fall
    assert off["none"] > 0.6 * fall  # it has hardly moved


@pytest.mark.slow
def test_gradients_that_are_added_up_over_four_batches_teach_what_one_of_four_samples_does(
    base, tmp_path
):
    settings = {"rounding": "residual", "steps": 8, "learning_rate": 1e-3}

    whole = train(base, tmp_path, **settings)
    parts = train(base, tmp_path, **settings, accumulation=4)

    fall = (losses(whole)[0] - losses(whole)[-1]).item()
    assert fall > 1
    assert (losses(whole) - losses(parts)).abs().max() < 0.02 * fall
    for one, other in zip(whole, parts, strict=True):
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.05)


def test_a_gradients_size_is_measured_and_clipped_as_in_float32(base, tmp_path):
    exact = train(base, tmp_path, rounding=None, steps=1)[0]["grad_norm"]

    found = train(base, tmp_path, rounding="residual", steps=1)[0]["grad_norm"]

    assert found == pytest.approx(exact, rel=0.01)
    assert exact > 1  # so that what follows is clipped

    model = set_learned(load_model(base, dtype="bf16"), QWEN_VL, FreezeConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_grad_norm=0.5)
    trainer = Trainer(model=model, args=arguments, data_collator=Collator(pad_id=256))
    trainer.create_optimizer()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)

    assert trainer._clip_grad_norm(model).item() == pytest.approx(count**0.5, rel=1e-4)

    squares = sum(p.grad.float().square().sum() for p in model.parameters() if p.grad is not None)
    assert squares.sqrt().item() == pytest.approx(0.5, rel=0.01)
