"""The readers of strangers' files and `inspect` against mutated and random files, the known attacks, and the largest headers they accept.

A longer run: `python -m tests.faults.fuzz --minutes 5`.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2_local.errors import BadFile
from qwen2_local.formats.check_gguf import open_gguf
from qwen2_local.formats.checkpoint import open_checkpoint
from qwen2_local.formats.gguf import read_gguf
from qwen2_local.formats.summarize import summarize
from qwen2_local.manifest import Manifest
from tests.faults.fuzz import LIMIT_MB, MANIFEST, SUBJECTS, TENSORS, WAYS, mutated, obey
from tests.support.checkpoints import CONFIG, write_checkpoint
from tests.support.gguf_bytes import ARRAY, STRING, U16, info, key, model, string, whole
from tests.support.program import run

ROOT = Path(__file__).parents[2]

# Mutated and random files

number = st.integers(0, 2**32 - 1)
changes = st.lists(st.tuples(st.sampled_from(WAYS), number, number, number), max_size=4)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_any_file_is_read_or_refused_by_name(tmp_path, subject):
    @settings(suppress_health_check=[HealthCheck.too_slow], deadline=5000, max_examples=60)
    @given(seed=st.sampled_from(subject.seeds), changes=changes)
    def law(seed: bytes, changes: list[tuple[str, int, int, int]]) -> None:
        obey(subject, tmp_path, mutated(seed, changes))

    law()


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_random_bytes_are_refused(tmp_path, subject):
    @settings(deadline=5000, max_examples=25)
    @given(content=st.binary(max_size=300))
    def law(content: bytes) -> None:
        obey(subject, tmp_path, content)

    law()


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_the_seeds_are_sound(tmp_path, subject):
    """Else the mutations would not get far."""
    taken = [obey(subject, tmp_path, seed) for seed in subject.seeds]
    assert max(taken) >= 1
    assert 2 * sum(count >= 1 for count in taken) >= len(taken)


def test_every_way_changes_something():
    seed = SUBJECTS[1].seeds[0]
    for way in WAYS:
        assert any(mutated(seed, [(way, at, 1 + at, 7 * at)]) != seed for at in range(20)), way


def test_the_long_run_works_and_keeps_to_its_memory():
    done = subprocess.run([sys.executable, "-m", "tests.faults.fuzz", "--minutes", "0.02", "--seed", "3"], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["files"] > 10
    assert figures["peak_mb"] < LIMIT_MB


# The known attacks, rebuilt


def refused(path: Path, message: str) -> None:
    """By the readers, before any backend; and shown by `inspect` as what it is."""
    for reader in (read_gguf, open_gguf):
        with pytest.raises(BadFile, match=message):
            reader(path)
    assert re.search(message, summarize(path).faults[0])


def test_cve_2025_49847_a_token_longer_than_two_gigabytes(tmp_path):
    """llama_vocab::impl::token_to_piece casts a token's length to int32, finds it negative, so small enough, and copies all of it."""
    path = tmp_path / "m.gguf"
    size = 2**31 + 16
    head = model().build().split(string("tokenizer.ggml.tokens"))[0]
    with path.open("wb") as file:
        file.write(head + string("tokenizer.ggml.tokens") + struct.pack("<IIQQ", ARRAY, STRING, 1, size))
        # Sparse: the token really is there.
        file.truncate(file.tell() + size + 4096)
    refused(path, "its header is larger than")


TWO_63 = 2**61  # float32s


def test_cve_2025_53630_sizes_whose_sum_wraps(tmp_path):
    """gguf_init_from_file adds up the tensors' sizes in a size_t. The offsets are those that its sum has: after two halves of 2**64, 0 again."""
    path = tmp_path / "m.gguf"
    infos = [info("a", (TWO_63,), 0, 0), info("b", (TWO_63,), 0, 2**63), info("c", (8,), 0, 0)]
    path.write_bytes(whole([key("general.architecture", STRING, "qwen2")], infos, bytes(64)))
    refused(path, "'c' lies at 0, but the one before it ends at 18446744073709551616")


