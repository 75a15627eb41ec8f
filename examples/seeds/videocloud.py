"""VideoCloud: secrets chosen by the caller, a hexadecimal HMAC of the raw body, an exact retry table."""

from hookwright import EventEnvelope, HexSignature, Profile, RetryPolicy

PROFILE = Profile(
    envelope=EventEnvelope(time_format="iso"),
    signers=[HexSignature("X-VideoCloud-Signature")],
    retry=RetryPolicy.schedule(0, 60, 5 * 60, 15 * 60, 30 * 60),
)
