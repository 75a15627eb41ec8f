"""TLS contexts: one for all, and one for each client certificate, made in a thread (37 ms each)."""

from __future__ import annotations

import asyncio
import ssl
import threading
from typing import TYPE_CHECKING

import httpx2

from hookwright.transport._dial import AuthFailed, DialFailed, OutOfResources, TLSFailed, lacking, lacks

if TYPE_CHECKING:
    from hookwright._certificate import ClientCertificate

_COPIED = ("check_hostname", "verify_mode", "verify_flags", "options", "minimum_version", "maximum_version")


class TLSContexts:
    """Makes contexts when they are first asked for, each once. `given` replaces the default one."""

    def __init__(self, given: ssl.SSLContext | None = None) -> None:
        self._given = given
        self._ready: dict[ClientCertificate | None, ssl.SSLContext] = {} if given is None else {None: given}
        self._coming: dict[ClientCertificate | None, asyncio.Future[ssl.SSLContext]] = {}

    async def of(self, scheme: str, certificate: ClientCertificate | None) -> ssl.SSLContext | None:
        """Return the context for a url of this scheme, None for plain http. Raises a DialFailed."""
        if scheme == "https":
            return await self._get(certificate)
        if certificate is not None:
            raise AuthFailed("a client certificate needs https")
        return None

    async def _get(self, certificate: ClientCertificate | None) -> ssl.SSLContext:
        ready = self._ready.get(certificate)
        if ready is not None:
            return ready
        loop = asyncio.get_running_loop()
        coming = self._coming.get(certificate)
        if coming is None or coming.get_loop() is not loop:
            coming = self._coming[certificate] = loop.create_future()
            arguments = (loop, coming, self._given, certificate)
            try:
                threading.Thread(target=_build, args=arguments, name="hookwright-tls", daemon=True).start()
            except RuntimeError:  # the system has no thread left
                del self._coming[certificate]
                raise OutOfResources("no thread left for a TLS context") from None
        try:
            # Shielded: one attempt's deadline is not the others'.
            context = self._ready[certificate] = await asyncio.shield(coming)
        finally:
            if coming.done():
                self._coming.pop(certificate, None)
        return context


def _build(
    loop: asyncio.AbstractEventLoop,
    coming: asyncio.Future[ssl.SSLContext],
    given: ssl.SSLContext | None,
    certificate: ClientCertificate | None,
) -> None:
    outcome: ssl.SSLContext | DialFailed
    # Whatever is raised here is raised again in the loop: a thread that ends silently would be waited for.
    try:
        # trust_env=False: the environment is the host application's, and SSL_CERT_FILE may be meant for something else.
        outcome = httpx2.create_ssl_context(trust_env=False) if given is None else _like(given)
    except Exception as error:  # noqa: BLE001  # no certificates, files that cannot be read, a context of another kind
        outcome = lacking(error) if lacks(error) else TLSFailed(f"no TLS context ({type(error).__name__})")
    else:
        try:
            if certificate is not None:
                certificate.load_into(outcome)
        except Exception as error:  # noqa: BLE001  # OpenSSL's errors, or the file system's
            said = f"the client certificate cannot be used ({type(error).__name__})"
            outcome = lacking(error) if lacks(error) else AuthFailed(said)
    try:
        loop.call_soon_threadsafe(_finish, coming, outcome)
    except RuntimeError:  # the loop was closed meanwhile
        return


def _like(given: ssl.SSLContext) -> ssl.SSLContext:
    """Return a context that trusts whom `given` trusts: a client certificate must not be added to somebody's own.

    Its certificates, checks, versions and ciphers are copied; what cannot be read of a context (a capath, ALPN) is not.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # it forbids the other settings until they are all there
    for name in sorted(_COPIED, key="check_hostname".__eq__):
        setattr(context, name, getattr(given, name))
    # TLS 1.3's own are not among what set_ciphers takes; they are always on.
    names = [str(cipher["name"]) for cipher in given.get_ciphers() if not str(cipher["name"]).startswith("TLS_")]
    if names:
        context.set_ciphers(":".join(names))
    trusted = given.get_ca_certs(binary_form=True)
    if trusted:
        context.load_verify_locations(cadata=b"".join(trusted))
    return context


def _finish(coming: asyncio.Future[ssl.SSLContext], outcome: ssl.SSLContext | DialFailed) -> None:
    if isinstance(outcome, DialFailed):
        coming.set_exception(outcome)
        coming.exception()  # whoever asked may be gone
    else:
        coming.set_result(outcome)
