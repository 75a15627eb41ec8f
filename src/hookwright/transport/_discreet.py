"""What httpcore2 logs of our attempts at DEBUG: the steps, without what was received in them.

Receivers echo what they are sent: a header of an answer, or the line that a parser refuses, may hold a token of ours.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar

attempting: ContextVar[bool] = ContextVar("hookwright-attempting", default=False)
"""Whether what is being done is an attempt of ours. An application's own requests are logged as ever."""

_LOGGERS = ("httpcore2.http11", "httpcore2.http2")


class _Discreet(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if attempting.get():
            record.msg, record.args = str(record.msg).partition(" ")[0], None
        return True


_FILTER = _Discreet()


def be_discreet() -> None:
    """See to it. Harmless when repeated."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_FILTER)
