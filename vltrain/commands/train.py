"""`vltrain full`, `lora` and `qlora`: one run, here, on several GPUs or on several machines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from vltrain.commands.options import Data, Gpus, Model, Output, Overrides, RecipePath
from vltrain.training.machines import (
    Backend,
    Machines,
    refuse_beside_torchrun,
    refuse_without_gpus,
)
from vltrain.training.processes import leave_group, started_by_torchrun, watch_others

if TYPE_CHECKING:
    from vltrain.config import Method

SEVERAL = "Several machines, each with the same command"
TORCHRUN_SPELLING = {"token_normalize_func": lambda word: word.replace("_", "-")}
"""torchrun knows its flags with hyphens and with underscores."""


class TrainCommand(TyperCommand):
    """A command whose help lists the options for several machines under a heading of their own."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
            title = getattr(parameter, "rich_help_panel", None) or kind
            if (row := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(title, []).append(row)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


def _several(name: str, help_: str, **settings: Any) -> Any:
    return typer.Option(name, help=help_, rich_help_panel=SEVERAL, **settings)


Nnodes = Annotated[str | None, _several("--nnodes", "How many machines.", metavar="N")]
RdzvEndpoint = Annotated[
    str | None,
    _several(
        "--rdzv-endpoint",
        "Where they meet: one of them, and a free port of it. The same on all.",
        metavar="HOST:PORT",
    ),
]
RdzvId = Annotated[
    str | None,
    _several("--rdzv-id", "The run's name there, where several runs share an endpoint."),
]
RdzvBackend = Annotated[
    Backend | None,
    _several("--rdzv-backend", "c10d, unless --node-rank or --master-addr is given: static."),
]
NodeRank = Annotated[
    int | None,
    _several("--node-rank", "static: which of the machines this is, from 0 on.", metavar="N"),
]
MasterAddr = Annotated[
    str | None, _several("--master-addr", "static: the machine of node rank 0.", metavar="HOST")
]
MasterPort = Annotated[
    int | None, _several("--master-port", "static: a free port of it [29500].", metavar="PORT")
]


METHODS: dict["Method", str] = {
    "full": """Train a model's own weights.

    All but the vision tower learns, unless the recipe says otherwise.
    """,
    "lora": "Train low-rank adapters on a frozen base.",
    "qlora": """Train low-rank adapters on a base held in 4 bits.

    A bf16 base is quantized while it is read; one that GPTQ has packed is taken as it is.
    """,
}


def training_command(method: "Method") -> Callable[..., None]:
    """The command that trains by a method; all of them take the same words."""

    def train(
        recipe: RecipePath = None,
        model: Model = None,
        data: Data = None,
        output: Output = None,
        gpus: Gpus = None,
        overrides: Overrides = None,
        nnodes: Nnodes = None,
        rdzv_endpoint: RdzvEndpoint = None,
        rdzv_id: RdzvId = None,
        rdzv_backend: RdzvBackend = None,
        node_rank: NodeRank = None,
        master_addr: MasterAddr = None,
        master_port: MasterPort = None,
    ) -> None:
        machines = Machines(
            nnodes, node_rank, rdzv_endpoint, rdzv_backend, rdzv_id, master_addr, master_port
        )
        given = Given(recipe, model, data or (), output, overrides or ())
        _train(method, given, gpus, machines)

    train.__doc__ = METHODS[method]
    return train


@dataclass(frozen=True)
class Given:
    """What a command was told of its run."""

    recipe: Path | None
    model: str | None
    data: Sequence[Path]
    output: Path | None
    overrides: Sequence[str]

    def words(self) -> list[str]:
        """The same, as words of a command line."""
        words = [] if self.recipe is None else [str(self.recipe)]
        flags = [("--model", self.model), *(("--data", file) for file in self.data)]
        flags += [("--output", self.output), *(("--set", text) for text in self.overrides)]
        return words + [
            word for flag, value in flags if value is not None for word in (flag, str(value))
        ]


def _train(method: "Method", given: Given, gpus: int | None, machines: Machines) -> None:
    from vltrain.config import load_recipe

    if started_by_torchrun():
        refuse_beside_torchrun(machines)
    refuse_without_gpus(machines, gpus)
    machines.torchrun_flags()
    loaded = load_recipe(
        given.recipe,
        method=method,
        model=given.model,
        data=given.data,
        output=given.output,
        overrides=given.overrides,
    )
    if gpus is not None:
        from vltrain.training.launch import refuse_wrong_count

        refuse_wrong_count(gpus)
    several = (gpus or 1) > 1 or machines.count > 1
    if not started_by_torchrun() and (several or loaded.needs_processes):
        from vltrain.training.launch import launch

        raise typer.Exit(launch(gpus or 1, [method, *given.words()], machines))
    from vltrain.workflows.train import train

    if started_by_torchrun():
        watch_others()
    train(loaded)
    leave_group()
