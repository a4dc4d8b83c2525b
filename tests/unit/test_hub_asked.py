"""What people type after `pull`."""

import pytest

from qwen2_converters.hub.asked import understand
from qwen2_local.errors import UnknownModel, UsageError


@pytest.mark.parametrize(
    ("typed", "where", "level"),
    [
        ("7b", "Qwen/Qwen2-7B-Instruct", ""), (" 7B ", "Qwen/Qwen2-7B-Instruct", ""), ("7b-base", "Qwen/Qwen2-7B", ""),
        ("7b:q8_0", "Qwen/Qwen2-7B-Instruct", "q8_0"), ("0.5b:mlx-4bit", "Qwen/Qwen2-0.5B-Instruct", "mlx-4bit"),
        ("Qwen/Qwen2-7B-Instruct", "Qwen/Qwen2-7B-Instruct", ""), ("qwen/qwen2-7b-instruct", "qwen/qwen2-7b-instruct", ""),
        ("https://huggingface.co/Qwen/Qwen2-7B-Instruct", "Qwen/Qwen2-7B-Instruct", ""),
    ],
)  # fmt: skip
def test_models_of_the_catalog_stand_for_all_their_official_forms(typed, where, level):
    asked = understand(typed)
    assert (asked.kind, asked.where, asked.level, asked.exact) == ("repository", where, level, False)
    assert asked.model is not None


@pytest.mark.parametrize(
    ("typed", "where", "level", "source", "file", "revision"),
    [
        ("Qwen/Qwen2-7B-Instruct-GGUF:Q4_0", "Qwen/Qwen2-7B-Instruct-GGUF", "q4_0", "", "", ""),
        ("some/Qwen2.5-tune", "some/Qwen2.5-tune", "", "", "", ""),
        ("hf.co/some/tune-GGUF:Q4_K_M", "some/tune-GGUF", "q4_k_m", "huggingface", "", ""),
        ("https://huggingface.co/some/tune/tree/v2", "some/tune", "", "huggingface", "", "v2"),
        ("https://huggingface.co/some/tune/resolve/main/sub/x-q4_0.gguf?download=true", "some/tune", "", "huggingface", "sub/x-q4_0.gguf", "main"),
        ("https://huggingface.co/some/tune/blob/main/x.gguf", "some/tune", "", "huggingface", "x.gguf", "main"),
        ("https://www.modelscope.cn/models/some/tune/summary", "some/tune", "", "modelscope", "", ""),
        ("modelscope.cn/models/some/tune", "some/tune", "", "modelscope", "", ""),
    ],
)
def test_a_repository_stands_for_itself(typed, where, level, source, file, revision):
    asked = understand(typed)
    assert (asked.where, asked.level, asked.source, asked.file, asked.revision, asked.exact) == (where, level, source, file, revision, True)


def test_an_official_variant_is_known_by_its_size():
    assert understand("Qwen/Qwen2-72B-Instruct-GGUF").model.name == "72b"
    assert understand("someone/Qwen2-72B-Instruct-GGUF").model is None


def test_addresses_of_files():
    assert understand("https://example.org/a/m-q4_0.gguf?x=1").kind == "address"
    assert understand("http://127.0.0.1:8000/m.gguf").kind == "address"


def test_a_mirror_is_the_hub(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example.org/hf")
    assert understand("https://huggingface.co/some/tune").source == "huggingface"


def test_what_lies_here_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "tune").mkdir()
    (tmp_path / "7b").mkdir()
    assert understand("some/tune").kind == "path"
    assert understand("./7b").kind == "path"
    assert understand("7b").kind == "repository"


@pytest.mark.parametrize(
    ("typed", "error"),
    [
        ("", UnknownModel), ("9b", UnknownModel), ("a\0b", UnknownModel), ("no/such/file.gguf", UnknownModel), ("x.gguf", UnknownModel),
        ("../../etc/nothing", UnknownModel), ("http://example.org/m.gguf", UsageError), ("ftp://example.org/m.gguf", UsageError),
        ("https://example.org/model.bin", UsageError), ("https://me:secret@example.org/m.gguf", UsageError), ("https://[::1/m.gguf", UsageError),
        ("https://huggingface.co/some", UsageError), ("https://huggingface.co/some/tune/resolve/main/x.py", UsageError),
        ("some/tune:q4_0:x", UnknownModel), ("some/..", UnknownModel),
    ],
)  # fmt: skip
def test_what_is_no_model(typed, error):
    with pytest.raises(error) as caught:
        understand(typed)
    assert caught.value.hint
    assert "secret" not in str(caught.value)


def test_the_guide_need_not_be_fetched():
    with pytest.raises(UsageError, match="built in"):
        understand("guide")
