"""Ports for servers of tests, benchmarks and virtual clusters."""

import socket


def free_ports(count: int) -> list[int]:
    """Return TCP ports that nothing listens on at the moment."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
