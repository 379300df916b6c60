"""One file from the web: into a cache, resumed after a broken connection, checked by its hash.

Where the address promises a hash, the file is checked against it. Where it promises none, the hash of our own first download
is written down and the file in the cache is checked against that: it shows later damage, not a wrong file at the source.

<cache>/<16 hex of the address>/
    hubert_base.pt            the file, there once it is whole
    hubert_base.pt.json       its address, size and sha256, written just before; checked whenever the file is used
    hubert_base.pt.part       what has come so far
    hubert_base.pt.part.json  which version of the file that is part of (ETag or date), another one starts anew; its size
    lock                      one process fetches, the others wait for it
"""

import errno
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from hubert.core.errors import ConfigError, DataError, TransientError
from hubert.core.files import flush, read_json, remove, write_json
from hubert.core.hashing import file_digest
from hubert.core.locks import hold

ATTEMPTS = 5  # connections in a row that bring nothing new
PAUSE = 1.0  # seconds before the second of them, doubled each time
TIMEOUT = 30.0  # seconds without a byte
READ_BYTES = 1 << 20
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
PASSING = {408, 425, 429}  # and all from 500: worth another try


def cache_root() -> Path:
    """Return the folder of downloads: `hubert-flows` in XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hubert-flows"


def download(address: str, *, cache_dir: str | Path | None = None, local_files_only: bool = False) -> Path:
    """Return the local copy of a file on the web; fetch it if there is none.

    Args:
        address: http(s); the file's hash can follow as `#sha256=...`. A hash in the file's name (`name-1a2b3c4d.pt`, the
            beginning of its sha256, as torch.hub names files) is checked too.
        cache_dir: where it is kept; None: `cache_root()`.
        local_files_only: take what is there, and ask nobody.

    A file that is whole is used without writing anything, so the cache may be read-only.

    Raises:
        ConfigError: the host has no such file, or it is not here and must not be fetched.
        DataError: the file has another hash than promised. What has just come is removed, what was in the cache is kept.
        TransientError: the network or the disk failed. What has come is kept, and the next call goes on from there.
    """
    address, _, fragment = address.partition("#")
    file = _File(
        address, Path(cache_dir or cache_root()).expanduser() / _short_hash(address), _promised(address, fragment)
    )
    flaw = file.find_flaw()
    if not flaw:
        return file.path
    if local_files_only and not file.has_come:
        raise (DataError if file.path.exists() else ConfigError)(
            f"{address}: {flaw}, and local_files_only is set. Fetch it where there is a network, copy it here, and give its path"
        )
    try:
        with hold(file.folder, address):
            flaw = file.find_flaw()  # another process may have fetched it meanwhile
            if flaw:
                if file.path.exists():
                    print(f"{flaw}; fetching it again")
                file.fetch()
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise ConfigError(
            f"{address}: {flaw}, and {file.folder} cannot be written ({error.strerror}); name another folder by `cache_dir` or "
            "XDG_CACHE_HOME"
        ) from error
    return file.path


def _short_hash(address: str) -> str:
    return hashlib.sha256(address.encode()).hexdigest()[:16]


def _promised(address: str, fragment: str) -> str:
    """Return the hash that an address promises, or its beginning; "" for none.

    Raises:
        ConfigError: the fragment is something else.
    """
    if fragment:
        match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
        if not match:
            raise ConfigError(
                f"{address}: expected `#sha256=` and 64 hex digits behind the address, found {fragment!r}"
            )
        return match[1].lower()
    # Digits alone are a date or a number of steps.
    match = re.search(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.\w+$", urlsplit(address).path)
    return match[1] if match else ""


@dataclass
class _File:
    """A file on the web and its place in the cache."""

    address: str
    folder: Path
    promised: str

    @property
    def path(self) -> Path:
        name = unquote(Path(urlsplit(self.address).path).name)
        return self.folder / (re.sub(r"[^\w.+-]", "_", name).lstrip(".") or "file")

    @property
    def record(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    @property
    def part(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def part_record(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part.json")

    @property
    def has_come(self) -> bool:
        """Whether the part is the whole file: a process was killed before it could give it its name."""
        size = (read_json(self.part_record) or {}).get("bytes")
        return self.part.exists() and self._have() == size

    def find_flaw(self) -> str:
        """Return what is wrong with the file in the cache; empty if it is here with the hash that was written down.

        A file without a record is whole, since it gets its name only then; the record is written anew if it can be.

        Raises:
            DataError: it is not the file that the address promises.
        """
        if not self.path.exists():
            return f"it is not in the cache ({self.folder})"
        found = file_digest(self.path)
        recorded = (read_json(self.record) or {}).get("sha256")
        if recorded not in (None, found):
            return (
                f"{self.path}: expected sha256 {recorded}, as when it was fetched from {self.address}, found {found}: it was "
                "damaged since"
            )
        self._check(found, f"It is kept; to fetch the present one remove {self.path}, or name another `cache_dir`")
        if recorded is None:
            with suppress(OSError):
                self._write_record(self.path, found)
        return ""

    def fetch(self) -> None:
        """Fetch the file, over as many connections as it takes."""
        idle = 0
        while not self.has_come:
            before = self._have()
            try:
                whole = self._receive()
            except urllib.error.HTTPError as error:
                self._explain(error)
                problem: Exception = error
            except (OSError, http.client.HTTPException) as error:
                problem = error
            else:
                if whole:
                    break
                problem = ConnectionError("the connection ended early")
            idle = 0 if self._have() > before else idle + 1
            if idle >= ATTEMPTS:
                raise TransientError(
                    f"{self.address}: fetching it failed ({problem}); {self._have():,} bytes are kept in {self.part}, and the "
                    "next call goes on from there. Without a network: fetch it elsewhere, copy it here, and give its path"
                ) from problem
            if idle:
                time.sleep(PAUSE * 2 ** (idle - 1))
        self._finish()

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _receive(self) -> bool:
        """Receive what is missing over one connection; returns whether the file is whole."""
        have, version = self._have(), read_json(self.part_record) or {}
        headers = {"User-Agent": "hubert-flows", "Accept-Encoding": "identity"}
        tag = _validator(version)
        if have and tag:
            headers |= {"Range": f"bytes={have}-", "If-Range": tag}
        with _opener().open(urllib.request.Request(self.address, headers=headers), timeout=TIMEOUT) as answer:  # noqa: S310
            if have and not (answer.status == 206 and _starts_at(answer.headers, have)):
                remove(self.part)  # a host without ranges, or another version of the file: from the beginning
                have = 0
            if not have:
                version = {"etag": answer.headers["ETag"], "modified": answer.headers["Last-Modified"]}
            length = answer.headers["Content-Length"]
            total = None if length is None else have + int(length)
            write_json(self.part_record, {**version, "bytes": total})
            with (
                self.part.open("ab") as file,
                tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=self.path.name, disable=None) as bar,
            ):
                while block := answer.read(READ_BYTES):
                    file.write(block)
                    bar.update(len(block))
        return total is None or self._have() == total

    def _explain(self, error: urllib.error.HTTPError) -> None:
        """Return if an answer is worth another try.

        Raises:
            ConfigError: it is not: the file is not there, or not for us.
        """
        if error.code == 416:  # there is nothing behind what we have: it is part of a longer version
            remove(self.part)
        elif error.code < 500 and error.code not in PASSING:
            raise ConfigError(
                f"{self.address}: the host answered {error.code} ({error.reason}). Expected a file; check the address"
            ) from error

    def _finish(self) -> None:
        """Check what has come and give it its name. A kill at any point leaves what the next call finishes."""
        digest = file_digest(self.part)
        try:
            self._check(digest, "It was removed; do not use it unless you know why")
        except DataError:
            remove(self.part)
            remove(self.part_record)
            raise
        flush(self.part)
        self._write_record(self.part, digest)
        self.part.rename(self.path)
        flush(self.folder)
        remove(self.part_record)

    def _write_record(self, file: Path, digest: str) -> None:
        write_json(self.record, {"address": self.address, "bytes": file.stat().st_size, "sha256": digest})

    def _check(self, digest: str, what_now: str) -> None:
        """Compare a hash with the one that the address promises.

        Raises:
            DataError: they differ.
        """
        if not digest.startswith(self.promised):
            raise DataError(
                f"{self.address}: expected a file whose sha256 is (or begins with) {self.promised}, found {digest}. Likely "
                f"cause: the file was replaced, or changed on its way. {what_now}"
            )


def _validator(version: dict[str, Any]) -> str | None:
    """Return what names a version of a file exactly: a strong ETag, else its date."""
    etag = version.get("etag")
    return etag if etag and not etag.startswith("W/") else version.get("modified")


def _starts_at(headers: Any, position: int) -> bool:
    """Return True if a part of a file begins where ours ends."""
    return bool(re.match(rf"bytes {position}-", headers["Content-Range"] or ""))


class _Redirections(urllib.request.HTTPRedirectHandler):
    """Follows redirections, but none from https to http, where anybody on the way could exchange the file."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Return the request of the new address.

        Raises:
            ConfigError: it leaves https.
        """
        if req.type == "https" and urlsplit(newurl).scheme != "https":
            raise ConfigError(
                f"{req.full_url}: the host sends on to {newurl}, which is not encrypted: the file could be exchanged on its way. "
                "Fix: give an address that stays with https; or fetch the file yourself and give its path"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Return what opens http(s) and follows redirections to http(s) only: urllib's own also opens files."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        _Redirections,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener
