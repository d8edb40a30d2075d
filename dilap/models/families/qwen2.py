"""Qwen2."""

from dilap.models.families.family import Family

FAMILY = Family(name="qwen2")
