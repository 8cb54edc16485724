"""What the user types: help, version, exit codes, and which words reach which workflow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vltrain.workflows.cache
import vltrain.workflows.chat
import vltrain.workflows.convert
import vltrain.workflows.demo
import vltrain.workflows.estimate
import vltrain.workflows.export
import vltrain.workflows.inspect
import vltrain.workflows.merge
import vltrain.workflows.preview
import vltrain.workflows.profile
import vltrain.workflows.quantize
import vltrain.workflows.stats
import vltrain.workflows.train
from vltrain.cli import app, main
from vltrain.config import load_recipe
from vltrain.data.coco import CATEGORY_QUESTION
from vltrain.data.pictures import Pictures
from vltrain.data.refcoco import EXPRESSION_QUESTION
from vltrain.errors import GpuMemoryError, NotFiniteError, Stopped, VltrainError
from vltrain.evaluation.generation import Decoding
from vltrain.workflows.quantize import Calibration

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


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The calls that reach a workflow: its name, positional and named arguments."""
    calls: list[tuple] = []
    for module, name in (
        (vltrain.workflows.train, "train"),
        (vltrain.workflows.merge, "merge"),
        (vltrain.workflows.export, "export"),
        (vltrain.workflows.cache, "cache_features"),
        (vltrain.workflows.chat, "answer_file"),
        (vltrain.workflows.quantize, "quantize"),
        (vltrain.workflows.inspect, "check"),
        (vltrain.workflows.convert, "convert_coco_file"),
        (vltrain.workflows.convert, "convert_refcoco_file"),
        (vltrain.workflows.convert, "convert_llava_file"),
        (vltrain.workflows.preview, "preview"),
        (vltrain.workflows.stats, "stats"),
        (vltrain.workflows.estimate, "estimate_run"),
        (vltrain.workflows.profile, "profile_steps"),
        (vltrain.workflows.demo, "write_demo"),
        (vltrain.workflows.demo, "score_demo"),
    ):

        def record(*args, _name=name, **kwargs) -> int:
            calls.append((_name, args, kwargs))
            return 0

        monkeypatch.setattr(module, name, record)
    return calls