def test_cve_2026_27940_a_sum_that_wraps_with_what_is_added_to_it(tmp_path):
    """The check for the former passes a sum just below 2**64; the size of the context, sum and overhead of each tensor, wraps."""
    path = tmp_path / "m.gguf"
    infos = [info("a", (TWO_63,), 0, 0), info("b", (TWO_63 - 128,), 0, 2**63)]
    path.write_bytes(whole([key("general.architecture", STRING, "qwen2")], infos, bytes(64)))
    refused(path, "it is truncated: 1844674407370955")


def test_cve_2026_33298_a_tensor_whose_bytes_wrap_to_what_is_there(tmp_path):
    """ggml_nbytes: rows of 4 MiB, 2**42 + 1 of them, are 4 MiB again. The number of elements is below 2**63, so it passes that check."""
    path = tmp_path / "m.gguf"
    infos = [info("a", (2**20, 2**42 + 1), 0, 0), info("b", (8,), 0, 2**22)]
    path.write_bytes(whole([key("general.architecture", STRING, "qwen2")], infos))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 2**22 + 64)
    refused(path, rf"'b' lies at {2**22}, but the one before it ends at {2**64 + 2**22}")
    path.write_bytes(whole([key("general.architecture", STRING, "qwen2")], infos[:1]))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 2**22)
    refused(path, "it is truncated: 1844674407")


@pytest.mark.parametrize("shape", [(32, 4096), (32, 2**40)])
def test_cve_2026_7482_a_tensor_larger_than_the_file(tmp_path, shape):
    """Ollama quantized what its header promised, and published what lay in memory behind it."""
    from qwen2_converters.verify import verify

    lying = model()
    last = list(lying.tensors)[-1]
    path = tmp_path / "m.gguf"
    offset = read_gguf(_write(path, lying.build())).tensors[last].offset
    honest = info(last, lying.tensors[last], 0, 0)[:-8]
    content = path.read_bytes()
    assert content.count(honest) == 1
    path.write_bytes(content.replace(honest, info(last, shape, 0, 0)[:-8]))
    assert offset
    refused(path, "it is truncated")
    assert "it is truncated" in verify(path).faults[0]


def test_ghsa_7rxv_5jhh_j6xx_no_text_gets_into_llama_cpps_tokenizer():
    """llama_vocab::tokenize casts the number of tokens to an int. Prompts, messages and templates never reach it here."""
    forbidden = (
        "llama_tokenize",
        "llama_detokenize",
        "llama_token_to_piece",
        "llama_chat_apply_template",
        "Llama(",
        "jinja2",
        "diskcache",
        "pickle.load",
    )
    sources = [path for folder in ("qwen2_local", "converters", "tui") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 50
    assert [(path.name, name) for path in sources for name in forbidden if name in path.read_text("utf-8")] == []


@pytest.mark.parametrize("name", ["../../../../home/.bashrc", "/etc/passwd", "../x", "a/../b", "x\\..\\y", "sha256:../../x"])
def test_cve_2024_37032_names_that_lead_out_of_the_folder(tmp_path, name):
    """Ollama took a digest of this kind for the name of a blob's file."""
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(MANIFEST | {"files": [{"name": name, "size": 1, "sha256": "0" * 64}]}))
    with pytest.raises(BadFile, match="is refused"):
        Manifest.read(path)
    path.write_text(json.dumps(MANIFEST | {"files": [{"name": "m.gguf", "size": 1, "sha256": name}]}))
    with pytest.raises(BadFile, match="impossible size or sha256"):
        Manifest.read(path)
    folder = write_checkpoint(tmp_path / "m", CONFIG, {"a": ("BF16", (4,))})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": f"{name}.safetensors"}}))
    with pytest.raises(BadFile, match="is refused"):
        open_checkpoint(folder)
    assert "is refused" in summarize(folder).faults[0]


