"""imports: the time of `import hookwright`, against importing the packages it stands on."""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks._harness import Report, alternate


async def run(*, quick: bool) -> Report:
    """Measure."""

    async def importing(names: str) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {names}"], check=True)
        return (time.perf_counter() - begin) * 1000

    report = await alternate(
        "imports: a fresh interpreter each",
        {
            "its five dependencies": ("ms", lambda: importing("anyio, httpx2, aiosqlite, pydantic, tenacity")),
            "hookwright": ("ms", lambda: importing("hookwright")),
        },
        count=1 if quick else 11,
    )
    report.compare("hookwright", "its five dependencies", target="<= 1.50")
    return report
