"""Ports for servers of tests, benchmarks and virtual clusters."""

import random
import socket

# Below those that Linux gives to outgoing connections (from 32768), which may take a port before a server listens on it,
# and those at which processes of a training on Slurm meet (`hubert.training.ranks`, from 20000).
PORTS = range(10_000, 20_000)


def free_ports(count: int) -> list[int]:
    """Return TCP ports that nothing listens on at the moment.

    They are drawn, so that programs that ask at the same time get different ones.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"found {len(found)} of {count} free ports from {PORTS.start} to {PORTS.stop}")
