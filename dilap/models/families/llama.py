"""Llama."""

from dilap.models.families.family import Family

FAMILY = Family(name="llama")
