"""VideoGen: flat bodies with epoch seconds, Standard Webhooks, a closed catalogue of event types."""

from hookwright import FlatEnvelope, Profile, StandardWebhooks

PROFILE = Profile(
    envelope=FlatEnvelope(type_key="event", time_key="occurredAt", time_format="epoch"),
    signers=[StandardWebhooks()],
)
