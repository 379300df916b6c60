"""Certificates for the TLS between a Dask scheduler and its workers, good on nodes whose clocks are behind."""

import datetime as dt

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from distributed.security import Security

BEHIND = dt.timedelta(days=1)  # how far a node's clock may be behind this machine's
# OpenSSL's words for a clock that is wrong, in a worker's log.
SIGNS = {
    "certificate is not yet valid": "behind",
    "certificate has expired": "ahead of",
}


def temporary_security() -> Security:
    """Return new certificates that exist only in memory, as Dask's own, but valid from a day before now."""
    made = Security.temporary()
    key = serialization.load_pem_private_key(made.tls_client_key.encode(), password=None)
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        raise TypeError(
            f"expected the RSA or elliptic-curve key that distributed makes, found {type(key).__name__}; another version?"
        )
    issued = x509.load_pem_x509_certificate(made.tls_ca_file.encode())
    builder = x509.CertificateBuilder(
        issuer_name=issued.issuer,
        subject_name=issued.subject,
        public_key=issued.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=issued.not_valid_before_utc - BEHIND,
        not_valid_after=issued.not_valid_after_utc,
        extensions=list(issued.extensions),
    )
    certificate = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    names = (f"tls_{role}_cert" for role in ("client", "scheduler", "worker"))
    keys = {f"tls_{role}_key": made.tls_client_key for role in ("client", "scheduler", "worker")}
    return Security(require_encryption=True, tls_ca_file=certificate, **dict.fromkeys(names, certificate), **keys)


def clock_problem(log: str) -> str:
    """Return the cause if a worker's log says that its node's clock is wrong; empty if it does not."""
    for sign, direction in SIGNS.items():
        if sign in log:
            return (
                f"the clock of the node is more than a day {direction} this machine's, so that it refuses the certificates of "
                f"this run (`{sign}`). Fix: the site's administrators set the clock (NTP); until then leave the node out "
                "(`--exclude` among the site's `directives`)"
            )
    return ""
