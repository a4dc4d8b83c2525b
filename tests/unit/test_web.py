"""What the environment says of the network, wherever a server is asked."""

import pytest

from qwen2_converters.hub import modelscope, sources
from qwen2_converters.web import Web
from qwen2_local.errors import FetchFailed

ASK = [Web, lambda: modelscope.listing("some/model"), lambda: sources.look_at_address("http://127.0.0.1:9/x.gguf")]


@pytest.fixture(autouse=True)
def endpoint(monkeypatch):
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize("ask", ASK)
def test_a_proxy_of_an_unknown_kind(ask, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "foo://nowhere")
    with pytest.raises(FetchFailed, match="proxy"):
        ask()


@pytest.mark.parametrize("ask", ASK)
def test_certificates_that_are_not_there(ask, monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
    with pytest.raises(FetchFailed, match="SSL_CERT_FILE"):
        ask()
