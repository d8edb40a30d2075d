"""The Qwen3 family; its norms of queries and keys are found in the tensors, all else is as in Llama."""

from dilap.models.families.family import Family

FAMILY = Family(name="qwen3")
