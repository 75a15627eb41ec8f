"""Migrations: numbered, forward only; each is applied whole or not at all."""
