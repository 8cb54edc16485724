"""Steps that are measured: how many, how long, and with what they waited for."""

from typing import Any

import pytest
import torch
from tiny import QWEN_VL_CONFIG
from transformers import TrainingArguments

from vltrain.config import FreezeConfig
from vltrain.data.collation import Collator
from vltrain.models.adapters import Adapter, add_lora
from vltrain.models.catalog import QWEN_VL
from vltrain.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration
from vltrain.training.made_up import MadeUpSamples, spread_lengths
from vltrain.training.profiling import Measured, measure

CONFIG = QwenVLConfig.from_published(dict(QWEN_VL_CONFIG))
PICTURE = QWEN_VL.example_picture(CONFIG).input_ids


def picture() -> dict[str, Any]:
    side = CONFIG.vision.image_size
    return {"pixel_values": torch.zeros(1, 3, side, side)}


@pytest.mark.parametrize("samples", [20, 8, 5])  # an epoch of more steps, of as many, of fewer
def test_every_step_is_timed_with_its_tokens_and_with_what_it_waited_for(tmp_path, samples):
    torch.manual_seed(0)
    base = QwenVLForConditionalGeneration(CONFIG)
    settings = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}

    measured = measure(
        add_lora(base, QWEN_VL, FreezeConfig(), Adapter(r=2), seed=0),
        TrainingArguments(str(tmp_path), max_steps=4, remove_unused_columns=False, **settings),
        MadeUpSamples(PICTURE, spread_lengths(20, 20, samples), picture),
        Collator(pad_id=0),
    )

    lone = [step for step in range(4) if samples == 5 and step == 2]  # an epoch's third, of one
    assert measured.tokens == tuple(20 if step in lone else 40 for step in range(4))
    learned = 20 - len(PICTURE)
    assert measured.learned == tuple(learned * count // 20 for count in measured.tokens)
    assert len(measured.seconds) == 4
    pairs = zip(measured.waited, measured.seconds, strict=True)
    waits = [waited / seconds for waited, seconds in pairs]
    assert all(0 <= share < 1 for share in waits)
    assert sum(share > 0 for share in waits) >= 3
    assert samples != 20 or min(waits) > 0
    assert measured.peak_bytes is None


def measured_of(tokens: tuple[int, ...]) -> Measured:
    seconds, waited = (9.0, 1.0, 6.0, 2.0), (8.0, 0.5, 0.0, 0.25)
    return Measured(seconds, waited, tokens, tokens, None, None, None)


def test_the_time_of_a_step_is_the_median_behind_those_that_warm_up():
    measured = measured_of((7, 8, 8, 8))

    assert measured.seconds_per_step(1) == 2
    assert measured.waiting_share(1) == 0.75 / 9


def test_the_time_of_steps_of_other_tokens_is_their_mean():
    assert measured_of((7, 7, 8, 9)).seconds_per_step(1) == 3
