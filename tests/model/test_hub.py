"""Models by name: paths, the Hub's cache, a Hub of our own on 127.0.0.1, and files over broken connections."""

import errno
import hashlib
import http.client
import json
import os
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from hubert.core.errors import ConfigError, DataError, TransientError
from hubert.core.files import read_json
from hubert.core.paths import PROJECT
from hubert.model.formats import download as downloads
from hubert.model.formats.hub import locate
from hubert.model.hubert import HuBERT
from hubert.model.weights import find_origin, read_config
from hubert.settings.model import build_config
from tests.support.servers import COMMIT, CONTENT, Handler, Server, serving, write_cache

SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "PAUSE", 0)
    with serving(Server()) as made:
        yield made


# Addresses --------------------------------------------------------------------------------------------------------


def test_a_file_is_fetched_once_and_then_needs_no_host(server, tmp_path):
    path = locate(f"{server.address}/model.pt", cache_dir=tmp_path)
    assert path.name == "model.pt"
    assert path.read_bytes() == CONTENT
    assert read_json(path.with_name("model.pt.json"))["sha256"] == SHA256
    assert not list(tmp_path.rglob("*.part*"))
    again = locate(f"{server.address}/model.pt", cache_dir=tmp_path, local_files_only=True)
    assert again == path
    assert len(server.requests) == 1


