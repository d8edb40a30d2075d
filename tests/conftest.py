"""What every test shares."""

import pytest


@pytest.fixture(autouse=True)
def _single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """f32 products on every machine, so that tolerances are those of f32."""
    for module in ("dilap.library", "dilap.supernet"):
        monkeypatch.setattr(f"{module}.has_fast_bf16", lambda: False)
