"""import: the time of `import hookwright`, against importing the packages it stands on. Bytecode is warm for both."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

from benchmarks._harness import Report, alternate, at_most

if TYPE_CHECKING:
    from benchmarks._stalls import Watch

THEIRS = "anyio, httpx2, aiosqlite, pydantic, tenacity"


async def run(*, quick: bool, watch: Watch) -> Report:
    """Measure."""

    with tempfile.TemporaryDirectory(prefix="hookwright-bench-") as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)

        async def importing(names: str) -> float:
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {names}"], check=True, env=environment)
            return (time.perf_counter() - begin) * 1000

        await importing(THEIRS)
        await importing("hookwright")
        report = await alternate(
            "import: a fresh interpreter each",
            {
                "its five dependencies": ("ms", lambda: importing(THEIRS)),
                "hookwright": ("ms", lambda: importing("hookwright")),
            },
            count=1 if quick else 11,
        )
    report.compare("hookwright", "its five dependencies", target=at_most(1.50))
    return report
