"""What the end of a run's processes means to the launcher."""

import signal
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousTimeoutError

import vltrain.training.launch as launching
from vltrain.errors import Stopped, VltrainError
from vltrain.training.machines import Machines

MACHINES = Machines(nnodes="2", rdzv_endpoint="first:29500")


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """Where processes leave the exit code of the run."""
    (tmp_path / "told").touch()
    return tmp_path / "told"


def code_of(end: BaseException | None, told: Path) -> int:
    def run() -> None:
        if end is not None:
            raise end

    return launching._exit_code(run, told, 8, MACHINES)


def failed(exit_code: int) -> ChildFailedError:
    return ChildFailedError("vltrain", {3: ProcessFailure(3, 17, exit_code, "none")})


@pytest.mark.parametrize("code", [1, 2, 3, 4, 75])
def test_the_exit_code_of_a_process_is_that_of_the_run(told: Path, code: int, capsys):
    assert code_of(failed(code), told) == code
    assert capsys.readouterr().err == ""  # the process has said why


def test_all_done_is_0(told: Path):
    assert code_of(None, told) == 0


def test_a_process_that_a_signal_ended_is_named(told: Path, capsys):
    assert code_of(failed(-signal.SIGKILL), told) == 128 + 9
    assert "process 3 of 16 was ended by SIGKILL" in capsys.readouterr().err


def test_a_killed_process_is_the_cause_where_another_ended_in_the_same_second(told: Path, capsys):
    ends = {
        rank: ProcessFailure(rank, 17, code, "none") for rank, code in enumerate((1, -9, -6, 1))
    }

    assert code_of(ChildFailedError("vltrain", ends), told) == 128 + 9
    assert "process 1 of 16 was ended by SIGKILL" in capsys.readouterr().err


@pytest.mark.parametrize("code", [3, 75])
def test_a_run_that_was_stopped_ends_as_its_processes_said(told: Path, code: int):
    told.write_text(str(code))

    assert code_of(SignalException("", signal.SIGTERM), told) == code


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 75), (signal.SIGHUP, 128 + 1)]
)
def test_a_run_that_had_no_time_to_save_goes_on_from_the_checkpoint_before(
    told: Path, number: signal.Signals, code: int
):
    assert code_of(SignalException("", number), told) == code


@pytest.mark.parametrize(
    "end", [RendezvousConnectionError("lost"), RendezvousTimeoutError(), DistNetworkError("lost")]
)
def test_machines_that_do_not_meet_are_an_error_with_the_way_out(
    told: Path, end: Exception, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launching, "_started", lambda: False)

    with pytest.raises(VltrainError, match="have not met: ") as error:
        code_of(end, told)
    assert str(error.value).startswith("--nnodes 2 --rdzv-endpoint first:29500: ")


def test_why_machines_have_not_met_is_said_by_what_is_behind_it(
    told: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launching, "_started", lambda: False)
    error = RendezvousConnectionError("see inner exception")
    error.__cause__ = DistNetworkError("timed out while connecting to (first, 29500)\nframe #0")

    with pytest.raises(VltrainError, match=r"not met: timed out while connecting .*29500\)\n  fix"):
        code_of(error, told)


def test_a_run_that_ends_elsewhere_ends_here_with_the_code_that_was_heard(
    told: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(launching, "_started", lambda: True)

    assert code_of(RendezvousConnectionError("lost"), told) == 1
    assert "the run has ended on another machine" in capsys.readouterr().err
    told.write_text("75")
    assert code_of(RendezvousConnectionError("lost"), told) == Stopped.exit_code
