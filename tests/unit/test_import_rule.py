"""Rules for the source files: which module may import which, and how long a file or a function may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("orchestrator", "jobs")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# From top to bottom. Parts in one line are on the same floor. A part may import from its own floor and from the floors
# below it, never from those above.
FLOORS = (
    ("orchestrator.cli", "orchestrator.entry"),
    ("orchestrator.run",),
    ("orchestrator.worker",),
    ("orchestrator.doctor",),
    ("jobs.alexnet", "jobs.davidnet", "jobs.digits", "jobs.lenet5", "jobs.resnet18"),
    ("jobs.image_sets", "jobs.pictures", "jobs.verify_resume"),
    ("jobs.training",),
    ("jobs.loggers",),
    ("jobs.job",),
    ("jobs.optim",),
    ("jobs.data",),
    ("jobs.errors", "jobs.imports"),
    ("orchestrator.leaderboard",),
    ("orchestrator.cluster",),
    ("orchestrator.locking",),
    ("orchestrator.settings",),
    ("orchestrator.files",),
    ("orchestrator.rules",),
    ("orchestrator.records",),
    ("orchestrator.profile",),
    ("orchestrator.errors", "orchestrator.messages"),
    ("orchestrator", "jobs"),  # the __init__.py of both packages, which have only a version or a docstring
)


@dataclass(frozen=True)
class Import:
    """One imported module (or name in a module) at one place."""

    path: Path
    line: int
    module: str
    top_level: bool  # outside all functions, so it is executed when the file is imported

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.module}"

    def of(self, package: str) -> bool:
        return self.module == package or self.module.startswith(package + ".")


def name_of(path: Path) -> str:
    """Return the module of a file: orchestrator.cli.board for orchestrator/cli/board.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path) for path in FILES}


def imports_of(path: Path) -> list[Import]:
    """Return every import of a file: at the top, in functions, and under TYPE_CHECKING."""
    return list(_walk(path, ast.parse(path.read_text(encoding="utf-8")), top_level=True))


