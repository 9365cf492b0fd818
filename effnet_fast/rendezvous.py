"""The rendezvous backend `bound`: torchrun's c10d, listening on the address that --rdzv-endpoint names and no other.

c10d itself listens on every network of the machine, and what it receives there it unpickles. torchrun finds this one
through the entry point in pyproject.toml.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname, parse_rendezvous_endpoint

DEFAULT_PORT = 29400  # c10d's


class _Backend(C10dRendezvousBackend):
    @property
    def name(self) -> str:
        return "bound"


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What torchrun asks the entry point for."""
    return _create


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    host, port = parse_rendezvous_endpoint(parameters.endpoint, DEFAULT_PORT)
    is_host = parameters.get_as_bool("is_host")
    if is_host is None:
        is_host = _matches_machine_hostname(host)
    timeout = timedelta(seconds=parameters.get_as_int("read_timeout", 60) or 60)
    store = _serve(host, port, timeout) if is_host else None
    if store is None:  # another process is the host
        store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
    return create_handler(store, _Backend(store, parameters.run_id), parameters)


def _serve(host: str, port: int, timeout: timedelta) -> dist.TCPStore | None:
    """A store that listens on one address; None where another process of this machine does so already.

    Raises:
        SystemExit: the host's name is a loopback address here, as Debian gives it, where no other machine reaches it.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    named = not host.startswith("localhost") and host != address[0]
    if named and ipaddress.ip_address(address[0]).is_loopback:
        sys.exit(
            f"error: {host} is {address[0]} on this machine, which no other reaches: give --rdzv-endpoint its address"
        )
    try:
        listener = socket.create_server(address[:2], family=family)
    except OSError:
        return None
    port = listener.getsockname()[1]
    return dist.TCPStore(
        host, port, is_master=True, multi_tenant=True, timeout=timeout, master_listen_fd=listener.detach()
    )
