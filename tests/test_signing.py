"""Secrets that cannot be shown by accident, signatures that others accept, and a Verifier that raises one thing."""

from __future__ import annotations

import base64
import copy
import hmac
import json
import pickle
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import pytest
import standardwebhooks
from hypothesis import given, settings
from hypothesis import strategies as st

from hookwright import (
    ConfigurationError,
    Dispatcher,
    Ed25519Webhooks,
    HexSignature,
    Profile,
    Secret,
    StandardWebhooks,
    ValidationFailed,
    receiver,
)
from hookwright.receiver import VerificationFailed, Verifier
from hookwright.testing import FakeTransport
from tests.conftest import URL

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


def _some_text(random: Random) -> str:
    ranges = ((32, 126), (0xA0, 0x7FF), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF), (0, 31))
    return "".join(chr(random.randint(*random.choice(ranges))) for _ in range(random.randint(0, 40)))


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(min_value=0), shared=st.dictionaries(st.text(), st.text() | st.integers() | st.none()))
def test_the_reference_library_and_ours_accept_what_we_sign(seed: int, shared: dict[str, Any]) -> None:
    random = Random(seed)
    for _ in range(50):  # 10,000 deliveries in all
        secret = "whsec_" + base64.b64encode(random.randbytes(random.randint(24, 64))).decode()
        body = shared | {_some_text(random): _some_text(random) for _ in range(random.randint(0, 4))}
        raw = json.dumps(body, ensure_ascii=random.random() < 0.5).encode()
        id = "".join(random.choices("abcXYZ019_-", k=random.randint(1, 40)))
        now = int(datetime.now(UTC).timestamp()) + random.randint(-200, 200)
        other = Secret("whsec_" + base64.b64encode(random.randbytes(32)).decode())
        headers = StandardWebhooks().sign(event_id=id, timestamp=now, body=raw, secrets=[other, Secret(secret)])
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


# -- other schemes ----------------------------------------------------------------------------------------------

# The vector in the sources of Svix.
ED_SECRET = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg=="
ED_ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
ED_TIME = 1_614_265_330
ED_BODY = b'{"test": 2432232314}'
ED_TOKEN = "v1a,hnO3f9T8Ytu9HwrXslvumlUpqtNVqkhqw/enGzPCXe5BdqzCInXqYXFymVJaA7AZdpXwVLPo3mNl8EM+m7TBAg=="


def test_the_vector_of_ed25519_is_signed_and_verified() -> None:
    signer = Ed25519Webhooks()
    secret = Secret(ED_SECRET)
    headers = signer.sign(event_id=ED_ID, timestamp=ED_TIME, body=ED_BODY, secrets=[secret])
    assert headers == {"webhook-id": ED_ID, "webhook-timestamp": str(ED_TIME), "webhook-signature": ED_TOKEN}
    verifier = Verifier(signer.public_key(secret), now=lambda: ED_TIME)
    assert verifier.verify(ED_BODY, headers).payload == {"test": 2432232314}
    for changed in (headers | {"webhook-signature": ED_TOKEN[:-5] + "AAAA="}, headers | {"webhook-signature": "v1a,A"}):
        with pytest.raises(VerificationFailed, match="no signature"):
            verifier.verify(ED_BODY, changed)
    with pytest.raises(VerificationFailed, match="no signature"):
        verifier.verify(ED_BODY + b" ", headers)


def test_keys_of_ed25519_are_checked() -> None:
    signer = Ed25519Webhooks()
    raw = base64.b64decode(ED_SECRET.removeprefix("whsk_"))
    signer.check(signer.generate())
    signer.check(Secret("whsk_" + base64.b64encode(raw[:32]).decode()))
    wrong = ["whsk_AAAA", "whsk_!", SECRET, "whsk_" + base64.b64encode(raw[:63] + b"x").decode()]
    for text in wrong:
        with pytest.raises(ValidationFailed, match="secret"):
            signer.check(Secret(text))
    with pytest.raises(ValueError, match="whpk_"):
        Verifier("whpk_AAAA")


@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512"])
@pytest.mark.parametrize("prefix", ["", "sha="])
def test_a_plain_hexadecimal_signature_is_the_digest_of_the_raw_body(algorithm: Any, prefix: str) -> None:
    text = "your_webhook_secret"
    signer = HexSignature("X-Sig", prefix=prefix, algorithm=algorithm)
    headers = signer.sign(event_id="e", timestamp=1, body=BODY, secrets=[Secret.text(text), Secret.generate()])
    assert headers == {"X-Sig": prefix + hmac.new(text.encode(), BODY, algorithm).hexdigest()}
    verifier = Verifier.hex(text, header="x-sig", prefix=prefix, algorithm=algorithm)
    verified = verifier.verify(BODY, headers)
    assert (verified.id, verified.timestamp, verified.payload["username"]) == ("", None, "test_user")
    for body, changed in ((BODY + b" ", headers), (BODY, {"X-Sig": "x" + headers["X-Sig"]}), (BODY, {})):
        with pytest.raises(VerificationFailed):
            verifier.verify(body, changed)


