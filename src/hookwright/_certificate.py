"""ClientCertificate: how we prove to a receiver who we are (mutual TLS)."""

from __future__ import annotations

import ssl
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hookwright._errors import ConfigurationError

if TYPE_CHECKING:
    import os


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """A certificate (PEM, with its intermediates after it) and its private key (PEM), for receivers that ask for one.

    Give it to a Profile. The key is in no repr. A receiver that is reached over plain http, or through a transport that
    cannot present it, gets nothing: the attempt fails with `auth_error`.

    Raises ConfigurationError when certificate and key cannot be read, or do not belong together.

    ```python
    from hookwright import ClientCertificate, Profile


    def banking() -> Profile:
        return Profile(client_certificate=ClientCertificate.from_files("client.pem", "client.key"))
    ```
    """

    certificate: str
    key: str = field(repr=False)
    password: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        try:
            self.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        except (OSError, ValueError, TypeError) as error:  # ssl.SSLError is an OSError
            reason = getattr(error, "reason", None) or type(error).__name__
            raise ConfigurationError(
                f"client_certificate: certificate and key must be PEM texts that belong together ({reason})"
            ) from None

    def __repr__(self) -> str:
        return "ClientCertificate(...)"

    @classmethod
    def from_files(
        cls, certificate: str | os.PathLike[str], key: str | os.PathLike[str], password: str | None = None
    ) -> ClientCertificate:
        """Read both files now. Raises ConfigurationError."""
        try:
            return cls(Path(certificate).read_text("ascii"), Path(key).read_text("ascii"), password)
        except (OSError, UnicodeError) as error:
            # Without the path: a PEM text given in its place is a private key.
            reason = getattr(error, "strerror", None) or "it is no PEM text"
            raise ConfigurationError(f"client_certificate: a file cannot be read: {reason}") from None

    def load_into(self, context: ssl.SSLContext) -> None:
        """Make a TLS context present it. Reads and writes files: not on the loop. Raises ssl.SSLError or OSError."""
        # OpenSSL takes a certificate from a file only: ours is its owner's alone, and gone a moment later.
        handle, name = tempfile.mkstemp(prefix="hookwright-")
        try:
            with open(handle, "w", encoding="ascii") as file:  # noqa: PTH123  # a handle, not a path
                file.write(f"{self.key.strip()}\n{self.certificate.strip()}\n")
            # Never the terminal: without a password OpenSSL would ask there.
            context.load_cert_chain(name, password=self.password or "")
        finally:
            Path(name).unlink()
