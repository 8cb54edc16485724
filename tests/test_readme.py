"""The README's commands run as they stand there, on a tiny base in the place of the real one."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import write_qwen_vl

from vltrain.config import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "Qwen/Qwen-VL-Chat"
WHOLE_JOBS = ("make demo", "make test")  # these run the tests themselves, or take minutes


def blocks(*languages: str) -> list[str]:
    """The contents of the README's fenced blocks."""
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```$", README, re.M | re.S)


def commands() -> list[str]:
    lines = "".join(blocks("bash", "console")).splitlines()
    return [line for line in lines if line not in WHOLE_JOBS]


@pytest.fixture
def workshop(tmp_path: Path) -> Path:
    """A folder such as the README speaks of: its data and pictures, recipes, a base."""
    write_qwen_vl(tmp_path / "base")
    (data,) = blocks("json")
    (tmp_path / "train.json").write_text(data, encoding="utf-8")
    (tmp_path / "questions.json").write_text(data, encoding="utf-8")
    (tmp_path / "images").mkdir()
    for source in re.findall("<img>(.*?)</img>", data):
        Image.new("RGB", (80, 60), "tomato").save(tmp_path / source)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    for recipe in (tmp_path / "recipes").glob("*.yaml"):
        recipe.write_text(recipe.read_text(encoding="utf-8").replace(MODEL, "base"))
    return tmp_path


def test_every_fenced_block_is_of_a_kind_that_is_tested():
    fences = re.findall(r"^```(\w*)$", README, re.M)

    assert set(fences) == {"bash", "console", "json", "python", "yaml", ""}


@pytest.mark.parametrize("section", blocks("yaml"))
def test_every_section_of_a_recipe_is_read(tmp_path: Path, section: str):
    (tmp_path / "recipe.yaml").write_text(f"model: base\noutput: run\n{section}", encoding="utf-8")

    assert load_recipe(tmp_path / "recipe.yaml", method="lora").data.files


def test_every_file_that_the_readme_names_is_there():
    linked = re.findall(r"\]\(([^)#]+)\)", README)
    recipes = [f"recipes/{name}" for name in re.findall(r"`(?:recipes/)?(\w+\.yaml)`", README)]
    recipes = [name for name in recipes if name != "recipes/recipe.yaml"]  # a run's own

    assert [name for name in linked + recipes if not (ROOT / name).exists()] == []


def test_the_lines_of_python_run(workshop: Path, monkeypatch: pytest.MonkeyPatch):
    (workshop / "demo" / "images").mkdir(parents=True)
    (workshop / "demo" / "merged").symlink_to(workshop / "base")
    (script,) = blocks("python")
    for picture in re.findall(r'"(\S+\.png)"', script):
        Image.new("RGB", (80, 60), "tomato").save(workshop / picture)

    monkeypatch.chdir(workshop)

    said: dict[str, Any] = {}
    exec(script, said)

    assert [query.rpartition("\n")[2] for query, _ in said["history"]] == [
        "Read the digits from left to right.",
        "Where are the digits?",
    ]
    assert said["history"][-1][1] == said["answer"]


@pytest.mark.slow
@pytest.mark.skipif(
    not (Path(sys.prefix) / "bin" / "activate").is_file(), reason="Python is not that of a venv"
)
def test_the_commands_run_in_their_order(workshop: Path):
    (workshop / ".venv").symlink_to(sys.prefix)
    script = "\n".join(commands()).replace(MODEL, "base")
    script = script.replace("make install", f"make --dry-run -C '{ROOT}' install")

    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=workshop,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=600,
    )

    assert done.returncode == 0, done.stderr
    answers = (workshop / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [(row["id"], row["turn"]) for row in map(json.loads, answers)] == [
        ("kitchen-1", 1),
        ("kitchen-1", 3),
        ("kitchen-2", 1),
        ("no-picture", 1),
    ]
    assert (workshop / "runs" / "second" / "final" / "adapter_config.json").is_file()
