"""Mistral."""

from dilap.models.families.family import Family

FAMILY = Family(name="mistral")
