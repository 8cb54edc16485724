"""What of the speed of answers `vltrain chat` decides: compiled steps, and Int4 bases."""

from pathlib import Path

import pytest
from tiny import write_conversations, write_gptq, write_qwen_vl
from transformers import CompileConfig
from typer.testing import CliRunner

import vltrain.workflows.terminal as terminal
from vltrain.cli import app
from vltrain.errors import VltrainError
from vltrain.evaluation.compiled import CompiledSteps
from vltrain.models import load_model, load_processor
from vltrain.workflows.dialogue import chat


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("speed") / "model")


@pytest.fixture
def red(tmp_path: Path) -> str:
    write_conversations(tmp_path)
    return str(tmp_path / "images" / "red.png")


def traced() -> CompileConfig:
    """Steps are traced as for a GPU, and run as they are."""
    how = CompileConfig(backend="eager", mode=None, dynamic=False)
    how._compile_all_devices = True
    return how


def type_in(*words: str, typed: str = ""):
    return CliRunner().invoke(app, ["chat", *words], input=typed)


@pytest.mark.slow
def test_a_conversation_is_compiled_where_it_can_be_and_says_the_same(folder, red, monkeypatch):
    words = (str(folder), "--image", red, "--max-new-tokens", "6")
    typed = "What?\nAnd then?\n/quit\n"
    plain = type_in(*words, "--no-compile", typed=typed).output
    monkeypatch.setattr(terminal, "reason_against", lambda _: None)
    monkeypatch.setattr(terminal, "CompiledSteps", lambda model: CompiledSteps(model, traced()))

    fast = type_in(*words, typed=typed).output

    notice = "the first answer waits for a compiler, the others are faster; see --no-compile\n"
    assert notice in fast
    assert fast.replace(notice, "") == plain


def test_one_question_is_compiled_only_if_a_word_says_so(folder, monkeypatch):
    monkeypatch.setattr(terminal, "reason_against", lambda _: None)
    monkeypatch.setattr(terminal, "CompiledSteps", lambda _: pytest.fail("it was compiled"))

    assert type_in(str(folder), "--prompt", "What?", "--max-new-tokens", "2").exit_code == 0


def test_compile_is_refused_without_a_gpu_before_the_model_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(terminal, "load_for_answers", lambda *_: pytest.fail("it was loaded"))

    result = type_in(str(folder), "--prompt", "What?", "--compile")

    assert isinstance(result.exception, VltrainError)
    assert "there is no NVIDIA GPU here" in str(result.exception)


def test_a_file_of_questions_is_not_compiled(folder):
    words = ("--input", "q.json", "--output", "a.jsonl", "--compile")

    assert type_in(str(folder), *words).exit_code == 2


@pytest.mark.slow
def test_python_keeps_compiled_steps_from_call_to_call(folder, red):
    model, processor = load_model(folder), load_processor(folder)
    steps, settings = CompiledSteps(model, traced()), {"max_new_tokens": 6}

    _, plain = chat(model, processor, "What?", images=[red], **settings)
    _, plain = chat(model, processor, "And then?", plain, **settings)
    _, fast = chat(model, processor, "What?", images=[red], steps=steps, **settings)
    _, fast = chat(model, processor, "And then?", fast, steps=steps, **settings)

    assert fast == plain
    assert steps._cache.get_max_length() == 2048 + 6


@pytest.mark.slow
def test_an_int4_base_answers(tmp_path, red):
    write_gptq(tmp_path / "packed")

    result = type_in(str(tmp_path / "packed"), "--prompt", "What?", "--image", red)

    assert result.exit_code == 0
    assert result.output.strip()