def test_a_timed_hexadecimal_signature_covers_the_time_and_holds_one_for_each_secret() -> None:
    secrets = [Secret.text("the newer one of them"), Secret.text("the older one of them")]
    headers = HexSignature("X-Sig", timestamp=True).sign(event_id="e", timestamp=TIME, body=BODY, secrets=secrets)
    digests = [hmac.new(s.reveal().encode(), b"%d.%b" % (TIME, BODY), "sha256").hexdigest() for s in secrets]
    assert headers == {"X-Sig": f"t={TIME},v1={digests[0]},v1={digests[1]}"}
    for secret in secrets:
        verifier = Verifier.hex(secret, header="X-Sig", timestamp=True, now=lambda: float(TIME))
        assert verifier.verify(BODY, headers).timestamp == datetime.fromtimestamp(TIME, UTC)
        changes = (f"t={TIME + 1},v1={digests[0]}", f"v1={digests[0]}", f"t=1,t=1,v1={digests[0]}", f"t={TIME},v1=")
        for changed in changes:
            with pytest.raises(VerificationFailed):
                verifier.verify(BODY, {"X-Sig": changed})
    late = Verifier.hex(secrets[0], header="X-Sig", timestamp=True, now=lambda: TIME + 301.0)
    with pytest.raises(VerificationFailed, match="too old"):
        late.verify(BODY, headers)


def test_header_names_of_standard_webhooks_can_be_a_vendors() -> None:
    headers = StandardWebhooks(prefix="X-Vendor-").sign(
        event_id=ID, timestamp=TIME, body=BODY, secrets=[Secret(SECRET)]
    )
    assert headers == {"X-Vendor-id": ID, "X-Vendor-timestamp": str(TIME), "X-Vendor-signature": TOKEN}
    assert verifier(prefix="X-Vendor-").verify(BODY, headers).id == ID


def test_a_verifier_can_check_where_a_request_came_from() -> None:
    listed = verifier(sources=["52.1.2.3", "10.0.0.0/8", "2001:db8::/32"])
    for source in ("52.1.2.3", "10.9.8.7", "2001:db8::1", "::ffff:52.1.2.3"):
        assert listed.verify(BODY, HEADERS, source=source).id == ID
    for other in ("52.1.2.4", None, "", "nonsense", "2001:db9::1"):
        with pytest.raises(VerificationFailed, match="source"):
            listed.verify(BODY, HEADERS, source=other)
    with pytest.raises(ValueError, match="does not appear"):
        verifier(sources=["nowhere"])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: HexSignature("X Sig"), "header name"),
        (lambda: HexSignature("X-Sig", algorithm="md5"), "algorithm"),  # type: ignore[arg-type]  # that is tested
        (lambda: HexSignature("X-Sig", prefix="a", timestamp=True), "prefix"),
        (lambda: HexSignature("X-Sig", prefix="a\r\n"), "ASCII"),
        (lambda: StandardWebhooks(prefix="a b"), "header name"),
    ],
)
def test_a_signer_that_cannot_work_is_refused(make: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        make()


@pytest.mark.parametrize("options", [{"algorithm": "md5"}, {"secrets": ()}, {"secrets": ("short",)}])
def test_a_hexadecimal_verifier_that_cannot_work_is_refused(options: dict[str, Any]) -> None:
    secrets = options.pop("secrets", ("a long enough secret",))
    with pytest.raises(ValueError, match=r"secret|algorithm"):
        Verifier.hex(*secrets, header="X", **options)


async def test_every_signer_of_a_profile_signs_and_shared_headers_are_joined() -> None:
    transport = FakeTransport()
    profile = Profile(signers=[HexSignature("X-Old"), StandardWebhooks(), StandardWebhooks(prefix="x-new-")])
    async with Dispatcher("memory:", transport=transport, profiles={"default": profile}) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        assert endpoint.secret is not None
        await dispatcher.emit("a.b")
        await dispatcher.drain(timeout=5)
        [request] = transport.requests
        headers = dict(request.headers)
        assert Verifier.hex(endpoint.secret, header="X-Old").verify(request.body, headers).payload["type"] == "a.b"
        assert Verifier(endpoint.secret).verify(request.body, headers).payload["type"] == "a.b"
        assert Verifier(endpoint.secret, prefix="x-new-").verify(request.body, headers).payload["type"] == "a.b"


async def test_an_ed25519_profile_makes_its_own_kind_of_secret() -> None:
    transport = FakeTransport()
    signer = Ed25519Webhooks()
    profiles = {"default": Profile(signers=[signer])}
    async with Dispatcher("memory:", transport=transport, profiles=profiles) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        assert endpoint.secret is not None
        await dispatcher.emit("a.b")
        await dispatcher.drain(timeout=5)
        [request] = transport.requests
        verifier = Verifier(signer.public_key(endpoint.secret))
        assert verifier.verify(request.body, dict(request.headers)).payload["type"] == "a.b"
        with pytest.raises(ValidationFailed, match="whsk_"):
            await dispatcher.endpoints.create(URL, events=["*"], secret=SECRET)
