"""Runs recipes in forks of one process, and kills them: a fork starts at once, Python does not.

Nothing has been computed in the process that forks, so a fork is as good as a new interpreter.
Each line of stdin is a request as `Killer.run` makes it; each line of stdout an answer.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.0005
DEADLINE_SECONDS = 400  # of one run, on a busy machine


class Killer:
    """Starts such a process, and asks it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def run(
        self,
        recipe: Path,
        out: Path,
        *,
        send: signal.Signals = signal.SIGKILL,
        step: int | None = None,
        while_saving: bool = False,
        delay_seconds: float = 0.0,
        file_limit: int | None = None,
        processes: int = 1,
        grouped: bool = False,
    ) -> tuple[int, str]:
        """Run a recipe, and send it and all its processes a signal.

        Args:
            recipe: its file, with its method.
            out: its run directory.
            send: which signal.
            step: send after this step was logged; None: never.
            while_saving: then wait until a checkpoint is being written.
            delay_seconds: then wait so long.
            file_limit: no file may become larger than so many bytes.
            processes: how many form the run.
            grouped: tell even a single one what torchrun tells its processes.

        Returns:
            The exit code, negative for a signal as `subprocess` has it, and what was said.
        """
        request = {"recipe": str(recipe), "out": str(out), "send": send, "step": step}
        request |= {"while_saving": while_saving, "delay": delay_seconds, "limit": file_limit}
        request |= {"processes": processes, "grouped": grouped or processes > 1}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["code"], answer["said"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


def train_here(request: dict[str, Any], said: Path) -> None:
    """What a fork does: all of it, and never returns."""
    import resource

    from vltrain.config import read_resolved
    from vltrain.errors import Stopped, VltrainError
    from vltrain.workflows.train import train

    os.setsid()
    others = form_group(request["processes"]) if request["grouped"] else []
    with said.open("a") as file:  # several processes write to it
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 0
    try:
        if request["limit"] is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"],) * 2)
        train(read_resolved(Path(request["recipe"])))
    except (VltrainError, Stopped) as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    for other in others:
        os.waitpid(other, 0)
    os._exit(code)


def form_group(processes: int) -> list[int]:
    """Fork the other processes of a run; each gets its part of what torchrun would tell it.

    Returns:
        In the first process the ids of the others, in those none.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    told |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    os.environ |= told | {"RANK": "0", "LOCAL_RANK": "0"}
    others = []
    for rank in range(1, processes):
        other = os.fork()
        if other == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return []
        others.append(other)
    return others


def last_step(out: Path) -> int:
    """The step of the last whole line of metrics.jsonl."""
    try:
        lines = (out / "metrics.jsonl").read_text().split("\n")[:-1]
        return json.loads(lines[-1])["step"] if lines else 0
    except FileNotFoundError:
        return 0


def wait_and_kill(child: int, request: dict[str, Any]) -> int:
    """The child's exit code, after it was sent what it was to be sent."""
    out = Path(request["out"])
    started = time.monotonic()
    began = (out / "metrics.jsonl").stat().st_ino if (out / "metrics.jsonl").exists() else 0
    sent = request["step"] is None
    while time.monotonic() < started + DEADLINE_SECONDS:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if not sent:
            # A run that resumes writes metrics.jsonl anew first, without what it will repeat.
            there = (out / "metrics.jsonl").exists()
            anew = there and (not began or (out / "metrics.jsonl").stat().st_ino != began)
            due = anew and last_step(out) >= request["step"]
            if due and (not request["while_saving"] or (out / "checkpoint.partial").exists()):
                time.sleep(request["delay"])
                os.killpg(child, request["send"])
                sent = True
        time.sleep(POLL_SECONDS)
    os.killpg(child, signal.SIGKILL)
    raise TimeoutError(f"{request} took more than {DEADLINE_SECONDS} s")


def main() -> None:
    import torch

    import vltrain.workflows.train  # noqa: F401, before the first fork

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        said = Path(request["out"] + ".said")
        said.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            train_here(request, said)
        code = wait_and_kill(child, request)
        print(json.dumps({"code": code, "said": said.read_text(errors="replace")}), flush=True)


if __name__ == "__main__":
    main()
