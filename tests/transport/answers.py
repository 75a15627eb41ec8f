"""What a transport answered, when it must be one or the other."""

from __future__ import annotations

from hookwright import Failure, Response


def status(answer: Response | Failure) -> int:
    assert isinstance(answer, Response), answer
    return answer.status


def code(answer: Response | Failure) -> str:
    assert isinstance(answer, Failure), answer
    return answer.code
