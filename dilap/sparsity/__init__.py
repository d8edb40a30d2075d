"""Zeros inside matrices, by share or N:M: magnitude, Wanda, SparseGPT, and LLM-Barber's second pass.

from dilap.sparsity.pattern import Pattern
Pattern.parse("2:4").require(weight, name="down_proj")  # raises VerificationFailed where zeros are missing
"""
