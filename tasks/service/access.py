"""Access to the service: the address that it listens on, and the string that Prefect then asks for.

On a loopback address only this machine's users reach it. On another one everybody in that network does, and who reaches
Prefect runs programs as the user who started it. So Prefect's own basic authentication is demanded there: one string
`user:password`, taken from the variable that Prefect's server reads. It lies in <service's folder>/auth from `up` to
`down`, readable by its owner only, so that later commands find it; never in service.json, on a command line or in a log.
"""

import ipaddress
import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil

from hubert.core.errors import ConfigError
from hubert.core.files import atomic_write

SERVER_AUTH, CLIENT_AUTH = "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"
OWNER_ONLY = 0o600


def check_host(host: str) -> None:
    """Check that the service may listen on an address: loopback, or that of one internal interface of this machine.

    Raises:
        ConfigError: it is something else; says what this machine has.
    """
    try:
        address = ipaddress.IPv4Address(host)
    except ValueError as error:
        raise ConfigError(f"host {host!r}: expected an IPv4 address of this machine; {_choices()}") from error
    if address.is_loopback:
        return
    if address.is_unspecified:
        raise ConfigError(
            f"host {host}: that is every interface of this machine, a public one too; name one of them: {_choices()}"
        )
    if address.is_global:
        raise ConfigError(
            f"host {host}: a public address. The service speaks plain HTTP, and MLflow has no password: choose an internal "
            f"interface, or 127.0.0.1 and an SSH tunnel; {_choices()}"
        )
    if host not in dict(internal_addresses()):
        raise ConfigError(f"host {host}: not an address of this machine; {_choices()}")


def is_loopback(host: str) -> bool:
    """Return True if an address is reached from this machine alone."""
    return ipaddress.IPv4Address(host).is_loopback


def internal_addresses() -> Iterator[tuple[str, str]]:
    """Give the IPv4 addresses of this machine that are neither loopback nor public, each with its interface's name."""
    for name, addresses in psutil.net_if_addrs().items():
        for found in addresses:
            if found.family.name == "AF_INET":
                address = ipaddress.IPv4Address(found.address)
                if not address.is_loopback and not address.is_global:
                    yield found.address, name


def _choices() -> str:
    internal = ", ".join(f"{address} ({name})" for address, name in internal_addresses()) or "none"
    return f"127.0.0.1 is for this machine alone, its internal addresses are: {internal}"


def check_port(host: str, port: int, *, setting: str) -> None:
    """Check that a server could listen on a port.

    Raises:
        ConfigError: something else listens there, or the host is not one of this machine's addresses.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            holder = find_port_holder(port) or "another program"
            raise ConfigError(
                f"port {port} on {host} cannot be used ({error.strerror}): it is held by {holder}. "
                f"Stop that program, or choose another port with {setting}."
            ) from error


def find_port_holder(port: int) -> str | None:
    """Return the program that listens on a TCP port, with its id; None if nobody does, or if it is another user's."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:  # macOS asks for root
        return None
    pids = (found.pid for found in connections if found.status == psutil.CONN_LISTEN and found.laddr[1:2] == (port,))
    pid = next(pids, None)
    if pid is None:
        return None
    try:
        return f"{' '.join(psutil.Process(pid).cmdline())[:200]} (process {pid})"
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return f"process {pid}"


def auth_file(folder: Path) -> Path:
    """Return the path of the file with the string in a service's folder."""
    return folder / "auth"


def read_auth(folder: Path) -> str | None:
    """Return the string that the service of a folder asks for; None if it asks for none.

    Raises:
        ConfigError: others than its owner may read the file, so that it is no secret any more.
    """
    path = auth_file(folder)
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & ~OWNER_ONLY:
            raise ConfigError(
                f"{path} holds the service's password, and others may read it (mode {mode:o}, expected 600). Stop the "
                f"service after `chmod 600 '{path}'`, and start it again with another password."
            )
        return path.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_auth(folder: Path, auth: str | None) -> None:
    """Keep the string for later commands; None removes it."""
    if auth is None:
        auth_file(folder).unlink(missing_ok=True)
        return
    with atomic_write(auth_file(folder)) as temporary:
        temporary.touch(OWNER_ONLY, exist_ok=False)  # before there is anything to read in it
        temporary.write_text(f"{auth}\n")


def choose_auth(host: str, folder: Path) -> str | None:
    """Return the string that a service is to ask for: the variable's, else the one kept since it was started; else None.

    Raises:
        ConfigError: there is none and others than this machine would reach the service, or it is not `user:password`.
    """
    auth = os.environ.get(SERVER_AUTH) or read_auth(folder)
    if auth is None:
        if is_loopback(host):
            return None
        raise ConfigError(
            f"host {host}: all machines of that network reach it, and who reaches Prefect can run programs as you. Choose "
            f"an auth string, `user:password`, which Prefect then asks for; for example:\n"
            f'export {SERVER_AUTH}="hubert:$(openssl rand -hex 16)"\nhubert up --host {host}'
        )
    if not re.fullmatch(r"[!-9;-~]+:[!-~]+", auth):
        raise ConfigError(
            f"{SERVER_AUTH}: expected `user:password`, both of printable ASCII characters without spaces (it is not shown here)"
        )
    return auth
