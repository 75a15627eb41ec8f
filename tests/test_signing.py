"""Secrets that cannot be shown by accident, signatures that others accept, and a Verifier that raises one thing."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import standardwebhooks
from hypothesis import given, settings
from hypothesis import strategies as st

from hookwright import Secret, StandardWebhooks, ValidationFailed, receiver
from hookwright.receiver import VerificationFailed, Verifier

# The example of the Standard Webhooks specification's libraries.
SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
ID = "msg_27UH4WbU6Z5A5EzD8u03UvzRbpk"
TIME = 1_649_367_553
BODY = b'{"email":"test@example.com","username":"test_user"}'
TOKEN = "v1,tZ1I4/hDygAJgO5TYxiSd6Sd0kDW6hPenDe+bTa3Kkw="
HEADERS = {"webhook-id": ID, "webhook-timestamp": str(TIME), "webhook-signature": TOKEN}


def verifier(*secrets: Any, **options: Any) -> Verifier:
    return Verifier(*(secrets or (SECRET,)), **({"now": lambda: float(TIME)} | options))


def test_the_vector_is_signed_and_verified() -> None:
    assert StandardWebhooks().sign(event_id=ID, timestamp=TIME, body=BODY, secrets=[Secret(SECRET)]) == HEADERS
    verified = verifier().verify(BODY, HEADERS)
    assert (verified.id, verified.timestamp) == (ID, datetime.fromtimestamp(TIME, UTC))
    assert verified.payload["username"] == "test_user"


@settings(max_examples=200, deadline=None)
@given(
    body=st.dictionaries(st.text(), st.text() | st.integers() | st.none()),
    key=st.binary(min_size=24, max_size=64),
    id=st.from_regex(r"[A-Za-z0-9_-]{1,40}", fullmatch=True),
)
def test_the_reference_library_and_ours_accept_what_we_sign(body: dict[str, Any], key: bytes, id: str) -> None:
    secret = "whsec_" + base64.b64encode(key).decode()
    raw = json.dumps(body).encode()
    now = int(datetime.now(UTC).timestamp())
    headers = StandardWebhooks().sign(event_id=id, timestamp=now, body=raw, secrets=[Secret.generate(), Secret(secret)])
    assert standardwebhooks.Webhook(secret).verify(raw, headers) == body
    assert Verifier(secret).verify(raw, headers).payload == body
    theirs = standardwebhooks.Webhook(secret).sign(id, datetime.fromtimestamp(now, UTC), raw.decode())
    assert Verifier(secret).verify(raw, headers | {"webhook-signature": theirs}).id == id


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"webhook-id": "other"}, "no signature fits"),
        ({"webhook-id": ""}, "webhook-id"),
        ({"webhook-id": "é"}, "ASCII"),
        ({"webhook-id": None}, "webhook-id"),
        ({"Webhook-Id": "twice"}, "more than one"),
        ({"webhook-timestamp": str(TIME + 1)}, "no signature fits"),
        ({"webhook-timestamp": "-1"}, "no number"),
        ({"webhook-timestamp": "9" * 400}, "no number"),
        ({"webhook-timestamp": str(TIME - 301)}, "too old"),
        ({"webhook-timestamp": str(TIME + 301)}, "future"),
        ({"webhook-signature": TOKEN.replace("v1", "v2")}, "no signature fits"),
        ({"webhook-signature": "v1,"}, "no signature fits"),
        ({"webhook-signature": "v1,!!!"}, "no signature fits"),
        ({"webhook-signature": 5}, "webhook-signature"),
    ],
)
def test_anything_else_is_refused_with_a_reason(change: dict[str, Any], says: str) -> None:
    with pytest.raises(VerificationFailed, match=says):
        verifier().verify(BODY, HEADERS | change)


def test_a_changed_byte_a_body_that_is_no_json_and_a_body_that_is_no_bytes_are_refused() -> None:
    with pytest.raises(VerificationFailed, match="no signature"):
        verifier().verify(BODY + b" ", HEADERS)
    with pytest.raises(VerificationFailed, match="raw bytes"):
        verifier().verify(BODY.decode(), HEADERS)  # type: ignore[arg-type]  # that is what is tested
    signed = StandardWebhooks().sign(event_id="a", timestamp=TIME, body=b"nope", secrets=[Secret(SECRET)])
    with pytest.raises(VerificationFailed, match="JSON"):
        verifier().verify(b"nope", signed)


def test_headers_may_be_bytes_in_any_case_and_one_of_several_secrets_fits_one_of_several_signatures() -> None:
    headers = {key.title().encode(): value.encode() for key, value in HEADERS.items()}
    assert verifier(Secret.generate(), Secret(SECRET)).verify(BODY, headers).id == ID
    many = HEADERS | {"webhook-signature": f"v1,AAAA v9,x {TOKEN}"}
    assert verifier().verify(BODY, many).id == ID


@settings(max_examples=300, deadline=None)
@given(
    body=st.binary(),
    headers=st.dictionaries(
        st.sampled_from(sorted(HEADERS)) | st.text() | st.binary(),
        st.text() | st.binary() | st.none() | st.integers(),
    ),
)
def test_whatever_comes_only_one_exception_is_raised(body: bytes, headers: dict[Any, Any]) -> None:
    with pytest.raises(VerificationFailed):
        verifier().verify(body, headers)


@pytest.mark.parametrize("arguments", [(), ("x",), ("whsec_AAAA",), ("whsec_!!",)])
def test_a_verifier_without_a_usable_secret_is_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"secret"):
        Verifier(*arguments)
    with pytest.raises(ValueError, match="tolerance"):
        Verifier(SECRET, tolerance=-1)


def test_the_receivers_file_works_when_copied_alone(tmp_path: Path) -> None:
    shutil.copy(Path(receiver.__file__), tmp_path / "webhooks.py")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import webhooks\n"
        f"v = webhooks.Verifier({SECRET!r}, now=lambda: {TIME})\n"
        f"print(v.verify({BODY!r}, {HEADERS!r}).id)\n"
    )
    command = [sys.executable, "-I", "-S", "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.strip() == ID


def test_a_secret_is_masked_everywhere_and_equal_only_to_itself() -> None:
    secret = Secret(SECRET)
    shown = [str(secret), repr(secret), f"{secret}", f"{secret:>20}", f"{[secret]!r}", repr(copy.deepcopy(secret))]
    assert not any("C2FV" in text for text in shown)
    assert secret.reveal() == SECRET
    assert copy.copy(secret) is copy.deepcopy(secret) is secret
    assert secret == Secret(SECRET)
    assert hash(secret) == hash(Secret(SECRET))
    assert secret != Secret.generate()
    assert secret != SECRET
    assert Secret.text("anything").reveal() == "anything"
    with pytest.raises(TypeError, match="reveal"):
        pickle.dumps(secret)
    with pytest.raises(AttributeError, match="changed"):
        secret.other = 1


def test_generated_secrets_have_32_bytes_and_an_id_with_a_dot_is_not_signed() -> None:
    assert len(base64.b64decode(Secret.generate().reveal().removeprefix("whsec_"))) == 32
    with pytest.raises(ValidationFailed, match="dot"):
        StandardWebhooks().sign(event_id="a.b", timestamp=1, body=b"", secrets=[Secret(SECRET)])
