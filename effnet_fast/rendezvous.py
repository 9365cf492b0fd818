"""The torchrun rendezvous backend `bound`: c10d, but listening only on the address of --rdzv-endpoint.

torchrun's own c10d backend listens on all networks of the machine and unpickles what it receives. torchrun finds this
backend through the entry point in pyproject.toml.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters

from effnet_fast.internals import internal

_ROOM = "torch.distributed.elastic.rendezvous"
C10dRendezvousBackend = internal(f"{_ROOM}.c10d_rendezvous_backend.C10dRendezvousBackend")
create_handler = internal(f"{_ROOM}.dynamic_rendezvous.create_handler")
parse_rendezvous_endpoint = internal(f"{_ROOM}.utils.parse_rendezvous_endpoint")
matches_machine_hostname = internal(f"{_ROOM}.utils._matches_machine_hostname")

DEFAULT_PORT = 29400  # c10d's
SECONDS_TO_CONNECT, SECONDS_BETWEEN_TRIES, SECONDS_BETWEEN_LINES = 10.0, 1.0, 60.0


class _Backend(C10dRendezvousBackend):  # type: ignore[misc, valid-type]
    @property
    def name(self) -> str:
        return "bound"


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """Return the factory that torchrun calls to create the rendezvous handler."""
    return _create


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    host, port = parse_rendezvous_endpoint(parameters.endpoint, DEFAULT_PORT)
    is_host = parameters.get_as_bool("is_host")
    if is_host is None:
        is_host = matches_machine_hostname(host)
    timeout = timedelta(seconds=parameters.get_as_int("read_timeout", 60) or 60)
    store = _serve(host, port, timeout) if is_host else None
    if store is None:  # another process hosts the store
        _wait_for(host, port, parameters.get_as_int("join_timeout", 600) or 600)
        store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
    return create_handler(store, _Backend(store, parameters.run_id), parameters)


def _wait_for(host: str, port: int, seconds: float) -> None:
    """Wait until a machine listens at `host`, with a line a minute; TCPStore itself gives up after one, with its stack.

    Raises:
        SystemExit: none does after `seconds`.
    """
    started = said = time.monotonic()
    while True:
        try:
            with socket.create_connection((host, port), timeout=SECONDS_TO_CONNECT):
                return
        except OSError as error:
            now = time.monotonic()
            if now - started >= seconds:
                sys.exit(
                    f"error: nobody listens at {host}:{port} after {seconds:g} s ({error}): start the machine that "
                    "--rdzv-endpoint names, or correct it"
                )
            if now - said >= SECONDS_BETWEEN_LINES:
                said = now
                print(f"waiting for {host}:{port}, which --rdzv-endpoint names ({error})", file=sys.stderr, flush=True)
        time.sleep(SECONDS_BETWEEN_TRIES)


def _serve(host: str, port: int, timeout: timedelta) -> dist.TCPStore | None:
    """A store that listens on one address; None if another process on this machine already listens there.

    Raises:
        SystemExit: the host name resolves to a loopback address, as on Debian; other machines cannot reach it.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    is_name = not host.startswith("localhost") and host != address[0]
    if is_name and ipaddress.ip_address(address[0]).is_loopback:
        sys.exit(
            f"error: {host} resolves to {address[0]}, which other machines cannot reach: "
            "use its IP address in --rdzv-endpoint"
        )
    try:
        listener = socket.create_server(address[:2], family=family)
    except OSError:
        return None
    port = listener.getsockname()[1]
    return dist.TCPStore(
        host, port, is_master=True, multi_tenant=True, timeout=timeout, master_listen_fd=listener.detach()
    )
