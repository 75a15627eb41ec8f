"""Every example runs: those of the README, of the docs, of every public docstring, and the files in examples/."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import hookwright
import hookwright.testing
from hookwright import receiver
from hookwright._models import DELIVERY_STATES

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"```python\n(.*?)```", re.DOTALL)
_EITHER = 'environ.get("DATABASE_URL"'
"""An example with this runs on both databases: with the variable, and without it."""


def _snippets() -> dict[str, str]:
    found: dict[str, str] = {}
    texts = {path.name: path.read_text("utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
    for package in (hookwright, hookwright.testing):
        for name in package.__all__:
            texts[f"{package.__name__}.{name}"] = inspect.getdoc(getattr(package, name)) or ""
    texts["hookwright.receiver.Verifier"] = inspect.getdoc(receiver.Verifier) or ""
    for name, text in texts.items():
        for number, snippet in enumerate(_FENCE.findall(text), start=1):
            found[f"{name} {number}"] = snippet
            if _EITHER in snippet:
                found[f"{name} {number} without it"] = snippet
    return found


SNIPPETS = _snippets()


@pytest.mark.parametrize("name", SNIPPETS)
async def test_an_example_in_the_documentation_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    snippet = SNIPPETS[name]
    if name.endswith(" without it"):
        monkeypatch.delenv("DATABASE_URL", raising=False)
    elif "DATABASE_URL" in snippet:
        monkeypatch.setenv("DATABASE_URL", request.getfixturevalue("postgres_database"))
    if "fastapi" in snippet and "asyncio.run(" not in snippet:
        compile(snippet, name, "exec")  # an application's own framework; the lifespan itself is run in examples/
        return
    if "asyncio.run(" in snippet:  # a program
        await asyncio.to_thread(exec, compile(snippet, name, "exec", dont_inherit=True), {"__name__": "__main__"})
        return
    code = compile(snippet, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    done = eval(code, {"__name__": "example"})
    if inspect.iscoroutine(done):
        await asyncio.wait_for(done, 20)


def test_every_test_that_the_document_on_security_names_exists() -> None:
    known = "\n".join(
        f"{path.name}\n{path.read_text('utf-8')}"
        for folder in ("tests", "src/hookwright/testing")
        for path in (ROOT / folder).rglob("*.py")
    )
    named = set(re.findall(r"test_[a-z0-9_]+(?:\.py)?", (ROOT / "docs" / "security.md").read_text("utf-8")))
    assert len(named) > 20
    assert [name for name in sorted(named) if name not in known] == []


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_file_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")


def test_every_public_thing_says_what_it_promises() -> None:
    missing = []
    for name in hookwright.__all__:
        thing: Any = getattr(hookwright, name)
        if inspect.isclass(thing):
            if not thing.__doc__:
                missing.append(name)
            for attribute, value in vars(thing).items():
                if not attribute.startswith("_") and inspect.isfunction(value) and not inspect.getdoc(value):
                    missing.append(f"{name}.{attribute}")
    assert missing == []


def test_the_state_diagram_in_the_design_is_the_table_in_the_code() -> None:
    lines = [
        f"    {before.value if before else '[*]'} --> {after.value}: {because}"
        for before, because, after in DELIVERY_STATES
    ]
    assert "stateDiagram-v2\n" + "\n".join(lines) in (ROOT / "docs" / "design.md").read_text("utf-8")


def test_the_readme_prints_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    for command in ("pip install uv && uv run hookwright demo", "pip install uv && uv run pytest"):
        assert f"\n    {command}\n" in readme
