"""The direction of imports, and what a training node has to have installed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from hubert.core.paths import PROJECT

SERVICE = {"prefect", "prefect_dask", "dask", "distributed", "dask_ml", "dask_jobqueue", "mlflow"}
FORBIDDEN = {
    "hubert": SERVICE | {"tasks", "flows"},
    "tasks": {"flows"},
    "flows": {"mlflow", "dask_ml", "dask", "distributed"},
}


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_from_flows_to_tasks_to_hubert_and_never_back(package):
    files = sorted((PROJECT / package).rglob("*.py"))
    assert files
    wrong = {
        str(path.relative_to(PROJECT)): found for path in files if (found := imports_of(path) & FORBIDDEN[package])
    }
    assert not wrong


@pytest.mark.parametrize(
    ("library", "owners"),
    [("mlflow", ["tasks/tracking/registry.py", "tasks/tracking/mirror.py"]), ("dask_ml", ["tasks/kmeans.py"])],
)
def test_only_the_tracking_and_the_registry_know_mlflow_and_one_file_dask_ml(library, owners):
    users = [path for package in FORBIDDEN for path in (PROJECT / package).rglob("*.py") if library in imports_of(path)]
    assert sorted(str(path.relative_to(PROJECT)) for path in users) == owners


def test_a_training_node_needs_no_service_and_no_data_libraries():
    """`hubert.train` imports with torch, numpy, soundfile, pydantic and safetensors alone."""
    heavy = sorted(SERVICE | {"tasks", "flows", "polars", "sklearn", "torchaudio", "fastabx", "matplotlib", "pandas"})
    code = f"import sys, hubert.train; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert result.stdout.strip() == "[]"


def test_flows_spell_no_path_and_name_no_cluster():
    for path in (PROJECT / "flows").glob("*.py"):
        if path.name == "cli.py":
            continue
        text = path.read_text()
        assert "LocalCluster" not in text
        assert "SLURM" not in text
        assert "Path(" not in text
