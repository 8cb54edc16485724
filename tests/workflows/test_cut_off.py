"""A run that was cut off goes on as if it had not been."""

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from runs import PACKED, metrics, quick, run, same, weights

from vltrain.config import recipe_to_yaml
from vltrain.training.run_dir import RunDir

BY_LENGTH = "trainer.train_sampling_strategy=group_by_length"
STREAMED = ("data.streaming=true", "data.shuffle_buffer=3")


class CutOff(BaseException):
    """What ends a run in the middle of it."""


@pytest.mark.parametrize(
    ("method", "settings", "checkpoint"),
    [
        ("lora", ("trainer.save_steps=2",), 4),
        pytest.param("full", ("trainer.save_steps=2", BY_LENGTH), 4, marks=pytest.mark.slow),
        # in the middle of an epoch
        pytest.param("lora", ("trainer.save_steps=3", *PACKED), 3, marks=pytest.mark.slow),
        # 3 steps an epoch: in the second
        pytest.param("lora", ("trainer.save_steps=2", "MIX"), 4, marks=pytest.mark.slow),
        pytest.param("lora", ("trainer.save_steps=2", "MIX", *PACKED), 4, marks=pytest.mark.slow),
        pytest.param("lora", ("trainer.save_steps=2", *STREAMED), 4, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(
    base, data, tmp_path, monkeypatch, method, settings, checkpoint
):
    settings = [f"data.mix=[{{file: {data}, weight: 1.5}}]" if s == "MIX" else s for s in settings]
    run(quick(base, data, tmp_path / "whole", *settings, method=method))
    write = RunDir.append_metrics

    def write_and_stop(self: RunDir, row: dict[str, Any]) -> None:
        write(self, row)
        if row["step"] == 5:
            raise CutOff

    recipe = quick(base, data, tmp_path / "cut", *settings, method=method)
    monkeypatch.setattr(RunDir, "append_metrics", write_and_stop)
    with pytest.raises(CutOff):
        run(recipe)
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "final").exists()

    shown = run(recipe)

    assert f"resuming from {tmp_path}/cut/checkpoint-{checkpoint}" in shown
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert metrics(tmp_path / "cut", "learned_tokens") == metrics(
        tmp_path / "whole", "learned_tokens"
    )
    assert same(weights(tmp_path / "cut" / "final"), weights(tmp_path / "whole" / "final"))


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(base, data, tmp_path):
    settings = ("trainer.max_steps=24", "trainer.save_steps=4")
    run(quick(base, data, tmp_path / "whole", *settings))
    recipe = quick(base, data, tmp_path / "cut", *settings)
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "vltrain", "lora", str(tmp_path / "recipe.yaml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and len(metrics(tmp_path / "cut")) < 9:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "final").exists()

    shown = run(recipe)

    assert "resuming from" in shown
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
