"""The test server speaks as the hubs do: the real huggingface_hub works against it."""

from __future__ import annotations

import hashlib
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from tests.support.hub_server import HubServer, Proxy, git_blob_id

WEIGHTS = bytes(range(256)) * 40
CONFIG = b'{"model_type": "qwen2"}'


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("Qwen/Qwen2-0.5B", {"config.json": CONFIG, "model.safetensors": WEIGHTS}, card={"license": "apache-2.0"})
        yield server


def test_the_listing_names_sizes_and_hashes(hub: HubServer) -> None:
    info = HfApi(endpoint=hub.endpoint, token=False).model_info("Qwen/Qwen2-0.5B", files_metadata=True)
    assert info.sha == hub.repos["Qwen/Qwen2-0.5B"].commit
    assert info.card_data is not None
    assert info.card_data["license"] == "apache-2.0"
    assert info.siblings is not None
    config, weights = info.siblings
    assert (config.rfilename, config.size, config.blob_id, config.lfs) == ("config.json", len(CONFIG), git_blob_id(CONFIG), None)
    assert weights.lfs is not None
    assert (weights.size, weights.lfs.sha256) == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())


def test_the_tree_says_the_same(hub: HubServer) -> None:
    tree = HfApi(endpoint=hub.endpoint, token=False).list_repo_tree("Qwen/Qwen2-0.5B", recursive=True)
    assert [(entry.path, entry.size) for entry in tree] == [("config.json", len(CONFIG)), ("model.safetensors", len(WEIGHTS))]


def test_the_metadata_of_a_large_file_name_its_hash_and_a_signed_address(hub: HubServer) -> None:
    url = hf_hub_url("Qwen/Qwen2-0.5B", "model.safetensors", endpoint=hub.endpoint)
    meta = get_hf_file_metadata(url, token=False)
    assert (meta.etag, meta.size) == (hashlib.sha256(WEIGHTS).hexdigest(), len(WEIGHTS))
    assert meta.location.startswith(hub.cdn)


@pytest.mark.parametrize(("name", "data"), [("config.json", CONFIG), ("model.safetensors", WEIGHTS)])
def test_huggingface_hub_downloads(hub: HubServer, tmp_path: Path, name: str, data: bytes) -> None:
    path = hf_hub_download("Qwen/Qwen2-0.5B", name, endpoint=hub.endpoint, cache_dir=tmp_path, token=False)
    assert Path(path).read_bytes() == data
    assert hub.sent(name) == len(data)


def test_errors_are_those_that_the_client_knows(hub: HubServer) -> None:
    hub.add("Qwen/private", {}, token="secret")
    hub.add("Qwen/gated", {}, token="secret", gated=True)
    api = HfApi(endpoint=hub.endpoint, token=False)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("Qwen/private")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("Qwen/Qwen2-0.5B", revision="other")
    with pytest.raises(EntryNotFoundError):
        get_hf_file_metadata(hf_hub_url("Qwen/Qwen2-0.5B", "none.json", endpoint=hub.endpoint), token=False)
    with pytest.raises(GatedRepoError):
        HfApi(endpoint=hub.endpoint, token="secret").model_info("Qwen/gated")
    assert HfApi(endpoint=hub.endpoint, token="secret").model_info("Qwen/private").private


def get(address: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.netloc)
    connection.request("GET", f"{parts.path}?{parts.query}", headers=headers)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_ranges_are_served_while_the_etag_holds(hub: HubServer) -> None:
    hub.plain["a"] = b"0123456789"
    _, headers, _ = get(hub.url("a"))
    assert get(hub.url("a"), Range="bytes=3-", **{"If-Range": headers["ETag"]})[::2] == (206, b"3456789")
    assert get(hub.url("a"), Range="bytes=3-5")[::2] == (206, b"345")
    assert get(hub.url("a"), Range="bytes=3-", **{"If-Range": '"old"'})[::2] == (200, b"0123456789")
    assert get(hub.url("a"), Range="bytes=10-")[0] == 416


def test_modelscope_lists_and_serves(hub: HubServer) -> None:
    _, _, raw = get(f"{hub.endpoint}/api/v1/models/Qwen/Qwen2-0.5B/repo/files?Revision=master&Recursive=true")
    files = json.loads(raw)["Data"]["Files"]
    assert [(file["Path"], file["Size"]) for file in files] == [("config.json", len(CONFIG)), ("model.safetensors", len(WEIGHTS))]
    assert files[1]["Sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    for address in ("/models/Qwen/Qwen2-0.5B/resolve/master/", "/api/v1/models/Qwen/Qwen2-0.5B/repo?Revision=master&FilePath="):
        assert get(hub.endpoint + address + "config.json")[2] == CONFIG
        status, headers, _ = get(hub.endpoint + address + "model.safetensors")
        assert status == 302
        assert get(headers["Location"])[2] == WEIGHTS


def test_signed_addresses_expire(hub: HubServer) -> None:
    address = hub.sign("a", b"data")
    assert get(address)[0] == 200
    hub.signed.clear()
    assert get(address)[0] == 403


def test_the_proxy_forwards(hub: HubServer) -> None:
    hub.plain["a"] = b"data"
    with Proxy() as proxy:
        connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc)
        connection.request("GET", hub.url("a"))
        assert connection.getresponse().read() == b"data"
        connection.close()
        assert proxy.log == [hub.url("a")]
