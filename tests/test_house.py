"""The layout of CONTRIBUTING.md: who may import whom, what must not be loaded, and how long files may become."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

# each part may import itself and the parts named here; what is in no list is not of this project
MAY_IMPORT = {
    "so101_sim": set(),
    "so101_env": {"so101_sim"},
    "so101": {"so101_sim", "so101_env"},
    "ppo_residual_so101": {"so101_sim", "so101_env", "so101"},
    "eval_so101": {"so101_sim", "so101_env", "so101"},
    "examples": {"so101_sim"},
    "benchmark": {"so101_sim", "so101_env", "so101", "ppo_residual_so101", "eval_so101"},
    "extras": {"so101_sim", "so101_env", "so101"},
}

# modules of so101/ that do not import torch and SciPy, also not through another module
WITHOUT_TORCH = (
    "arm_check", "base", "cli", "drive", "guide", "hub", "onnx", "policies", "record", "replay", "report", "serve",
    "subject", "tags", "virtual_arm",
)  # fmt: skip


def files_of(part: str) -> list[Path]:
    """The Python files of a part."""
    return [ROOT / f"{part}.py"] if (ROOT / f"{part}.py").is_file() else sorted((ROOT / part).rglob("*.py"))


def imports_of(path: Path, module_level: bool = False) -> set[str]:
    """Full names that a file imports; with module_level only those that its own import needs."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    if module_level:
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
        inner = {id(each) for function in functions for each in ast.walk(function)}
        nodes = [node for node in nodes if id(node) not in inner]
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_point_down(part):
    files = files_of(part)
    assert files
    nobodys = {path.stem for other in ("benchmark", "examples") if other != part for path in files_of(other)}
    for path in files:
        imported = {name.partition(".")[0] for name in imports_of(path)}
        assert imported & {*MAY_IMPORT} <= MAY_IMPORT[part] | {part}, path
        assert not imported & nobodys, path


def test_imports_are_found():
    """The test above would pass if no import was seen at all."""
    assert "so101_sim.vector.ArmVectorEnv" in imports_of(ROOT / "so101_env.py")
    assert "so101.recorder.Recorder" in imports_of(ROOT / "ppo_residual_so101.py", module_level=True)
    assert "so101.onnx.OnnxPolicy" in imports_of(ROOT / "so101" / "subject.py")
    assert "so101.onnx.OnnxPolicy" not in imports_of(ROOT / "so101" / "subject.py", module_level=True)


@pytest.mark.parametrize("package", ["so101", "so101_sim"])
def test_no_circle_among_the_modules_of_a_package(package):
    files = {f"{package}.{path.stem}": path for path in (ROOT / package).glob("*.py")}
    graph = {}
    for module, path in files.items():
        names = imports_of(path, module_level=True)
        names |= {name.rpartition(".")[0] for name in names}
        graph[module] = names & {*files}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert {*order} == {*files} and any(graph.values())


def test_what_runs_in_lerobots_environment_needs_nothing_else_of_the_project():
    for name in ("so101/wire.py", "so101/serve.py", "so101/groot.py", "so101/__init__.py"):
        own = {each for each in imports_of(ROOT / name) if each.partition(".")[0] in MAY_IMPORT}
        assert all(each.startswith(("so101.groot.", "so101.wire.")) for each in own), (name, own)


def test_the_simulation_knows_nothing_of_the_task_and_of_learning():
    for path in files_of("so101_sim"):
        text = path.read_text().lower()
        for word in ("paper", "tape", "residual", "reward"):
            assert word not in text, (path, word)
        assert not {name.partition(".")[0] for name in imports_of(path)} & {"torch", "tyro"}, path
    assert not {name.partition(".")[0] for name in imports_of(ROOT / "so101_env.py")} & {"torch", "tyro"}


def test_the_task_is_loaded_without_torch():
    code = "import sys, so101_env; env = so101_env.SO101ResidualEnv(); env.reset(seed=0); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.stdout == "False\n", done.stderr


def test_what_needs_neither_torch_nor_scipy_is_loaded_without_them():
    """They would take two thirds of the time of --help."""
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)"
    code += "\n    print(name, *{'torch', 'scipy'} & {*sys.modules})"
    words = [sys.executable, "-c", code, *(f"so101.{name}" for name in WITHOUT_TORCH)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=60)
    assert [line.split() for line in done.stdout.splitlines()] == [[name] for name in words[3:]], done.stderr


def test_the_root_has_three_scripts():
    assert {path.name for path in ROOT.glob("*.py")} == {"ppo_residual_so101.py", "eval_so101.py", "so101_env.py"}


def length_of(path: str) -> int:
    return len((ROOT / path).read_text().splitlines())


@pytest.mark.parametrize(
    "path, limit", [("ppo_residual_so101.py", 500), ("eval_so101.py", 280), ("so101_env.py", 750), ("README.md", 160)]
)
def test_files_that_people_read_first_stay_short(path, limit):
    assert length_of(path) <= limit


@pytest.mark.parametrize(
    "path, limit",
    [
        ("ppo_residual_so101.py", 60), ("so101/ppo_rgb.py", 75), ("so101/sac.py", 75), ("so101/distill.py", 75),
        ("so101/practice.py", 75),
    ],
)  # fmt: skip
def test_mains_stay_short(path, limit):
    (main,) = [node for node in ast.parse((ROOT / path).read_text()).body if getattr(node, "name", "") == "main"]
    assert main.end_lineno - main.lineno + 1 <= limit
    if path == "ppo_residual_so101.py":
        (loop,) = [node for node in ast.walk(main) if isinstance(node, ast.While)]
        assert loop.lineno - main.lineno <= 35
