"""The command line: `hookwright demo`, `hookwright listen`, `hookwright version`. Needs the extra `cli`."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated

from hookwright import __version__
from hookwright.testing import Inbox

try:
    import typer
    from rich.console import Console

    from hookwright import _demo
except ImportError:  # the extra is not installed; `main` says so
    MISSING = True
else:
    MISSING = False

if TYPE_CHECKING:
    from collections.abc import Sequence

ADVICE = 'The command line needs the extra "cli": pip install "hookwright[cli]"'


async def show_webhooks(port: int, secrets: Sequence[str], *, count: int | None = None) -> None:
    """Print every webhook that comes to 127.0.0.1:`port`; stop after `count`, if given."""
    async with Inbox(*secrets, port=port, echo=lambda text: print(text, flush=True)) as inbox:  # noqa: T201  # its purpose
        print(f"listening on {inbox.url} - stop with Ctrl-C", flush=True)  # noqa: T201  # its purpose
        if count is None:
            await asyncio.Event().wait()
        else:
            await inbox.wait_for(count, timeout=3600)


def _build() -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, add_completion=False, help="Webhooks from inside your application.")

    @app.command()
    def demo() -> None:
        """Show the whole way of a dozen events, with receivers that fail, recover, are down, and are gone."""
        if not asyncio.run(_demo.run(Console(highlight=False))):
            raise typer.Exit(1)

    @app.command()
    def listen(
        port: Annotated[int, typer.Option(help="Where to listen on 127.0.0.1; 0 takes a free one.")] = 8000,
        secret: Annotated[
            list[str] | None, typer.Option(envvar="HOOKWRIGHT_SECRET", help="Verify signatures by this secret.")
        ] = None,
        count: Annotated[int | None, typer.Option(help="Stop after so many webhooks.")] = None,
    ) -> None:
        """Receive webhooks on this machine, verify them, and show them."""
        try:
            asyncio.run(show_webhooks(port, secret or [], count=count))
        except KeyboardInterrupt:
            raise typer.Exit(0) from None
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--secret") from None

    @app.command()
    def version() -> None:
        """Print the version."""
        typer.echo(__version__)

    return app


def main() -> None:
    """Run the command line."""
    if MISSING:
        print(ADVICE, file=sys.stderr)  # noqa: T201  # there is nothing else to print with
        sys.exit(2)
    _build()()


if __name__ == "__main__":
    main()