def test_the_cache_is_in_the_users_cache_folder(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = locate(f"{server.address}/model.pt")
    assert path.is_relative_to(tmp_path / "cache" / "hubert-flows")


def test_a_broken_connection_is_resumed_where_it_broke(server, tmp_path):
    server.cuts = [100_000, 50_000]
    assert locate(f"{server.address}/model.pt", cache_dir=tmp_path).read_bytes() == CONTENT
    assert [wanted for _, wanted in server.requests] == [None, "bytes=100000-", "bytes=150000-"]


def test_what_has_come_is_kept_for_the_next_call(server, tmp_path):
    server.cuts = [1000, *[0] * downloads.ATTEMPTS]
    with pytest.raises(TransientError, match=r"1,000 bytes are kept .* the next call goes on .* Without a network"):
        locate(f"{server.address}/model.pt", cache_dir=tmp_path)
    server.requests.clear()
    assert locate(f"{server.address}/model.pt", cache_dir=tmp_path).read_bytes() == CONTENT
    assert server.requests == [("/model.pt", "bytes=1000-")]


@pytest.mark.parametrize("length", [900, 100_000, 300_000])
def test_a_file_that_changed_meanwhile_starts_anew(server, tmp_path, length):
    server.cuts = [1000, *[0] * downloads.ATTEMPTS]
    with pytest.raises(TransientError):
        locate(f"{server.address}/model.pt", cache_dir=tmp_path)
    server.files["/model.pt"], server.etags["/model.pt"] = os.urandom(length), '"second"'
    path = locate(f"{server.address}/model.pt", cache_dir=tmp_path)
    assert path.read_bytes() == server.files["/model.pt"]


@pytest.mark.parametrize("etag", [None, 'W/"weak"', '"first"'])
def test_a_host_that_cannot_resume_is_asked_for_the_whole_file_again(server, tmp_path, etag):
    server.ranges, server.etags["/model.pt"], server.cuts = False, etag, [1000]
    assert locate(f"{server.address}/model.pt", cache_dir=tmp_path).read_bytes() == CONTENT


def test_a_file_that_became_shorter_than_what_has_come_starts_anew(server, tmp_path):
    server.cuts = [1000, *[0] * downloads.ATTEMPTS]
    with pytest.raises(TransientError):
        locate(f"{server.address}/model.pt", cache_dir=tmp_path)
    server.files["/model.pt"] = b"short"  # under the same ETag: the host answers 416
    assert locate(f"{server.address}/model.pt", cache_dir=tmp_path).read_bytes() == b"short"


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_file_that_the_host_does_not_give_is_a_config_error(server, tmp_path, status):
    server.statuses = [status]
    with pytest.raises(ConfigError, match=f"answered {status}"):
        locate(f"{server.address}/model.pt", cache_dir=tmp_path)
    assert len(server.requests) == 1


def test_a_host_that_is_busy_for_a_moment_is_asked_again(server, tmp_path):
    server.statuses = [503, 429, 500]
    assert locate(f"{server.address}/model.pt", cache_dir=tmp_path).read_bytes() == CONTENT


def test_no_network_is_a_transient_error_that_says_what_to_do(server, tmp_path):
    with serving(Server()) as gone:
        address = gone.address
    with pytest.raises(TransientError, match="fetch it elsewhere, copy it here"):
        locate(f"{address}/model.pt", cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="local_files_only"):
        locate(f"{address}/model.pt", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("form", ["/model.pt#sha256={}", "/model-{:.8}.pt", "/model-{}.pt"])
def test_a_promised_hash_is_checked(server, tmp_path, form):
    for digest, is_right in ((SHA256, True), ("abcdef01" * 8, False)):
        name = form.format(digest)
        server.files[name.partition("#")[0]] = CONTENT
        if is_right:
            assert locate(server.address + name, cache_dir=tmp_path).read_bytes() == CONTENT
            continue
        with pytest.raises(DataError, match=f"expected a file whose sha256.*abcdef01.*found {SHA256}"):
            locate(server.address + name, cache_dir=tmp_path / "wrong")
        assert not list((tmp_path / "wrong").rglob("*.pt*"))


def test_a_date_in_a_name_is_no_hash_and_a_wrong_fragment_is_an_error(server, tmp_path):
    server.files["/model-20240131.pt"] = CONTENT
    assert locate(f"{server.address}/model-20240131.pt", cache_dir=tmp_path).exists()
    with pytest.raises(ConfigError, match="64 hex digits"):
        locate(f"{server.address}/model.pt#md5=1", cache_dir=tmp_path)


@pytest.mark.parametrize("local_files_only", [False, True])
def test_a_hash_that_is_promised_later_is_checked_on_the_file_that_is_here_and_a_wrong_one_leaves_it_there(
    server, tmp_path, local_files_only
):
    path = locate(f"{server.address}/model.pt", cache_dir=tmp_path)
    options = {"cache_dir": tmp_path, "local_files_only": local_files_only}
    with pytest.raises(DataError, match=rf"expected a file whose sha256.*It is kept.*remove {path}"):
        locate(f"{server.address}/model.pt#sha256={'0' * 64}", **options)
    assert locate(f"{server.address}/model.pt#sha256={SHA256}", **options).read_bytes() == CONTENT
    assert len(server.requests) == 1


class Killed(BaseException):
    """Stands for a signal that ends the process."""


@pytest.mark.parametrize(
    ("where", "function", "file"),
    [
        (downloads, "flush", "model.pt.part"),
        (downloads, "write_json", "model.pt.json"),
        (Path, "rename", "model.pt.part"),
        (downloads, "remove", "model.pt.part.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_kill_while_a_file_gets_its_name_loses_nothing(server, tmp_path, where, function, file):
    usual = getattr(where, function)

    def act(path, *args):
        if path.name == file:
            raise Killed
        return usual(path, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, function, act)
        with pytest.raises(Killed):
            locate(f"{server.address}/model.pt", cache_dir=tmp_path)
    path = locate(f"{server.address}/model.pt", cache_dir=tmp_path, local_files_only=True)
    assert path.read_bytes() == CONTENT
    assert read_json(path.with_name("model.pt.json"))["sha256"] == SHA256
    assert len(server.requests) == 1


def test_a_file_whose_record_is_missing_gets_a_new_one(server, tmp_path):
    path = locate(f"{server.address}/model.pt", cache_dir=tmp_path)
    path.with_name("model.pt.json").unlink()
    assert locate(f"{server.address}/model.pt", cache_dir=tmp_path, local_files_only=True) == path
    path.write_bytes(b"damaged")
    with pytest.raises(DataError, match=f"expected sha256 {SHA256}.*damaged since"):
        locate(f"{server.address}/model.pt", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_whole_file_is_used_from_a_cache_that_cannot_be_written(server, tmp_path, monkeypatch, code):
    path = locate(f"{server.address}/model.pt", cache_dir=tmp_path)
    server.files["/other.pt"] = CONTENT

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    for function in ("hold", "write_json", "remove"):
        monkeypatch.setattr(downloads, function, refuse)
    for local_files_only in (False, True):
        options = {"cache_dir": tmp_path, "local_files_only": local_files_only}
        assert locate(f"{server.address}/model.pt", **options) == path
    path.with_name("model.pt.json").unlink()
    assert locate(f"{server.address}/model.pt", cache_dir=tmp_path) == path
    with pytest.raises(ConfigError, match="not in the cache .* cannot be written .*cache_dir"):
        locate(f"{server.address}/other.pt", cache_dir=tmp_path)


def test_a_file_that_was_damaged_in_the_cache_is_fetched_again(server, tmp_path):
    path = locate(f"{server.address}/model.pt", cache_dir=tmp_path)
    path.write_bytes(b"damaged")
    with pytest.raises(DataError, match="damaged since"):
        locate(f"{server.address}/model.pt", cache_dir=tmp_path, local_files_only=True)
    assert locate(f"{server.address}/model.pt", cache_dir=tmp_path).read_bytes() == CONTENT


def test_two_that_ask_at_once_fetch_it_once(server, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        ask = lambda _: locate(f"{server.address}/model.pt", cache_dir=tmp_path).read_bytes()  # noqa: E731
        assert set(pool.map(ask, range(4))) == {CONTENT}
    assert len(server.requests) == 1


def test_a_redirection_to_a_file_of_this_machine_is_not_followed(server, tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("secret")

    def redirect(handler):
        handler.send_response(302)
        handler.send_header("Location", secret.as_uri())
        handler.end_headers()

    monkeypatch.setattr(Handler, "do_GET", redirect)
    with pytest.raises(ConfigError):
        locate(f"{server.address}/model.pt", cache_dir=tmp_path / "cache")
    assert "secret" not in {path.read_text() for path in (tmp_path / "cache").rglob("*") if path.is_file()}


@pytest.mark.parametrize(("scheme", "is_followed"), [("https", True), ("http", False)])
def test_a_redirection_from_https_to_http_is_refused(server, tmp_path, monkeypatch, scheme, is_followed):
    class WithoutTls(urllib.request.AbstractHTTPHandler):
        """Speaks plain HTTP under the name of https, so that the test needs no certificate."""

        https_request = urllib.request.AbstractHTTPHandler.do_request_

        def https_open(self, request):
            return self.do_open(http.client.HTTPConnection, request)

    usual = Handler.do_GET

    def redirect(handler):
        if handler.path != "/old.pt":
            return usual(handler)
        handler.send_response(302)
        handler.send_header("Location", f"{scheme}://{handler.headers['Host']}/model.pt")
        handler.send_header("Content-Length", "0")
        return handler.end_headers()

    monkeypatch.setattr(urllib.request, "HTTPSHandler", WithoutTls)
    monkeypatch.setattr(Handler, "do_GET", redirect)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    address = f"{server.address.replace('http:', 'https:')}/old.pt"
    if is_followed:
        assert locate(address, cache_dir=tmp_path).read_bytes() == CONTENT
        return
    with pytest.raises(ConfigError, match=r"https:.*/old\.pt: the host sends on to http:.*not encrypted"):
        locate(address, cache_dir=tmp_path)
    assert not server.requests


# Paths and ids ----------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_path_that_exists_is_itself_and_one_that_does_not_is_a_config_error(tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("org/model") == Path("org/model")
    assert locate(tmp_path) == tmp_path
    for name in ("org/model.pt", "./org/other", "model", "org/a/b", "../x/y"):
        with pytest.raises(ConfigError, match="expected a path that exists, a Hugging Face id"):
            locate(name)


@pytest.mark.parametrize(
    "weights",
    [
        {"model.safetensors": ""},
        {"pytorch_model.bin": ""},
        {"model.safetensors.index.json": '{"weight_map": {"a": "p1", "b": "p2"}}', "p1": "", "p2": ""},
        {"pytorch_model.bin.index.json": '{"weight_map": {"a": "p1"}}', "p1": ""},
    ],
    ids=lambda weights: next(iter(weights)),
)
def test_a_model_in_the_hubs_cache_needs_no_hub(tmp_path, offline, weights):
    folder = write_cache(tmp_path, "org/model", {"config.json": "{}", **weights})
    assert locate("org/model", cache_dir=tmp_path) == folder
    assert locate("org/model", cache_dir=tmp_path, revision=COMMIT) == folder


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": "{}"},
        {"model.safetensors": ""},
        {"config.json": "{}", "model.safetensors.index.json": '{"weight_map": {"a": "p1", "b": "p2"}}', "p1": ""},
    ],
)
def test_a_model_that_is_not_wholly_in_the_cache_says_what_to_do_offline(tmp_path, offline, files):
    write_cache(tmp_path, "org/model", files)
    with pytest.raises(ConfigError, match=r"HF_HUB_OFFLINE is set.*hf download org/model"):
        locate("org/model", cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="local_files_only is set"):
        locate("org/model", cache_dir=tmp_path, local_files_only=True)


def test_a_repository_whose_configuration_needs_a_program_is_refused_and_it_does_not_run(tmp_path, offline):
    marker = tmp_path / "the program ran"
    program = f"open({str(marker)!r}, 'w').close()"
    files = {"config.json": json.dumps({"auto_map": {"AutoModel": "modeling.Evil"}}), "modeling.py": program}
    folder = write_cache(tmp_path, "org/model", {**files, "model.safetensors": ""})
    refused = {"match": r"code of its own .*modeling\.Evil.*never run"}
    with pytest.raises(DataError, **refused):
        locate("org/model", cache_dir=tmp_path)
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(DataError, **refused):
            HuBERT.from_pretrained(path)
        with pytest.raises(DataError, **refused):
            find_origin(str(path), "teacher")
    assert not marker.exists()


def test_a_file_that_is_a_link_in_the_hubs_cache_keeps_its_name_and_its_configuration(tmp_path):
    """The snapshots of the Hub's client are links to blobs, which have neither a suffix nor a config.json beside them."""
    folder = write_cache(tmp_path, "org/model", {})
    folder.mkdir(parents=True)
    HuBERT(build_config("tiny", {"num_layers": 1, "layer_norm_eps": 1e-3})).save_pretrained(tmp_path / "model")
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate((tmp_path / "model").iterdir()):
        file.rename(blobs / f"abc{number}")
        (folder / file.name).symlink_to(f"../../blobs/abc{number}")
    for path in (folder, folder / "model.safetensors"):
        origin = find_origin(str(path), "teacher")
        assert read_config(Path(origin.checkpoint)).layer_norm_eps == 1e-3
        assert origin.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


class Hub(Server):
    """As much of the Hub as its client needs to fetch a model."""

    def __init__(self, name: str, files: dict[str, str]) -> None:
        super().__init__()
        self.RequestHandlerClass = HubHandler
        self.name = name
        self.files = {file: content.encode() for file, content in files.items()}


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, path = self.server, self.path.split("?")[0]
        server.requests.append((path, self.command))
        api, file = f"/api/models/{server.name}", path.removeprefix(f"/{server.name}/resolve/{COMMIT}/")
        if path in {api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"}:
            self.answer({"id": server.name, "sha": COMMIT, "siblings": [{"rfilename": name} for name in server.files]})
        elif path == f"{api}/tree/{COMMIT}":
            entries = [(name, len(content)) for name, content in server.files.items()]
            self.answer([{"type": "file", "path": name, "size": size, "oid": name} for name, size in entries])
        elif path.startswith(f"{api}/revision/"):
            self.answer({"error": "Revision not found"}, 404, "RevisionNotFound")
        elif file in server.files:
            self.answer(server.files[file])
        else:
            self.answer({"error": "Repository not found"}, 404, "RepoNotFound")

    def answer(self, content, status=200, error=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


PROGRAM = """
import json, sys
from hubert.core.errors import HubertError
from hubert.model.formats.hub import locate
for name, options in json.loads(sys.argv[1]):
    try:
        folder = locate(name, **options)
        print(json.dumps(sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))))
    except HubertError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def ask(hub: Hub, cache: Path, *questions: tuple[str, dict]) -> list:
    """Ask in a process of its own, since the Hub's client reads its address when it is imported."""
    environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(cache), "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", PROGRAM, json.dumps(questions)]
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True, timeout=120
    )
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_of_a_repository_only_configuration_and_weights_are_fetched_and_pickles_only_without_safetensors(tmp_path):
    both = {"config.json": "{}", "preprocessor_config.json": "{ }", "modeling.py": "", "training_args.bin": ""}
    both |= {"model.safetensors": "weights", "pytorch_model.bin": "others", "README.md": "", "tf_model.h5": ""}
    wanted = ["config.json", "model.safetensors", "preprocessor_config.json"]
    with serving(Hub("org/model", both)) as hub:
        first, wrong, missing = ask(
            hub, tmp_path, ("org/model", {}), ("org/model", {"revision": "nope"}), ("org/other", {})
        )
        assert first == wanted
        assert wrong[0] == "ConfigError"
        assert "no such revision" in wrong[1]
        assert missing[0] == "ConfigError"
        assert "no such model" in missing[1]
        fetched = {
            path.rpartition("/")[2] for path, command in hub.requests if command == "GET" and "/resolve/" in path
        }
        assert fetched == set(wanted)
        hub.requests.clear()
        assert ask(hub, tmp_path, ("org/model", {})) == [wanted]
        assert hub.requests == []  # the cache first

    with serving(Hub("org/old", {"config.json": "{}", "pytorch_model.bin": "weights", "x.py": ""})) as hub:
        assert ask(hub, tmp_path, ("org/old", {})) == [["config.json", "pytorch_model.bin"]]


def test_weights_of_a_repository_with_a_program_are_not_even_fetched(tmp_path):
    config = json.dumps({"auto_map": {"AutoModel": "modeling.Evil"}})
    with serving(Hub("org/model", {"config.json": config, "modeling.py": "", "model.safetensors": "weights"})) as hub:
        ((kind, message),) = ask(hub, tmp_path, ("org/model", {}))
        assert kind == "DataError"
        assert "modeling.Evil" in message
        assert not [path for path, _ in hub.requests if path.endswith((".py", ".safetensors"))]


def test_a_hub_that_is_not_reached_is_a_transient_error_and_what_is_in_the_cache_loads(tmp_path):
    with serving(Hub("org/model", {})) as gone:
        pass
    folder = write_cache(tmp_path / "hub", "org/here", {"config.json": "{}", "model.safetensors": ""})
    here, (kind, message) = ask(gone, tmp_path, ("org/here", {}), ("org/model", {}))
    assert here == sorted(path.name for path in folder.iterdir())
    assert kind == "TransientError"
    assert "hf download org/model" in message
