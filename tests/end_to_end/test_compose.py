"""docker/compose.yaml: checked as a file, and its services run for real, without containers, on a real PostgreSQL."""

import os
import re
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from hubert.core.paths import PROJECT
from hubert.core.process import start_process, stop_processes
from tasks.service.follow import INFO, follow, start_run
from tasks.service.prefect_api import connect
from tasks.service.register import register
from tasks.service.settings import CLIENT_RETRIES, HEARTBEAT_SECONDS, SERVERS, ServiceSettings, environment
from tests.support.postgresql import find_programs, postgresql
from tests.tasks.service.test_service import FLOWS
from tools.ports import free_ports

DOCKER = PROJECT / "docker"
SERVICES = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
PROGRAMS = Path(sys.executable).parent
GIVEN = {"POSTGRES_PASSWORD": "p@ss/w:rd", "PREFECT_AUTH_STRING": "someone:a-secret", "HUBERT_AUDIO": "/audio"}
PORTS = ("4200", "5000", "5432", "8080")
DEADLINE_SECONDS = 180.0


def test_the_file_follows_the_schema_of_compose():
    command = ["check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(DOCKER / "compose.yaml")]
    checked = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_linter_has_nothing_to_say_about_the_dockerfile():
    checked = subprocess.run(
        [PROGRAMS / "hadolint", DOCKER / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout) == (0, "")


def test_the_image_gets_all_that_the_project_consists_of():
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().split()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        word
        for words in re.findall(r"^COPY (.+) \S+$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
        for word in words.split()
    }
    assert kept == copied
    assert all((PROJECT / name).exists() for name in copied)
    assert {"hubert", "tasks", "flows", "deployments", "requirements.lock"} <= copied


def test_every_secret_has_to_be_given_and_every_port_is_for_this_machine_alone():
    text = (DOCKER / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+)", text)) == set(re.findall(r"\$\{(\w+):\?[^}]+\}", text)) == set(GIVEN)
    for name, service in SERVICES.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        for variable, value in service["environment"].items():
            assert value.startswith("${") or not re.search("PASSWORD|AUTH|SECRET", variable), variable
        assert "healthcheck" in service or service["restart"] == "on-failure", name


def test_the_containers_and_hubert_up_start_the_servers_alike():
    wanted = {
        **SERVERS,
        **CLIENT_RETRIES,
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "PREFECT_PLUGINS_ENABLED": "false",
    }
    found = {}
    for name in ("prefect", "mlflow", "worker"):
        found |= {variable: value for variable, value in SERVICES[name]["environment"].items() if variable in wanted}
    assert found == wanted
    settings = ServiceSettings()
    worker = SERVICES["worker"]["command"]
    assert (worker[worker.index("--pool") + 1], worker[worker.index("--name") + 1]) == (settings.pool, settings.worker)
    assert set(environment(settings)) - set(SERVICES["worker"]["environment"]) == {
        *("HUBERT_SERVICE", "NO_PROXY", "no_proxy"),  # there is no such folder, and no proxy in a container
        *("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY"),  # the image's
    }


class Plain:
    """The services of the compose file as processes of this machine: hosts, ports and folders are replaced, nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))

    def replace(self, name: str, text: str) -> str:
        hosts = r"^0\.0\.0\.0$|(?<==)0\.0\.0\.0$|(?<=[/@])(postgres|prefect|mlflow)(?=:\d)|^postgres$"
        text = re.sub(hosts, "127.0.0.1", text)
        text = re.sub(rf"\b({'|'.join(PORTS)})\b", lambda found: self.ports[found[1]], text)
        text = re.sub(r"^/data\b|(?<==)/data\b", str(self.folder / name), text)
        return re.sub(r"\$\{(\w+):\?[^}]+\}", lambda found: GIVEN[found[1]], text)  # last: a secret is no address

    def variables(self, name: str) -> dict[str, str]:
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_", "HUBERT_"))
        }
        image = {"DO_NOT_TRACK": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
        own = {key: self.replace(name, value) for key, value in SERVICES[name]["environment"].items()}
        return {**kept, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **image, **own}

    def words(self, name: str, words: list[str]) -> list[str]:
        program, *rest = (self.replace(name, word) for word in words)
        module = {"python": [], "prefect": ["-m", "prefect"], "mlflow": ["-m", "mlflow"]}
        if program not in module:
            return [str(find_programs() / program), *rest]
        return [sys.executable, *module[program], *rest]

    def is_healthy(self, name: str) -> bool:
        kind, *words = SERVICES[name]["healthcheck"]["test"]
        assert kind == "CMD"
        return subprocess.run(self.words(name, words), capture_output=True, check=False).returncode == 0

    @contextmanager
    def running(self, name: str):
        command, log = self.words(name, SERVICES[name]["command"]), self.folder / f"{name}.log"
        mark = f"{name} of {self.folder}"
        record = start_process(name, command, mark=mark, log=log, folder=PROJECT, environment=self.variables(name))
        try:
            yield record
        finally:
            killed = stop_processes([record], 30.0)
        assert killed == [], log.read_text()[-3000:]

    def wait_until_healthy(self, *names: str) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        for name in names:
            while not self.is_healthy(name):
                assert time.monotonic() < deadline, (self.folder / f"{name}.log").read_text()[-3000:]
                time.sleep(0.2)


@pytest.mark.skipif(find_programs() is None, reason="PostgreSQL's programs are not installed (Debian: postgresql)")
@pytest.mark.slow
def test_its_services_run_on_postgresql_without_containers(tmp_path, monkeypatch):
    plain = Plain(tmp_path)
    database = {key: plain.replace("postgres", value) for key, value in SERVICES["postgres"]["environment"].items()}
    user, password = database["POSTGRES_USER"], database["POSTGRES_PASSWORD"]
    port = plain.ports["5432"]
    client = plain.variables("worker")
    with ExitStack() as started:
        started.enter_context(postgresql(find_programs(), int(port), user, password))
        sql(port, user, password, f"CREATE DATABASE {database['POSTGRES_DB']};{(DOCKER / 'databases.sql').read_text()}")
        assert plain.is_healthy("postgres")
        for name in ("prefect", "mlflow"):
            started.enter_context(plain.running(name))
        plain.wait_until_healthy("prefect", "mlflow")
        registered = plain.words("deployments", SERVICES["deployments"]["command"])
        done = subprocess.run(registered, cwd=PROJECT, env=client, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert {"hubert-iteration/local", "hubert-pretraining/local"} <= set(re.split("[ ,\n]+", done.stdout))
        started.enter_context(plain.running("worker"))
        plain.wait_until_healthy("worker")

        for name in ("PREFECT_API_AUTH_STRING", "PREFECT_HOME"):
            monkeypatch.setenv(name, client[name])
        a_flow_completes(client, tmp_path)
        mlflow_takes_a_metric_and_a_file(client, tmp_path)
        answers_to_its_name_in_the_network_of_the_containers(client, plain.ports["5000"])
        assert sql(port, user, password, "SELECT state_type FROM flow_run", database["POSTGRES_DB"]) == "COMPLETED"
        assert sql(port, user, password, "SELECT key, value FROM metrics", "mlflow") == "loss|1.5"
    secrets = [GIVEN[name].encode() for name in ("POSTGRES_PASSWORD", "PREFECT_AUTH_STRING")]
    assert not [path for path in tmp_path.glob("*.log") if any(secret in path.read_bytes() for secret in secrets)]


def sql(port: str, user: str, password: str, text: str, database: str = "postgres") -> str:
    command = [find_programs() / "psql", "-qAt", "-h", "127.0.0.1", "-p", port, "-U", user, "-d", database]
    variables = {**os.environ, "PGPASSWORD": password}
    wanted = [*command, "-v", "ON_ERROR_STOP=1"]
    return subprocess.run(
        wanted, input=text, env=variables, text=True, check=True, stdout=subprocess.PIPE
    ).stdout.strip()


def a_flow_completes(client: dict[str, str], folder: Path) -> None:
    api_url, answer, said = client["PREFECT_API_URL"], folder / "answer.json", []
    assert httpx.post(f"{api_url}/deployments/filter", json={}, trust_env=False).status_code == 401
    assert "small/local" in register(api_url, FLOWS / "prefect.yaml", project=FLOWS)
    with connect(api_url) as api:
        run_id = start_run(api, "small", "local", {"answer": str(answer)})
    state = follow(api_url, client["PREFECT_UI_URL"], run_id, said.append, level=INFO)
    assert state["type"] == "COMPLETED", said
    assert api_url in answer.read_text()


def answers_to_its_name_in_the_network_of_the_containers(client: dict[str, str], port: str) -> None:
    address = f"{client['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/search"
    for host, code in (("mlflow", 200), ("localhost", 200), ("example.org", 403)):
        headers = {"Host": f"{host}:{port}"}
        assert httpx.post(address, json={"max_results": 1}, headers=headers, trust_env=False).status_code == code, host


def mlflow_takes_a_metric_and_a_file(client: dict[str, str], folder: Path) -> None:
    from mlflow.tracking import MlflowClient

    mlflow = MlflowClient(client["MLFLOW_TRACKING_URI"])
    run_id = mlflow.create_run(mlflow.create_experiment("containers")).info.run_id
    mlflow.log_metric(run_id, "loss", 1.5)
    mlflow.log_artifact(run_id, str(folder / "answer.json"))
    assert mlflow.get_run(run_id).data.metrics == {"loss": 1.5}
    assert len(list((folder / "mlflow" / "artifacts").rglob("answer.json"))) == 1
