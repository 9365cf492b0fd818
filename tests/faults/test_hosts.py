"""Two hosts, as network namespaces of this machine with a link that can be cut."""

import os
import shutil
import subprocess

import pytest

from command_line import at_step
from marks import needs_installation

# Of the test's own network, which no other host is on; the range is set aside for documentation (RFC 5737).
ADDRESSES = ("192.0.2.1", "192.0.2.2")
PORT = 29500


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


class Hosts:
    """Two namespaces and the cable between them."""

    def __init__(self):
        self.names = [f"effnet-{os.getpid()}-{number}" for number in range(2)]
        self.cards = [f"ef{os.getpid() % 100000}-{number}" for number in range(2)]

    def set_up(self):
        first = ip("netns", "add", self.names[0])
        if first.returncode:
            pytest.skip(f"network namespaces are not permitted here: {first.stderr.strip()}")
        steps = [
            ["netns", "add", self.names[1]],
            ["link", "add", self.cards[0], "type", "veth", "peer", "name", self.cards[1]],
        ]
        for name, card, address in zip(self.names, self.cards, ADDRESSES, strict=True):
            steps += [
                ["link", "set", card, "netns", name],
                ["-n", name, "addr", "add", f"{address}/24", "dev", card],
                ["-n", name, "link", "set", card, "up"],
                ["-n", name, "link", "set", "lo", "up"],
            ]
        for step in steps:
            done = ip(*step)
            if done.returncode:
                pytest.skip(f"network namespaces are not permitted here: ip {' '.join(step)}: {done.stderr.strip()}")

    def cable(self, state):
        assert ip("-n", self.names[1], "link", "set", self.cards[1], state).returncode == 0

    def tear_down(self):
        for name in self.names:
            ip("netns", "delete", name)


@pytest.fixture
def hosts():
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the command ip (iproute2)")
    hosts = Hosts()
    try:
        hosts.set_up()
        yield hosts
    finally:
        hosts.tear_down()


@pytest.mark.slow
@needs_installation
def test_host_loses_its_network_and_comes_back(runs, hosts):
    """Training on both; one loses its network and dies; the other continues alone; the first comes back and joins."""
    flags = "--num_epochs 60 --save_every_steps 3 --sync_batchnorm false --hang_timeout 15"

    def agent(number):
        return runs.agent(
            "hosts",
            flags,
            ranks=1,
            endpoint=f"{ADDRESSES[0]}:{PORT}",
            is_host=number == 0,
            prefix=("ip", "netns", "exec", hosts.names[number]),
            LOCAL_ADDR=ADDRESSES[number],
            GLOO_SOCKET_IFNAME=hosts.cards[number],
            **at_step(0, "crawl 1"),  # one rank alone goes slowly, so that the other joins before the end
        )

    first, second = agent(0), agent(1)
    first.wait_for("on 2 x cpu")
    runs.wait_for_step("hosts", 10)
    hosts.cable("down")  # no connection is closed; only the heartbeat stops
    second.kill()
    line = first.wait_for("has sent no heartbeat")
    assert line.startswith(("rank 0 (host ", "rank 1 (host "))
    first.wait_for("on 1 x cpu")
    first.wait_for("2 accumulation step(s), which keeps the batch of 16")
    hosts.cable("up")
    again = agent(1)
    first.wait_for("on 2 x cpu", count=2)
    assert first.end() == 0, first.printed[-5000:]
    again.end()
    assert runs.saved("hosts")["progress"]["step"] == 60 * 6
    rows = runs.rows("hosts")
    assert [row["step"] for row in rows] == list(range(1, 361))
    assert sum(row["images"] for row in rows) == 60 * 6 * 16
