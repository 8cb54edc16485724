"""How several machines meet: torchrun's flags, and the combinations that could not work."""

import pytest
from torch.distributed.run import config_from_args, parse_args

from vltrain.errors import VltrainError
from vltrain.training.machines import (
    Machines,
    refuse_beside_torchrun,
    refuse_without_gpus,
)

ALONE = ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


@pytest.mark.parametrize(
    ("machines", "flags"),
    [
        (Machines(), ALONE),
        (Machines(nnodes="1"), ALONE),
        (Machines(nnodes="1", node_rank=0), ALONE),
        (
            Machines(nnodes="2", rdzv_endpoint="first:29500"),
            ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=first:29500"],
        ),
        (
            Machines(nnodes="1", rdzv_endpoint="first:29500", rdzv_id="17"),
            ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=first:29500", "--rdzv-id=17"],
        ),
        (
            Machines(nnodes="4:4", rdzv_endpoint="[fe80::1]:1", rdzv_backend="c10d"),
            ["--nnodes=4", "--rdzv-backend=c10d", "--rdzv-endpoint=[fe80::1]:1"],
        ),
        (
            Machines(nnodes="2", node_rank=1, master_addr="first"),
            [
                *("--nnodes=2", "--rdzv-backend=static", "--rdzv-endpoint=first:29500"),
                "--node-rank=1",
            ],
        ),
        (
            Machines(nnodes="2", node_rank=0, rdzv_endpoint="first:7"),
            ["--nnodes=2", "--rdzv-backend=static", "--rdzv-endpoint=first:7", "--node-rank=0"],
        ),
    ],
    ids=lambda value: value.words() or "nothing" if isinstance(value, Machines) else "",
)
def test_machines_meet_by_flags_that_torchrun_reads(machines: Machines, flags: list[str]):
    assert machines.torchrun_flags() == flags
    config, _, _ = config_from_args(parse_args([*flags, "script.py"]))
    assert config.min_nodes == config.max_nodes == machines.count


MEETING = {"nnodes": "2", "rdzv_endpoint": "first:29500"}


@pytest.mark.parametrize(
    ("told", "what", "fix"),
    [
        ({"nnodes": "two"}, "is the number of machines", "--nnodes 2"),
        ({"nnodes": "0"}, "is the number of machines", "--nnodes 2"),
        ({"nnodes": "2:4"}, "keeps the number of machines", "--nnodes 4"),
        ({"nnodes": "4:2"}, "is the number of machines", "--nnodes 2"),
        ({"nnodes": "2"}, "nothing says where the machines meet", "--rdzv-endpoint FIRST:29500"),
        ({"nnodes": "2", "node_rank": 1}, "nothing says where", "--rdzv-endpoint FIRST:29500"),
        ({"nnodes": "2", "master_port": 7}, "nothing says where", "--rdzv-endpoint"),
        ({"rdzv_endpoint": "first:29500"}, "runs on several machines", "add --nnodes"),
        ({"node_rank": 0}, "runs on several machines", "add --nnodes"),
        ({**MEETING, "rdzv_endpoint": "first"}, "no machine and port", "first:29500"),
        ({**MEETING, "rdzv_endpoint": ":29500"}, "no machine and port", "first:29500"),
        ({**MEETING, "rdzv_endpoint": "first:"}, "no machine and port", "first:29500"),
        ({**MEETING, "rdzv_endpoint": "first:0"}, "no machine and port", "first:29500"),
        ({**MEETING, "rdzv_endpoint": "first:65536"}, "no machine and port", "first:29500"),
        ({**MEETING, "rdzv_endpoint": "tcp://first:1"}, "no machine and port", "first:29500"),
        ({**MEETING, "rdzv_endpoint": "fe80::1:29500"}, "no machine and port", "[brackets]"),
        ({**MEETING, "master_addr": "first"}, "two places", "keep --rdzv-endpoint"),
        ({**MEETING, "master_port": 29500}, "two places", "keep --rdzv-endpoint"),
        ({**MEETING, "rdzv_backend": "c10d", "node_rank": 1}, "c10d itself gives", "leave"),
        ({**MEETING, "rdzv_backend": "static"}, "which machine this is", "--node-rank 0"),
        ({**MEETING, "node_rank": 2}, "are 0 to 1", "--node-rank of its own"),
        ({**MEETING, "node_rank": -1}, "are 0 to 1", "--node-rank of its own"),
        ({"nnodes": "2", "master_addr": "first"}, "which machine this is", "--node-rank 0"),
        (
            {"nnodes": "2", "master_addr": "first:1", "node_rank": 0},
            "--master-addr is no machine",
            "--master-port 29500",
        ),
        (
            {"nnodes": "2", "master_addr": "first", "rdzv_backend": "c10d"},
            "c10d meets at --rdzv-endpoint",
            "--rdzv-endpoint first:29500",
        ),
    ],
    ids=lambda value: Machines(**value).words() if isinstance(value, dict) else "",
)
def test_what_could_not_meet_is_refused_with_the_way_out(told: dict, what: str, fix: str):
    machines = Machines(**told)

    with pytest.raises(VltrainError) as error:
        machines.torchrun_flags()

    said, _, way = str(error.value).partition("\n  fix: ")
    assert said.startswith(machines.words() + ": ")
    assert what in said
    assert fix in way


def test_a_machine_that_has_no_such_name_is_refused_before_anyone_waits_for_it():
    Machines().refuse_unknown_name()
    Machines(nnodes="2", rdzv_endpoint="localhost:1").refuse_unknown_name()
    Machines(nnodes="2", rdzv_endpoint="[::1]:1").refuse_unknown_name()
    nowhere = Machines(nnodes="2", rdzv_endpoint="nowhere.invalid:29500")
    with pytest.raises(VltrainError, match=r"this machine knows no nowhere\.invalid: "):
        nowhere.refuse_unknown_name()


def test_machines_without_gpus_are_refused():
    refuse_without_gpus(Machines(), None)
    refuse_without_gpus(Machines(**MEETING), 8)
    with pytest.raises(VltrainError, match="--gpus 8"):
        refuse_without_gpus(Machines(**MEETING), None)


def test_what_torchrun_has_done_is_not_asked_for_again():
    refuse_beside_torchrun(Machines())
    with pytest.raises(VltrainError, match="give these flags to torchrun"):
        refuse_beside_torchrun(Machines(nnodes="2"))
