"""The tables of docs/performance.md, made from the files of results."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from benchmarks._harness import figure

if TYPE_CHECKING:
    from pathlib import Path

_PLACE = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: Path, results: Path) -> list[str]:
    """Write the present figures into a page's places (`<!-- figures: NAME -->`); return the names."""
    text = page.read_text("utf-8")
    names = [place[2] for place in _PLACE.finditer(text)]
    tables = {name: table(json.loads((results / f"{name}.json").read_text("utf-8"))) for name in names}
    page.write_text(_PLACE.sub(lambda place: f"{place[1]}{tables[place[2]]}{place[3]}", text), "utf-8")
    return names


def table(found: dict[str, Any]) -> str:
    """Return the table of one benchmark in Markdown."""
    lines = ["| what | median | least - most | compared | target | |", "|---|---|---|---|---|---|"]
    for result in [*found["results"], *(found["stalls"] or [])]:
        values = result["values"]
        shown = f"{figure(result['median'])} {result['unit']} | {figure(min(values))} - {figure(max(values))}"
        compared = [" | ".join(_compared(one)) for one in result["comparisons"] or [None]]
        lines.extend(f"| {result['name']} | {shown} | {one} |" for one in compared)
    return "\n".join([*lines, *(f"\n{note}." for note in found["notes"])]) + "\n"


def _compared(compared: dict[str, Any] | None) -> tuple[str, str, str]:
    if compared is None:
        return "", "", ""
    ratio = f"{compared['value']:.2f} x {compared['reference']}" if compared["reference"] else ""
    met = {None: "", True: "met", False: "**miss**"}[compared["met"]]
    return ratio, compared["target"], met
