"""What of the environment decides which hub is asked."""

from __future__ import annotations

import pytest

from qwen2_converters.hub import huggingface
from qwen2_local.errors import UsageError


def test_a_mirror_takes_the_hubs_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/hub/")
    assert huggingface.endpoint() == "https://mirror.example/hub"
    monkeypatch.delenv("HF_ENDPOINT")
    assert huggingface.endpoint() == "https://huggingface.co"


@pytest.mark.parametrize("address", ["http://[bad", "mirror.example", "ftp://mirror.example", "https://", "https://mirror.example:x"])
def test_a_mirror_that_is_no_address_is_named(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(UsageError, match="HF_ENDPOINT"):
        huggingface.listing("Qwen/Qwen2-7B")
