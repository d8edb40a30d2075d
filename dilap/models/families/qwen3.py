"""Qwen3."""

from dilap.models.families.family import Family

FAMILY = Family(name="qwen3")
