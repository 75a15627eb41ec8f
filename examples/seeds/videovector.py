"""VideoVector: named endpoints scoped to indexes, Standard Webhooks, rotation with an overlap."""

from hookwright import Profile, StandardEnvelope, StandardWebhooks

PROFILE = Profile(envelope=StandardEnvelope(), signers=[StandardWebhooks()])

SCOPE = {"index_ids": ["idx_archive"]}
"""An endpoint's `filters`: only events whose `attributes` name one of these indexes reach it."""
