"""The Seed-OSS family; its biases are found in the tensors, all else is as in Llama."""

from dilap.models.families.family import Family

FAMILY = Family(name="seed_oss")
