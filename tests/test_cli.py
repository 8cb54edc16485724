"""What the user types: help, version, usage errors and exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import type_in

import vltrain.workflows.merge
from vltrain.cli import main
from vltrain.errors import GpuMemoryError, NotFiniteError, Stopped, VltrainError

COMMANDS = (
    "full",
    "lora",
    "qlora",
    "merge",
    "export",
    "cache",
    "chat",
    "check",
    "preview",
    "stats",
    "estimate",
    "profile",
    "demo",
    "convert",
)


def run_module(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vltrain", *words], capture_output=True, text=True)


def test_help_lists_every_command():
    done = run_module("--help")

    assert done.returncode == 0
    for command in COMMANDS:
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str):
    assert type_in(command, "--help") == 0


def test_help_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from vltrain.cli import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'yaml', 'PIL', 'rich'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.stdout.splitlines()[-1] == "[]"


def test_the_version_is_said():
    assert run_module("--version").stdout == "vltrain 0.1.0\n"


def test_no_command_is_a_usage_error():
    assert run_module().returncode == 2


def test_an_unknown_option_is_a_usage_error():
    assert run_module("lora", "--rank", "8").returncode == 2


def test_a_mistake_of_the_user_is_a_message_and_no_traceback(tmp_path: Path):
    done = run_module("lora", str(tmp_path / "none.yaml"))

    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path / 'none.yaml'}: the recipe cannot be read")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("kind", "code"), [(VltrainError, 1), (GpuMemoryError, 3), (NotFiniteError, 4)]
)
def test_the_console_entry_turns_an_error_into_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys, kind: type[VltrainError], code: int
):
    def fail(*_: object, **__: object) -> None:
        raise kind.at("data.json#3", what="is broken", fix="mend it")

    monkeypatch.setattr(vltrain.workflows.merge, "merge", fail)
    monkeypatch.setattr(sys, "argv", ["vltrain", "merge", "a", "b"])

    with pytest.raises(SystemExit) as exit_:
        main()

    assert exit_.value.code == code
    assert capsys.readouterr().err == "error: data.json#3: is broken\n  fix: mend it\n"


def test_a_run_that_was_stopped_exits_with_75_and_calls_it_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys
):
    def stop(*_: object, **__: object) -> None:
        raise Stopped("stopped after step 5")

    monkeypatch.setattr(vltrain.workflows.merge, "merge", stop)
    monkeypatch.setattr(sys, "argv", ["vltrain", "merge", "a", "b"])

    with pytest.raises(SystemExit) as exit_:
        main()

    assert exit_.value.code == 75
    assert capsys.readouterr().err == "stopped after step 5\n"


def test_check_exits_with_the_code_of_its_findings(tmp_path: Path):
    clean = tmp_path / "clean.json"
    turns = '[{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]'
    clean.write_text(f'[{{"id": "x", "conversations": {turns}}}]')
    broken = tmp_path / "broken.json"
    broken.write_text("[{")

    assert type_in("check", str(clean)) == 0
    assert type_in("check", str(clean), str(broken), "--json") == 1
