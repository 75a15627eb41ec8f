"""VideoPilot: `sha256=` and a hexadecimal HMAC of the raw body, half a minute to answer, three retries."""

import tenacity

from hookwright import EventEnvelope, HexSignature, Profile, RetryPolicy, Timeouts

PROFILE = Profile(
    envelope=EventEnvelope(),
    signers=[HexSignature("X-VideoPilot-Signature", prefix="sha256=")],
    # "Use the event ID to prevent processing duplicate events": the same on every attempt.
    headers={"X-VideoPilot-Event-Id": "{event_id}"},
    retry=RetryPolicy(wait=tenacity.wait_exponential(multiplier=10), stop=tenacity.stop_after_attempt(4)),
    timeouts=Timeouts(total=30.0),
)
