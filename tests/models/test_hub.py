"""Models by name: what comes down from a stand-in of the hub, and what happens without one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stand_in import StandInHub

import vltrain.models.hub
from vltrain.errors import VltrainError
from vltrain.models.hub import ResolvedModel, resolve_model

FIRST, SECOND, BINARY, EMPTY = "1" * 40, "2" * 40, "3" * 40, "4" * 40

DESCRIPTION = {
    "config.json": b'{"model_type": "qwen"}',
    "qwen.tiktoken": b"IQ== 0\n",
    "tokenizer_config.json": b"{}",
}
UNWANTED = {
    "modeling_qwen.py": b"raise SystemExit",
    "tokenization_qwen.py": b"raise SystemExit",
    "README.md": b"# a model",
    "assets/logo.safetensors": b"picture",
}
SAFETENSORS = {
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
    "model.safetensors.index.json": b"{}",
}
BIN = {
    "pytorch_model-00001-of-00001.bin": b"pickled",
    "pytorch_model.bin.index.json": b"{}",
}

# The address and the cache of the hub are read when huggingface_hub is imported: each question
# is asked in a process of its own, of the module alone, which needs no torch.
ASK = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("hub", sys.argv[1])
hub = importlib.util.module_from_spec(spec)
sys.modules["hub"] = hub
spec.loader.exec_module(hub)
answers = []
for name in sys.argv[3:]:
    try:
        model = hub.resolve_model(name, weights=sys.argv[2] == "weights")
    except hub.VltrainError as error:
        answers.append({"error": str(error)})
    else:
        files = sorted(p.name for p in model.path.iterdir())
        answers.append({"name": model.name, "revision": model.revision, "files": files})
print(json.dumps(answers))
"""


@pytest.fixture
def hub():
    standing_in = StandInHub(
        commits={
            FIRST: DESCRIPTION | UNWANTED | SAFETENSORS | BIN,
            SECOND: DESCRIPTION | UNWANTED | {"model.safetensors": b"all"},
            BINARY: DESCRIPTION | UNWANTED | BIN,
            EMPTY: DESCRIPTION | UNWANTED,
        },
        revisions={
            ("org/model", "main"): SECOND,
            ("org/model", "v1"): FIRST,
            ("org/model", SECOND): SECOND,
            ("org/model", FIRST): FIRST,
            ("org/binary", "main"): BINARY,
            ("org/binary", BINARY): BINARY,
            ("org/empty", "main"): EMPTY,
            ("org/empty", EMPTY): EMPTY,
        },
        gated=frozenset({"org/gated"}),
    )
    standing_in.address = standing_in.start()
    yield standing_in
    standing_in.stop()


def ask(
    cache: Path, address: str, *names: str, offline: bool = False, weights: bool = True
) -> list[dict]:
    """What `resolve_model` says to each name in a fresh process."""
    environment = {key: os.environ[key] for key in ("PATH", "SYSTEMROOT") if key in os.environ}
    environment |= {
        "HF_ENDPOINT": address,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            ASK,
            vltrain.models.hub.__file__,
            "weights" if weights else "",
            *names,
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_a_name_brings_down_weights_and_descriptions_but_no_code(hub, tmp_path):
    newest, first = ask(tmp_path, hub.address, "org/model", "org/model@v1")

    assert newest["revision"] == SECOND
    assert newest["files"] == sorted([*DESCRIPTION, "model.safetensors"])
    assert first == {
        "name": "org/model@v1",
        "revision": FIRST,
        "files": sorted([*DESCRIPTION, *SAFETENSORS]),
    }
    assert hub.asked_files() == {*DESCRIPTION, *SAFETENSORS, "model.safetensors"}


def test_what_reads_data_brings_down_no_weights_and_what_trains_adds_them(hub, tmp_path):
    (described,) = ask(tmp_path, hub.address, "org/model", weights=False)
    assert described["files"] == sorted(DESCRIPTION)
    assert hub.asked_files() == set(DESCRIPTION)

    (whole,) = ask(tmp_path, hub.address, f"org/model@{described['revision']}")
    assert whole["files"] == sorted([*DESCRIPTION, "model.safetensors"])


def test_bin_shards_come_down_where_there_are_no_safetensors(hub, tmp_path):
    (answer,) = ask(tmp_path, hub.address, "org/binary")

    assert answer["files"] == sorted([*DESCRIPTION, *BIN])
    assert not any(name.endswith(".py") for name in hub.asked_files())


def test_a_cached_name_needs_no_hub(hub, tmp_path):
    online = ask(tmp_path, hub.address, "org/model@v1", "org/binary")
    hub.asked.clear()

    offline = ask(tmp_path, hub.address, "org/model@v1", "org/binary", offline=True)

    assert offline == online
    assert hub.asked == []


@pytest.mark.slow  # the client knocks several times before it gives up
def test_a_cached_commit_needs_no_hub_and_no_list_of_its_files(hub, tmp_path):
    online = ask(tmp_path, hub.address, "org/model@v1")
    shutil.rmtree(tmp_path / "hub" / "models--org--model" / "trees", ignore_errors=True)
    hub.stop()

    refused = ask(tmp_path, hub.address, f"org/model@{FIRST}")
    offline = ask(tmp_path, hub.address, f"org/model@{FIRST}", offline=True)

    for (answer,) in (refused, offline):
        assert answer["files"] == online[0]["files"]
        assert answer["revision"] == FIRST


def test_a_cached_name_answers_when_the_hub_refuses_connections(hub, tmp_path):
    online = ask(tmp_path, hub.address, "org/model")
    hub.stop()

    again, missing = ask(tmp_path, hub.address, "org/model", "org/other")

    assert [again] == online
    assert "the hub cannot be reached" in missing["error"]


def test_offline_a_name_that_is_not_cached_says_what_to_download(hub, tmp_path):
    (answer,) = ask(tmp_path, hub.address, "org/model@v1", offline=True)

    assert f"{tmp_path / 'hub'} does not have the model whole" in answer["error"]
    assert "hf download org/model --revision v1 --exclude '*.py'" in answer["error"]
    assert hub.asked == []


def test_names_that_the_hub_does_not_give_are_explained(hub, tmp_path):
    names = ["org/nobody", "org/model@v9", "org/gated", "org/empty"]

    unknown, revision, gated, empty = ask(tmp_path, hub.address, *names)

    assert "no such folder, and no such model on the hub" in unknown["error"]
    assert "org/model@v9: the model has no revision v9" in revision["error"]
    assert f"accept them at {hub.address}/org/gated" in gated["error"]
    assert "no weights of it are there" in empty["error"]


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert resolve_model(str(tmp_path)) == ResolvedModel(tmp_path, None, str(tmp_path))


@pytest.mark.parametrize("name", ["./qwen", "/no/such/folder", "qwen", "a/b/c", "a/b@", "../x/y"])
def test_a_folder_that_is_not_there_is_an_error(name):
    with pytest.raises(VltrainError, match="there is no such folder"):
        resolve_model(name)


def test_a_report_names_a_folder_without_its_place_and_a_model_of_the_hub_whole(tmp_path):
    assert ResolvedModel(tmp_path, None, "/home/me/mine").public_name == "mine"
    assert ResolvedModel(tmp_path, "abc", "Qwen/Qwen-VL").public_name == "Qwen/Qwen-VL"
