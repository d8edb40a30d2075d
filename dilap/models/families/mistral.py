"""The Mistral family, which is built like Llama."""

from dilap.models.families.family import Family

FAMILY = Family(name="mistral", slides=True)
