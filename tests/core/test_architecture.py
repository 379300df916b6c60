"""The direction of imports, the size of the rooms, and what a training node has to have installed."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from hubert.core.paths import PROJECT

SERVICE = {"prefect", "prefect_dask", "dask", "distributed", "dask_ml", "dask_jobqueue", "mlflow"}
FORBIDDEN = {
    "hubert": SERVICE | {"tasks", "flows"},
    "tasks": {"flows"},
    "flows": {"mlflow", "dask_ml", "dask", "distributed"},
}
# What a package may import: those before it, and never one on the same floor.
FLOORS = (
    {"hubert.core"},
    {"hubert.settings"},
    {"hubert.data", "hubert.model"},
    {"hubert.features"},
    {"hubert.units"},
    {"hubert.training"},
    {"hubert.evaluation"},
    {"hubert.report"},
    {"hubert.runs"},
    {"hubert.cli"},
)
TASK_FLOORS = (
    {"tasks.service"},
    {"tasks.slurm"},
    {"tasks.clusters"},
    {"tasks.page", "tasks.tracking"},
)
MAX_MODULES = 12


def modules(*packages: str) -> dict[str, Path]:
    """Every module of some packages, by its dotted name."""
    files = [path for package in packages for path in sorted((PROJECT / package).rglob("*.py"))]
    return {".".join(path.relative_to(PROJECT).with_suffix("").parts): path for path in files}


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file: `from a.b import c` counts as `a.b.c` if that is one."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = PROJECT.joinpath(*node.module.split("."), f"{alias.name}.py")
                found.add(f"{node.module}.{alias.name}" if inner.exists() else node.module)
    return found


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_from_flows_to_tasks_to_hubert_and_never_back(package):
    found = modules(package)
    assert found
    assert not {name: wrong for name, path in found.items() if (wrong := tops(path) & FORBIDDEN[package])}


@pytest.mark.parametrize(("top", "floors"), [("hubert", FLOORS), ("tasks", TASK_FLOORS)])
def test_a_package_imports_only_those_below_it(top, floors):
    level = {package: number for number, floor in enumerate(floors) for package in floor}
    wrong = []
    for name, path in modules(top).items():
        package = ".".join(name.split(".")[:2])
        for other in imports_of(path):
            target = ".".join(other.split(".")[:2])
            if package in level and target in level and target != package and level[target] >= level[package]:
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_every_package_has_a_floor_and_says_what_it_may_import():
    for package in (name for floor in (*FLOORS, *TASK_FLOORS) for name in floor):
        init = PROJECT.joinpath(*package.split("."), "__init__.py")
        assert "import" in (ast.get_docstring(ast.parse(init.read_text())) or "").lower(), init
    rooms = {path.parent for path in (PROJECT / "hubert").glob("*/__init__.py")}
    assert {f"hubert.{room.name}" for room in rooms} == {name for floor in FLOORS for name in floor}


def test_no_module_imports_itself_through_others():
    found = modules("hubert", "tasks", "flows")
    graph = {name: {other for other in imports_of(path) if other in found} for name, path in found.items()}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("top", ["hubert", "tasks", "flows"])
def test_no_folder_holds_more_modules_than_a_reader_takes_in_at_once(top):
    folders = {path.parent for path in (PROJECT / top).rglob("*.py")}
    counts = {folder: len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) for folder in folders}
    assert not {str(folder.relative_to(PROJECT)): count for folder, count in counts.items() if count > MAX_MODULES}


@pytest.mark.parametrize(
    ("library", "owners"),
    [("mlflow", ["tasks.tracking.mirror", "tasks.tracking.registry"]), ("dask_ml", ["tasks.kmeans"])],
)
def test_only_the_tracking_knows_mlflow_and_one_file_dask_ml(library, owners):
    assert sorted(name for name, path in modules(*FORBIDDEN).items() if library in tops(path)) == owners


def test_a_training_node_needs_no_service_and_no_data_libraries():
    """`hubert.train` imports with torch, numpy, soundfile, pydantic and safetensors alone."""
    heavy = sorted(
        SERVICE | {"tasks", "flows", "polars", "sklearn", "torchaudio", "fastabx", "matplotlib", "pandas", "psutil"}
    )
    code = f"import sys, hubert.train; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert result.stdout.strip() == "[]"


def test_flows_spell_no_path_and_name_no_cluster():
    for path in (PROJECT / "flows").glob("*.py"):
        text = path.read_text()
        assert "LocalCluster" not in text
        assert "SLURM" not in text
        assert "Path(" not in text
