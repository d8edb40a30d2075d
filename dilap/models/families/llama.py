"""The Llama family, on which the defaults of `Family` are modelled."""

from dilap.models.families.family import Family

FAMILY = Family(name="llama")