def type_in(*words: str) -> int:
    return CliRunner().invoke(app, list(words), catch_exceptions=False).exit_code


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


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_training_gets_the_recipe_of_file_flags_and_overrides(
    called: list[tuple], method: str, tmp_path: Path
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("trainer:\n  max_steps: 3\n")

    code = type_in(
        *(method, str(recipe), "--model", "base", "--data", "a.json", "--data", "b.json"),
        *("--output", "runs/a", "--set", "data.max_length=64", "--set", "trainer.seed=1"),
    )

    expected = load_recipe(
        recipe,
        method=method,
        model="base",
        data=[Path("a.json"), Path("b.json")],
        output=Path("runs/a"),
        overrides=["data.max_length=64", "trainer.seed=1"],
    )
    assert code == 0
    assert called == [("train", (expected,), {})]


def test_export_gets_model_out_and_layout(called: list[tuple]):
    type_in("export", "runs/a", "out", "--to", "original", "--max-shard-size", "500MB")

    assert called == [
        ("export", ("runs/a", Path("out"), "original"), {"max_shard_size": "500MB"}),
    ]


def test_merge_gets_adapter_out_and_base(called: list[tuple]):
    type_in("merge", "runs/a/final", "merged", "--base", "elsewhere", "--with", "runs/b=final=0.5")

    assert called == [
        (
            "merge",
            (Path("runs/a/final"), Path("merged")),
            {
                "base": "elsewhere",
                "others": [(Path("runs/b=final"), 0.5)],
                "into": "auto",
                "low_memory": False,
            },
        ),
    ]


def test_chat_gets_model_input_and_output(called: list[tuple]):
    type_in("chat", "org/name@v1", "--input", "q.json", "--output", "a.jsonl", "--batch-size", "4")

    assert called == [
        (
            "answer_file",
            ("org/name@v1", Path("q.json"), Path("a.jsonl")),
            {
                "adapter": None,
                "batch_size": 4,
                "decoding": Decoding(512),
                "seed": 0,
                "format": "auto",
                "pictures": Pictures(),
            },
        )
    ]


def test_quantize_gets_model_and_data(called: list[tuple]):
    words = ("--data", "a.json", "--data", "b.jsonl", "--samples", "64")

    assert type_in("quantize", "org/name", "out", *words, "--image-root", "pics") == 0
    data = Calibration(
        (Path("a.json"), Path("b.jsonl")), samples=64, pictures=Pictures(Path("pics"))
    )
    assert called == [("quantize", ("org/name", Path("out"), data), {})]


def test_pictures_are_downloaded_only_if_a_word_says_so(called: list[tuple]):
    type_in("check", "a.json", "--image-root", "pics")
    type_in("check", "a.json", "--allow-urls")

    without, allowed = (named["pictures"] for _, _, named in called)
    assert without == Pictures(Path("pics"))
    assert allowed.downloads is not None
    assert not allowed.downloads.allow_private


def test_convert_reads_annotations_of_three_kinds(called: list[tuple]):
    type_in("convert", "coco", "a.json", "-o", "t.json", "--images", "pictures")
    type_in("convert", "refcoco", "a.json", "--output", "t.json")
    type_in("convert", "llava", "a.json", "-o", "t.json")

    files = (Path("a.json"), Path("t.json"))
    assert called == [
        (
            "convert_coco_file",
            files,
            {"images": Path("pictures"), "question": CATEGORY_QUESTION},
        ),
        (
            "convert_refcoco_file",
            files,
            {
                "images": None,
                "boxes": "xywh",
                "splits": (),
                "instances": None,
                "question": EXPRESSION_QUESTION,
            },
        ),
        ("convert_llava_file", files, {"images": None}),
    ]


def test_convert_takes_the_form_of_boxes_splits_and_a_question(called: list[tuple]):
    type_in(
        *("convert", "refcoco", "a.json", "-o", "t.json", "--boxes", "xyxy", "--split", "train"),
        *("--split", "val", "--instances", "i.json", "--question", "Find {expression}."),
    )

    assert called[0][2] == {
        "images": None,
        "boxes": "xyxy",
        "splits": ["train", "val"],
        "instances": Path("i.json"),
        "question": "Find {expression}.",
    }


@pytest.mark.parametrize("words", [("coco", "a.json"), ("coco", "-o", "t.json"), ("voc", "a.xml")])
def test_convert_without_its_words_is_a_usage_error(called: list[tuple], words: tuple[str, ...]):
    assert type_in("convert", *words) == 2
    assert called == []


def test_demo_writes_or_scores(called: list[tuple]):
    type_in("demo", "demo")
    type_in("demo", "demo", "--score")

    assert called == [("write_demo", (Path("demo"),), {}), ("score_demo", (Path("demo"),), {})]


def test_preview_gets_data_model_page_and_choice(called: list[tuple]):
    type_in("preview", "a.json", "b.json", "--model", "base", "-o", "p.html", "--samples", "3")

    named = {
        "model": "base",
        "samples": 3,
        "seed": 0,
        "format": "auto",
        "labels": "assistant",
        "pictures": Pictures(),
        "max_length": None,
    }
    assert called == [("preview", ([Path("a.json"), Path("b.json")], Path("p.html")), named)]


@pytest.mark.parametrize(
    "words",
    [
        ("check", "a.json"),
        ("stats", "a.json", "--model", "base"),
        ("preview", "a.json", "--model", "base", "-o", "p.html"),
        ("chat", "base", "--input", "a.json", "--output", "b.jsonl"),
    ],
    ids=lambda words: words[0],
)
def test_what_reads_data_takes_its_format(called: list[tuple], words: tuple[str, ...]):
    type_in(*words, "--format", "swift")

    assert called[0][2]["format"] == "swift"


def test_cache_gets_what_a_run_would(called: list[tuple], tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    words = ("--method", "full", "--model", "base", "--data", "a.json", "--set", "dtype=bf16")

    assert type_in("cache", str(file), *words) == 0

    given = {"method": "full", "model": "base", "data": [Path("a.json")]}
    assert called == [("cache_features", (file,), given | {"overrides": ["dtype=bf16"]})]


def test_profile_gets_method_lengths_and_model(called: list[tuple]):
    words = ("--method", "full", "--model", "base", "--random", "--lengths", "384,2048")
    more = ("--steps", "3", "--output", "p.json", "--set", "compile=auto")

    assert type_in("profile", *words, *more) == 0

    given = {"method": "full", "model": "base", "random": True, "lengths": [384, 2048], "steps": 3}
    given |= {"overrides": ["compile=auto"], "output": Path("p.json")}
    assert called == [("profile_steps", (None,), given)]


def test_profile_without_words_measures_the_lengths_of_the_original(called: list[tuple]):
    assert type_in("profile") == 0

    assert called[0][2]["lengths"] == [384, 512, 1024, 2048, "mixed"]
    assert called[0][2]["model"] is None


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "is no device"),
        ("cuda:x", "is no device"),
        ("cuda:99", "this machine has no such GPU"),
    ],
)
@pytest.mark.parametrize(
    "words", [("profile",), ("quantize", "org/name", "out", "--data", "a.json")], ids=lambda w: w[0]
)
def test_a_device_that_is_not_there_is_refused(
    called: list[tuple], monkeypatch: pytest.MonkeyPatch, words, device, message
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    with pytest.raises(VltrainError, match=f"--device {device}: {message}"):
        type_in(*words, "--device", device)
    assert called == []


def test_on_the_cpu_no_gpu_is_seen(called: list[tuple], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    type_in("quantize", "org/name", "out", "--data", "a.json", "--device", "cpu")

    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_profile_refuses_what_is_no_length(called: list[tuple]):
    with pytest.raises(VltrainError, match="is no list of numbers"):
        type_in("profile", "--lengths", "a,b")
    assert called == []


def test_estimate_gets_recipe_method_and_gpu(called: list[tuple], tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    words = ("--method", "full", "--set", "data.max_length=512", "--memory-gib", "24", "--json")

    assert type_in("estimate", str(file), *words) == 0
    given = {
        "method": "full",
        "model": None,
        "data": (),
        "overrides": ["data.max_length=512"],
        "pictures": 1,
        "memory_gib": 24.0,
        "gpus": 1,
        "probe": True,
        "as_json": True,
    }
    assert called == [("estimate_run", (file,), given)]


def test_stats_gets_data_model_and_limit(called: list[tuple]):
    type_in("stats", "a.json", "--model", "base", "--max-length", "64", "--json")

    named = {
        "model": "base",
        "format": "auto",
        "labels": "assistant",
        "pictures": Pictures(),
        "max_length": 64,
        "as_json": True,
    }
    assert called == [("stats", ([Path("a.json")],), named)]


@pytest.mark.parametrize("words", [("preview", "a.json", "-o", "p.html"), ("stats", "a.json")])
def test_counting_tokens_without_a_model_is_a_usage_error(called: list[tuple], words):
    assert type_in(*words) == 2
    assert called == []


def test_check_exits_with_the_code_of_its_findings(tmp_path: Path):
    clean = tmp_path / "clean.json"
    turns = '[{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]'
    clean.write_text(f'[{{"id": "x", "conversations": {turns}}}]')
    broken = tmp_path / "broken.json"
    broken.write_text("[{")

    assert type_in("check", str(clean)) == 0
    assert type_in("check", str(clean), str(broken), "--json") == 1