def test_cve_2024_34359_a_template_is_text(tmp_path):
    """llama-cpp-python rendered the template of any file with Jinja, unconfined."""
    made = model()
    attack = "{{ ''.__class__.__mro__[1].__subclasses__()[0]('touch %s') }}{%% for a in range(10**9) %%}{%% endfor %%}" % (tmp_path / "owned")
    made.keys["template"] = key("tokenizer.chat_template", STRING, attack)
    done = run("inspect", _write(tmp_path / "m.gguf", made.build()), "--template")
    assert done.returncode == 0
    assert attack in done.stdout
    assert not (tmp_path / "owned").exists()


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# The largest headers that are accepted

SHORT = struct.pack("<Q", 2) + b"ab"
PEAK = "import atexit, sys; from tests.faults.fuzz import peak_mb; atexit.register(lambda: print('peak', peak_mb(), file=sys.stderr))"


def strings(count: int, *keys: bytes) -> bytes:
    return whole([key("general.architecture", STRING, "qwen2"), *keys, string("k") + struct.pack("<IIQ", ARRAY, STRING, count) + SHORT * count], [])


def split_parts(folder: Path) -> Path:
    for index in range(2):
        part = strings(1_000_000, key("split.no", U16, index), key("split.count", U16, 2))
        path = _write(folder / f"m-{index + 1:05d}-of-00002.gguf", part)
    return path


def many_tensors(folder: Path) -> Path:
    return _write(
        folder / "m.gguf", whole([], [info(f"{'n' * 50}{index}", (1, 1, 1, 1), 24, index * 32) for index in range(65_536)], bytes(65_536 * 32))
    )


def wide_template(folder: Path) -> Path:
    """Four bytes a character in memory."""
    return _write(folder / "m.gguf", whole([key("tokenizer.chat_template", STRING, "a" * 15_900_000 + "😀")], []))


def large_index(folder: Path) -> Path:
    write_checkpoint(folder / "m", CONFIG, {"a": ("BF16", (4,))})
    entries = b",".join(b'"%06x":"%d"' % (index, index) for index in range(490_000))
    (folder / "m/model.safetensors.index.json").write_bytes(b'{"weight_map":{' + entries + b"}}")
    return folder / "m"


def many_entries(folder: Path) -> Path:
    raw = b"{" + b",".join(b'"%05x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % index for index in range(133_000)) + b"}"
    return _write(folder / "m.safetensors", struct.pack("<Q", len(raw)) + raw)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak")
@pytest.mark.parametrize("bomb", [split_parts, many_tensors, wide_template, large_index, many_entries])
def test_no_header_takes_200_mb_or_long(tmp_path, bomb):
    done = run("inspect", bomb(tmp_path), "--json", before=f"import sys; sys.path.insert(0, {str(ROOT)!r}); {PEAK}", timeout=60)
    assert done.returncode in (0, 3)
    peak = re.search(r"peak (\d+)", done.stderr)
    assert peak, done.stderr
    assert int(peak[1]) < LIMIT_MB


def test_values_in_a_config_are_counted(tmp_path):
    folder = write_checkpoint(tmp_path / "m", CONFIG, {"a": ("BF16", (4,))})
    (folder / "config.json").write_bytes(b'{"a":[' + b"[]," * 1_300_000 + b"0]}")
    with pytest.raises(BadFile, match="more than 125,000 values"):
        open_checkpoint(folder)


def test_tensors_of_a_checkpoint_are_counted(tmp_path):
    raw = b"{" + b",".join(b'"%05x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % index for index in range(50_001)) + b"}"
    folder = write_checkpoint(tmp_path / "m", CONFIG, {})
    _write(folder / "model.safetensors", struct.pack("<Q", len(raw)) + raw)
    with pytest.raises(BadFile, match="more than 50,000 tensors"):
        open_checkpoint(folder)


def test_the_sound_safetensors_seed_says_what_it_holds(tmp_path):
    """The law would also hold for readers that refuse everything."""
    path = _write(tmp_path / "model.safetensors", SUBJECTS[1].seeds[0])
    assert {tensor.name for tensor in summarize(path).tensors} == set(TENSORS)
