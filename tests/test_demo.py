"""The command line: the demo says the truth, and can be read anywhere."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys

import pytest
from rich.console import Console

from hookwright import Dispatcher, NetworkPolicy, __version__, _demo, cli


def test_the_demo_shows_every_outcome_in_a_pipe_and_exits_0() -> None:
    command = [sys.executable, "-m", "hookwright.cli", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    for name, outcome in (("healthy", "12"), ("flaky", "5"), ("down", "1"), ("gone", "'skipped': 5")):
        assert any(line.startswith(f"ok  {name}") and outcome in line for line in done.stdout.splitlines())
    assert "410" not in done.stdout or "gone" in done.stdout
    assert "whsec_" not in done.stdout


async def test_the_demo_says_so_when_an_outcome_is_not_the_expected_one() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system=None)
    assert not await _demo.run(console, {**_demo.EXPECTED, "flaky": {"failed": 5}})
    assert "NOT flaky" in out.getvalue()
    assert "Something went differently" in out.getvalue()


def test_received_text_can_neither_mark_up_nor_control_the_terminal() -> None:
    out = io.StringIO()
    Console(file=out, force_terminal=True, highlight=False).print(_demo.shown("[red]a\x1b[31m\x07"))
    assert "[red]a\\x1b[31m\\x07" in out.getvalue()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [(["version"], 0, __version__), (["listen", "--secret", "x"], 2, "whsec_"), (["nothing"], 2, "No such command")],
)
def test_the_command_line_answers(
    arguments: list[str], code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hookwright", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == code
    printed = capsys.readouterr()
    assert says in printed.out + printed.err


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "MISSING", True)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert 'pip install "hookwright[cli]"' in capsys.readouterr().err


async def test_listen_shows_what_comes(capsys: pytest.CaptureFixture[str], unused_tcp_port: int) -> None:
    async with Dispatcher("memory:", network=NetworkPolicy.development()) as dispatcher:
        endpoint = await dispatcher.endpoints.create(f"http://127.0.0.1:{unused_tcp_port}/", events=["*"])
        assert endpoint.secret is not None
        await dispatcher.endpoints.pause(endpoint.id)
        await dispatcher.emit("video.ready", {"id": "\x1b[31m"})

        async def resume() -> None:
            await dispatcher.endpoints.resume(endpoint.id)

        await asyncio.gather(cli.show_webhooks(unused_tcp_port, [endpoint.secret.reveal()], count=1), resume())
    out = capsys.readouterr().out
    assert "signature: verified" in out
    assert "\x1b" not in out
