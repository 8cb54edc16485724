"""How the machines of one run meet: torchrun's flags, checked before a launcher waits on them."""

import socket
from dataclasses import dataclass, fields
from typing import Literal

from vltrain.errors import VltrainError

Backend = Literal["c10d", "static"]
STATIC_PORT = 29500  # torchrun's
ALONE = ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


@dataclass(frozen=True)
class Machines:
    """What one machine was told, by the names of torchrun's flags; None where nothing was said.

    With `c10d` machines come to `rdzv_endpoint` in any order and get their places there; with
    `static` each is told its place, `node_rank`, and where the first one is.
    """

    nnodes: str | None = None
    node_rank: int | None = None
    rdzv_endpoint: str | None = None
    rdzv_backend: Backend | None = None
    rdzv_id: str | None = None
    master_addr: str | None = None
    master_port: int | None = None

    def words(self) -> str:
        """As they were typed."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return " ".join(f"{flag(name)} {value}" for name, value in values if value is not None)

    @property
    def given(self) -> bool:
        """Whether anything was said."""
        return self != Machines()

    @property
    def count(self) -> int:
        """Machines of the run.

        Raises:
            VltrainError: `nnodes` is no number, or a range.
        """
        low, _, high = (self.nnodes or "1").partition(":")
        try:
            least, most = int(low), int(high or low)
        except ValueError:
            least, most = 0, 0
        if not 1 <= least <= most:
            raise self.wrong(
                "--nnodes is the number of machines", "write it as a number, as in --nnodes 2"
            )
        if least != most:
            raise self.wrong(
                "a run keeps the number of machines that it starts on",
                f"write --nnodes {most}; the same command with another number goes on from the "
                "last checkpoint",
            )
        return least

    @property
    def backend(self) -> Backend:
        """The one that was named, or that the other flags are for."""
        places = (self.node_rank, self.master_addr, self.master_port)
        static = any(place is not None for place in places)
        return self.rdzv_backend or ("static" if static else "c10d")

    def wrong(self, what: str, fix: str) -> VltrainError:
        """An error about these flags."""
        return VltrainError.at(self.words(), what=what, fix=fix)

    def torchrun_flags(self) -> list[str]:
        """The flags of torchrun by which these machines meet.

        Raises:
            VltrainError: they do not go together, or would wait for machines that cannot come.
        """
        count = self.count
        if self.given and self.nnodes is None:
            raise self.wrong("is for runs on several machines", "add --nnodes with their number")
        address = self._address()
        backend = self.backend
        if backend == "static":
            self._refuse_wrong_place(count)
        elif self.node_rank is not None:
            raise self.wrong(
                "c10d itself gives every machine its place",
                "leave --node-rank out, or --rdzv-backend c10d",
            )
        if address is None:
            return list(ALONE)
        flags = [f"--nnodes={count}", f"--rdzv-backend={backend}", f"--rdzv-endpoint={address}"]
        if backend == "static":
            flags.append(f"--node-rank={self.node_rank or 0}")
        if self.rdzv_id is not None:
            flags.append(f"--rdzv-id={self.rdzv_id}")
        return flags

    def _address(self) -> str | None:
        """Where the machines meet, as host:port; None for one that meets no other."""
        if self.rdzv_endpoint is not None:
            if self.master_addr is not None or self.master_port is not None:
                raise self.wrong(
                    "two places to meet at are named",
                    "keep --rdzv-endpoint, or --master-addr and --master-port",
                )
            host, _, port = self.rdzv_endpoint.rpartition(":")
            self._refuse_wrong_address("--rdzv-endpoint", host, port)
            return self.rdzv_endpoint
        if self.master_addr is not None:
            if self.backend == "c10d":
                raise self.wrong(
                    "c10d meets at --rdzv-endpoint",
                    f"write --rdzv-endpoint {self.master_addr}:{self.master_port or STATIC_PORT} "
                    "for --master-addr and --master-port",
                )
            port = str(STATIC_PORT if self.master_port is None else self.master_port)
            self._refuse_wrong_address("--master-addr", self.master_addr, port)
            return f"{self.master_addr}:{port}"
        if self.count > 1:
            raise self.wrong(
                "nothing says where the machines meet",
                "add --rdzv-endpoint FIRST:29500 on all of them, with the name of one of them and "
                "a free port of it",
            )
        return None

    def refuse_unknown_name(self) -> None:
        """Raise VltrainError where this machine does not know the one to meet at by its name.

        torchrun would try for minutes.
        """
        address = self._address()
        if address is None:
            return
        host = address.rpartition(":")[0].strip("[]")
        try:
            socket.getaddrinfo(host, None)
        except (OSError, UnicodeError) as error:
            raise self.wrong(
                f"this machine knows no {host}: {error}",
                "name one of the run's machines as the others know it, or by its IP address",
            ) from None

    def _refuse_wrong_address(self, name: str, host: str, port: str) -> None:
        lowest = 0 if self.count == 1 and self.backend == "c10d" else 1  # 0: any free port
        is_port = port.isdecimal() and lowest <= int(port) <= 65535
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        no_host = not bare or any(sign.isspace() or sign in "/[]" for sign in bare)
        if no_host or (":" in host and bare == host) or not is_port:
            example = "--rdzv-endpoint first:29500"
            if name == "--master-addr":
                example = "--master-addr first --master-port 29500"
            raise self.wrong(
                f"{name} is no machine and port",
                f"write {example}; an IPv6 address stands in [brackets]",
            )

    def _refuse_wrong_place(self, count: int) -> None:
        if self.node_rank is None and count > 1:
            raise self.wrong(
                "a static rendezvous has to know which machine this is",
                "add --node-rank 0 on the machine of that address, and 1, 2 and so on on the "
                "others; or name the address by --rdzv-endpoint alone",
            )
        if self.node_rank is not None and not 0 <= self.node_rank < count:
            raise self.wrong(
                f"the places of {count} machines are 0 to {count - 1}",
                "give each machine a --node-rank of its own among them",
            )


def flag(name: str) -> str:
    """A field's name as it is typed."""
    return "--" + name.replace("_", "-")


def refuse_without_gpus(machines: Machines, gpus: int | None) -> None:
    """Raise VltrainError where it is said how machines meet, but not what each brings."""
    if machines.given and gpus is None:
        raise machines.wrong(
            "it is not said how many GPUs each machine brings", "add --gpus 8, or their number"
        )


def refuse_beside_torchrun(machines: Machines) -> None:
    """Raise VltrainError where torchrun has already done what these flags are for."""
    if machines.given:
        raise machines.wrong(
            "torchrun has started this process, and the machines have met",
            "give these flags to torchrun, or start vltrain --gpus without it",
        )
