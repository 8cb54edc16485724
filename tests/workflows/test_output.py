"""What is on the screen while a user works: vltrain's own lines, and nobody else's."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_qwen_vl

RECORDS = [
    {
        "id": f"sum-{number}",
        "conversations": [
            {"from": "user", "value": f"{number} + 1 ="},
            {"from": "assistant", "value": f"{number + 1}."},
        ],
    }
    for number in range(6)
]

TRAINING_LINES = (
    r"data: 6 records (checked|read from the cache) in [\d.]+ s",
    r"lora · .*/base · Qwen-VL v1",
    r"[┏┡└].*",  # the frame of the table of parameters
    r"[┃│] (part|language|adapter|vision|projector|all) .*",
    r"4 samples, [\d,]+ tokens \([\d,]+ learned\), 0 pictures; longest \d+ tokens, "
    r"0 dropped",
    r"2 samples to evaluate on",
    r"2 steps of 2 samples, weights in fp32, on cpu",
    r"step \d/2  loss [\d.]+  lr [\d.e+-]+  [\d,]+ tokens/s",
    r"step \d: eval loss [\d.]+",
    r"done: .*/final; the loss is drawn in .*/loss\.png",
)
MERGING_LINES = (
    r"comparing the base's weights with those that the adapter was trained on",
    r"merging .*/final into .*/base",
    r"reading the merged weights back in a fresh process",
    r"done: .*/merged, in float32; its logits differ .*",
)

TRAINER_SETTINGS = (
    "max_steps=2",
    "gradient_accumulation_steps=2",
    "learning_rate=1e-2",
    "save_steps=1",  # checkpoints are written, and the older one removed
    "save_total_limit=1",
    "use_cpu=true",
)


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, where libraries say what they have to say."""
    command = [sys.executable, "-m", "vltrain", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def unknown_lines(text: str, known: tuple[str, ...]) -> list[str]:
    lines = text.splitlines()
    return [line for line in lines if not any(re.fullmatch(form, line) for form in known)]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base and data."""
    folder = tmp_path_factory.mktemp("output")
    write_qwen_vl(folder / "base")
    (folder / "data.json").write_text(json.dumps(RECORDS))
    return folder


@pytest.fixture(scope="module")
def trained(workshop: Path) -> subprocess.CompletedProcess[str]:
    """A finished run in `workshop / "run"`."""
    names = ("--model", workshop / "base", "--data", workshop / "data.json")
    sets = [word for setting in TRAINER_SETTINGS for word in ("--set", f"trainer.{setting}")]
    sets += ["--set", "dtype=fp32", "--set", "data.eval_share=0.34"]
    return run("lora", *names, "--output", workshop / "run", *sets)


@pytest.mark.slow
def test_training_shows_its_own_lines_and_nothing_else(trained: subprocess.CompletedProcess[str]):
    assert trained.stderr == ""
    assert unknown_lines(trained.stdout, TRAINING_LINES) == []


@pytest.mark.slow
def test_merging_shows_its_own_lines_and_nothing_else(
    workshop: Path, trained: subprocess.CompletedProcess[str]
):
    done = run("merge", workshop / "run" / "final", workshop / "merged")

    assert done.stderr == ""
    assert unknown_lines(done.stdout, MERGING_LINES) == []


@pytest.mark.slow
def test_answering_with_an_adapter_shows_where_the_answers_are(
    workshop: Path, trained: subprocess.CompletedProcess[str]
):
    answers = workshop / "answers.jsonl"

    done = run(
        *("chat", workshop / "run" / "final", "--input", workshop / "data.json"),
        *("--output", answers, "--max-new-tokens", "4"),
    )

    assert done.stdout == ""
    assert done.stderr == f"done: 6 answers in {answers}\n"


@pytest.mark.slow
def test_checking_shows_the_counts_alone(workshop: Path):
    done = run("check", workshop / "data.json", "--model", workshop / "base")

    assert done.stderr == ""
    assert done.stdout == "6 records: 0 errors, 0 warnings\n"


def test_checking_without_a_model_imports_neither_torch_nor_transformers(workshop: Path):
    program = (
        "import sys\n"
        "from vltrain.cli import app\n"
        f"app(['check', {str(workshop / 'data.json')!r}], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.stdout.splitlines()[-1] == "[]"
