"""The Ministral family, which is built like Mistral; its config names the kind of attention of every layer."""

from dilap.models.families.family import Family

FAMILY = Family(name="ministral")