def _walk(path: Path, node: ast.AST, top_level: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(path, node.lineno, alias.name, top_level) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"  # `from package import module` imports the module
            yield Import(path, node.lineno, inner if inner in MODULES else str(node.module), top_level)
    typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    deferred = typing_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _walk(path, child, top_level and not deferred)


def part_of(module: str) -> str:
    """Return the part that a module belongs to: the package or module directly below orchestrator or jobs."""
    return ".".join(module.split(".")[:2])


def floor_of(module: str) -> int:
    (floor,) = [number for number, parts in enumerate(FLOORS) if part_of(module) in parts]
    return floor


def circles_of(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components that have more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph.get(name, ())):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def wrong(imports: list[Import]) -> str:
    return "\n".join(map(str, imports))


ALL = {path: imports_of(path) for path in FILES}
ORCHESTRATOR = {path: found for path, found in ALL.items() if name_of(path).split(".")[0] == "orchestrator"}
JOBS = {path: found for path, found in ALL.items() if name_of(path).split(".")[0] == "jobs"}

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
each_file_of_orchestrator = pytest.mark.parametrize("path", ORCHESTRATOR, ids=lambda path: str(path.relative_to(ROOT)))
each_file_of_jobs = pytest.mark.parametrize("path", JOBS, ids=lambda path: str(path.relative_to(ROOT)))


def test_the_walk_sees_every_kind_of_import(tmp_path):
    path = ROOT / "orchestrator" / "not_there.py"
    source = tmp_path / "source.py"
    source.write_text(
        "import torch.nn, os\n"
        "from orchestrator import rules, __version__\n"
        "from orchestrator.cluster.host import gpus\n"
        "if TYPE_CHECKING:\n    import for_types\nelse:\n    import for_real\n"
        "try:\n    import tried\nexcept ImportError:\n    pass\n"
        "class A:\n    import in_class\n    def f(self):\n        import in_method\n"
    )
    found = [(i.module, i.top_level) for i in _walk(path, ast.parse(source.read_text()), top_level=True)]
    assert found == [
        ("torch.nn", True),
        ("os", True),
        ("orchestrator.rules", True),
        ("orchestrator", True),
        ("orchestrator.cluster.host", True),
        ("for_types", False),
        ("for_real", False),
        ("tried", True),
        ("in_class", True),
        ("in_method", False),
    ]


PURE = [path for path in ORCHESTRATOR if path.parent.name == "rules" or path.stem in ("profile", "records", "messages")]
pure_file = pytest.mark.parametrize("path", PURE, ids=lambda path: str(path.relative_to(ROOT)))


@pure_file
def test_rules_and_records_import_nothing_of_the_project_but_each_other_and_messages(path):
    allowed = ("orchestrator.rules", "orchestrator.records", "orchestrator.profile", "orchestrator.messages")
    of_the_project = [i for i in ORCHESTRATOR[path] if any(map(i.of, PACKAGES))]
    assert not wrong([i for i in of_the_project if not any(map(i.of, allowed))])


@pure_file
def test_rules_and_records_import_nothing_that_has_a_clock_or_touches_the_outside(path):
    allowed = {"__future__", "collections", "dataclasses", "datetime", "enum", "itertools", "math", "orchestrator"}
    allowed |= {"pathlib", "pydantic", "pydantic_core", "re", "statistics", "typing"}
    assert not wrong([i for i in ORCHESTRATOR[path] if i.module.split(".")[0] not in allowed])


@pytest.mark.parametrize(
    ("library", "part"),
    [("sqlalchemy", "leaderboard"), ("submitit", "cluster")],
    ids=["only the leaderboard imports SQLAlchemy", "only the cluster imports submitit"],
)
def test_one_part_alone_knows_the_library(library, part):
    users = {path for path, imports in ALL.items() if any(i.of(library) for i in imports)}
    assert {name_of(path).split(".")[:2] == ["orchestrator", part] for path in users} == {True}, sorted(users)


@each_file_of_orchestrator
def test_orchestrator_imports_torch_and_jobs_only_inside_functions(path):
    heavy = ("torch", "torchvision", "jobs")
    assert not wrong([i for i in ALL[path] if i.top_level and any(map(i.of, heavy))])


@each_file_of_jobs
def test_jobs_never_import_the_command_line_the_cluster_or_the_leaderboard(path):
    forbidden = ("orchestrator.cli.main", "orchestrator.cluster.protocol", "orchestrator.leaderboard.leaderboard")
    assert not wrong([i for i in ALL[path] if any(map(i.of, forbidden))])


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_has_its_floor(module):
    assert any(part_of(module) in parts for parts in FLOORS), f"give {part_of(module)} a line in FLOORS"


def test_every_floor_has_its_modules():
    there = {part_of(module) for module in MODULES}
    assert {part for parts in FLOORS for part in parts} == there


def test_there_is_no_circle_and_no_arrow_upward(capsys):
    arrows = [(name_of(path), i) for path, imports in ALL.items() for i in imports if any(map(i.of, PACKAGES))]
    upward = [i for module, i in arrows if floor_of(i.module) < floor_of(module)]
    graph: dict[str, set[str]] = {}
    for module, i in arrows:
        graph.setdefault(module, set()).add(i.module)
    circles = circles_of(graph)
    with capsys.disabled():
        print(f"\n{len(MODULES)} modules, {len(arrows)} arrows: {len(circles)} circles, {len(upward)} arrows upward")
    assert not circles
    assert not wrong(upward)


@pytest.mark.parametrize(("package", "most"), [("orchestrator", 15), ("jobs", 16)])
def test_a_package_has_few_entries(package, most):
    entries = {path.relative_to(ROOT / package).parts[0] for path in FILES if package in path.relative_to(ROOT).parts}
    assert len(entries - {"__init__.py"}) <= most, sorted(entries)


def test_importing_all_of_orchestrator_loads_no_torch():
    modules = sorted(name for name in MODULES if name.split(".")[0] == "orchestrator")
    script = (
        "import importlib, sys\n"
        f"for name in {modules}:\n    importlib.import_module(name)\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'torchvision', 'jobs'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@each_file
def test_nothing_is_unpickled_but_tensors(path):
    """Checkpoints are read by torch.load with weights_only=True, which executes no code from the file."""
    loads = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads")
    ]
    assert all("weights_only=True" in map(ast.unparse, call.keywords) for call in loads), path


@each_file
def test_no_file_is_longer_than_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@each_file
def test_no_function_is_longer_than_60_lines(path):
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = {f"{f.name} in line {f.lineno}": f.end_lineno - f.lineno + 1 for f in functions}
    assert not {name: length for name, length in lengths.items() if length > 60}
