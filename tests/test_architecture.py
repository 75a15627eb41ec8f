"""The layers, the sizes and the doors of the package, read from its source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hookwright
import hookwright.testing

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "hookwright"

# From the bottom up. A module imports only from lines above its own, and from its own line nothing but what
# WITHIN_A_LINE names. Lines 0 to 2 are L0 of docs/design.md, 3 to 5 L1, 6 to 7 L2, 8 to 11 L3, 12 L4, the rest L5.
LINES = [
    ["_errors", "_version", "storage.sql", "transport"],
    ["_clock", "_deadlines", "_pace", "_ids", "_secret", "_addresses", "_certificate", "storage._connections"],
    ["_health", "_conditions"],
    ["_models"],
    ["_envelope", "_signing", "_observe", "_vault", "transport._base", "storage._base"],
    ["_catalogue", "_retry", "storage"],
    ["_snapshot"],
    ["_profile", "_matching"],
    ["storage._cursor", "storage._emitted", "storage._rooms", "storage._lane_health", "storage.postgres._dsn"],
    ["transport._resolver", "transport._pools"],
    [
        "storage._rows",
        "storage.sqlite._owner",
        "storage.sqlite._wal",
        "storage.postgres._database",
        "storage.postgres._dsn",
    ],
    ["storage._memory_history", "storage.sqlite._bulk", "storage.postgres._convert", "transport._dial"],
    ["transport._tls", "transport._connection", "transport._discreet", "storage.postgres._pool"],
    ["storage.memory", "storage.sqlite._lanes", "storage.sqlite._schema", "transport._pinned"],
    ["storage.postgres._lanes", "storage.postgres._listener", "storage.postgres._enqueue"],
    ["storage.postgres._callers"],
    [
        "storage.postgres._schema",
        "storage.postgres._endpoints",
        "storage.postgres._history",
        "storage.postgres._release",
    ],
    ["storage.postgres._emits", "storage.postgres._requeue", "storage.postgres._settle"],
    ["storage.postgres._claim"],
    ["storage.postgres._turns"],
    ["storage.postgres"],
    ["storage.sqlite._claim", "storage.sqlite._endpoints", "storage.sqlite._enqueue", "storage.sqlite._history"],
    [
        "storage.sqlite._callers",
        "storage.sqlite._release",
        "storage.sqlite._settle",
        "transport.httpx",
        "transport.direct",
    ],
    ["storage.sqlite._requeue"],
    ["storage.postgres", "storage.sqlite"],
    ["_prepare", "_endpoint_fields", "_endpoint_views"],
    ["_blank"],
    ["_delivery"],
    ["_endpoints", "_events", "_explain"],
    ["_deliveries", "_emitter", "_settings"],
    ["_worker"],
    ["_services"],
    ["_dispatcher"],
    ["receiver"],
]
PUBLIC_NAMES_ONLY = ("testing", "cli", "_demo", "_demo_receivers", "__main__")
FOREIGN = {
    "httpx2": {"transport.httpx", "transport._pinned", "transport._tls"},
    "httpcore2": {"transport.httpx", "transport._pinned"},
    "httptools": {"transport.direct"},
    "aiosqlite": {"storage.sqlite._owner"},
    "sqlite3": {"storage.sqlite._owner", "storage.sqlite._schema"},
    "asyncpg": {"storage.postgres._pool"},
    "tenacity": {"_retry", "storage.postgres._pool", "storage.postgres._listener", "storage.postgres._emits"},
    "cryptography": {"_signing", "_vault"},
    "jsonschema": {"_catalogue"},
    "typer": {"cli"},
    "rich": {"cli", "_demo"},
}
LAZY_IMPORTS = {"cli", "_catalogue", "_signing", "_vault", "storage.postgres._pool", "transport.direct"}
MOST_LINES = 500
MOST_FUNCTION_LINES = 60


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
        found[name] = path
    return found


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""


def inside(name: str) -> str | None:
    """The module's name within the package, or None for another package's."""
    return name.removeprefix("hookwright").removeprefix(".") if name.split(".")[0] == "hookwright" else None


def test_every_module_imports_only_from_below() -> None:
    height = {module: line for line, names in enumerate(LINES) for module in names}
    wrong = []
    for module, path in modules().items():
        if module == "" or module.startswith(PUBLIC_NAMES_ONLY):
            continue
        assert module in height, f"{module} has no place in LINES: say where it belongs"
        for imported in imports(path):
            target = inside(imported)
            if target is None:
                continue
            if target in {"storage.sqlite", "storage.postgres"} and module.startswith(target):
                continue  # a sibling, named by `from hookwright.storage.sqlite import _claim`
            if target not in height or height[target] >= height[module]:
                wrong.append(f"{module} imports {target or 'the root'}")
    assert wrong == []


def test_the_storage_knows_nothing_of_observers_policies_or_transports() -> None:
    for module, path in modules().items():
        if module.startswith("storage"):
            found = {inside(name) for name in imports(path)}
            assert not found & {"_observe", "_retry", "transport._base", "transport.httpx"}, module


def test_foreign_libraries_are_used_in_their_own_place() -> None:
    for module, path in modules().items():
        for name in imports(path):
            allowed = FOREIGN.get(name.split(".")[0])
            assert allowed is None or module in allowed, f"{module} imports {name}"


def test_production_does_not_import_the_test_kit() -> None:
    for module, path in modules().items():
        if not module.startswith(("testing", "_demo", "cli")):
            assert not any((inside(name) or "").startswith("testing") for name in imports(path)), module


def test_the_receiver_needs_the_standard_library_only() -> None:
    for name in imports(SOURCE / "receiver.py"):
        assert name.split(".")[0] in sys.stdlib_module_names


def test_nothing_is_imported_inside_a_function_or_with_a_star() -> None:
    for module, path in modules().items():
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert [alias.name for alias in node.names] != ["*"], module
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and module not in LAZY_IMPORTS:
                assert not any(isinstance(inner, (ast.Import, ast.ImportFrom)) for inner in ast.walk(node)), module


def test_files_and_functions_stay_small() -> None:
    for path in [*SOURCE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        text = path.read_text("utf-8")
        assert text.count("\n") <= MOST_LINES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and path.is_relative_to(SOURCE):
                body = [part for part in node.body if not _is_docstring(part)]
                length = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                assert length <= MOST_FUNCTION_LINES, f"{path}: {node.name} has {length} lines"


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def test_no_file_reads_the_environment_or_sets_up_logging() -> None:
    for module, path in modules().items():
        tree = ast.parse(path.read_text("utf-8"))
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        forbidden = {"environ", "getenv", "basicConfig", "addHandler", "to_thread", "run_in_executor"}
        assert module == "cli" or not used & forbidden, module


def test_public_names_are_sorted_and_exist() -> None:
    for package in (hookwright, hookwright.testing):
        assert package.__all__ == sorted(package.__all__)
        for name in package.__all__:
            assert getattr(package, name, None) is not None, name


def test_importing_the_package_imports_neither_typer_nor_rich_nor_the_test_kit() -> None:
    unwanted = ("typer", "rich", "pytest", "hookwright.testing")
    program = f"import sys, hookwright; print([name for name in {unwanted} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_the_package_holds_source_and_nothing_else() -> None:
    files = [path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in files} <= {".py", ".sql"} | {
        path.suffix for path in files if path.name == "py.typed"
    }
