import pytest

from qwen2_local import fit
from qwen2_local.catalog import SIZES
from qwen2_local.errors import DoesNotFit

GB = 10**9


def test_memory_is_what_the_guide_tells():
    for size, told in zip(SIZES, ("0.7 GB", "1.4 GB", "5.3 GB", "35.6 GB", "50.3 GB"), strict=True):
        assert fit.show_gb(fit.memory_needed(size.gguf_bytes["q4_k_m"], size.kv_values_per_token, 8192)) == told


def test_kv_per_token_is_what_the_guide_tells():
    for size, kib in zip(SIZES, (12, 28, 56, 56, 320), strict=True):
        assert fit.kv_bytes(size.kv_values_per_token, 1) == kib * 1024
        assert fit.kv_bytes(size.kv_values_per_token, 1, kv_bits=8) == kib * 512


def test_the_largest_context_fits_and_the_next_does_not():
    weights, values, available = 4_680_000_000, 28672, 8 * GB
    largest = fit.largest_context(weights, values, available, 131072)
    assert largest % 256 == 0
    assert fit.memory_needed(weights, values, largest) <= available < fit.memory_needed(weights, values, largest + 256)
    assert fit.largest_context(weights, values, available, 300) == 300
    assert fit.largest_context(weights, values, weights, 8192) == 0


def test_what_fits_passes():
    fit.require(4 * GB, 28672, 8192, memory=fit.Memory(16 * GB, 8 * GB))


def test_what_does_not_fit_says_the_numbers_and_what_would():
    with pytest.raises(DoesNotFit) as caught:
        fit.require(4_680_000_000, 28672, 32768, what="7b", memory=fit.Memory(8 * GB, 6 * GB))
    assert caught.value.what == "7b needs 6.8 GB of memory at a context of 32,768; 6.0 GB of 8.0 GB are available."
    assert caught.value.hint == "The largest context that fits is 20224: `--context 20224`."
    with pytest.raises(DoesNotFit, match=r"7b needs 6\.8 GB") as caught:
        fit.require(4_680_000_000, 28672, 16384, kv_bits=32, what="7b", memory=fit.Memory(8 * GB, 6 * GB))
    assert caught.value.hint == "The largest context that fits is 9984: `--context 9984`."
    with pytest.raises(DoesNotFit, match="Take a smaller size or fewer bits"):
        fit.require(47 * GB, 163840, 256, memory=fit.Memory(8 * GB, 6 * GB))


def test_gigabytes_are_rounded_up():
    assert [fit.show_gb(count) for count in (0, 1, 10**8, 10**8 + 1)] == ["0.0 GB", "0.1 GB", "0.1 GB", "0.2 GB"]


def test_this_machine_has_memory():
    memory = fit.machine_memory()
    assert 0 < memory.available <= memory.total


def test_linux():
    text = "MemTotal:       24564552 kB\nMemFree: 1 kB\nMemAvailable:   20000000 kB\n"
    assert fit.parse_meminfo(text, fit.Memory(1, 1)) == fit.Memory(24564552 * 1024, 20000000 * 1024)
    assert fit.parse_meminfo("", fit.Memory(1, 1)) == fit.Memory(1, 1)


def test_macos():
    text = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            300000.
Pages inactive:                           20000.
Pages speculative:                         3000.
Pages wired down:                        100000.
Pages purgeable:                            400.
"""
    assert fit.parse_vm_stat(text, 16 * GB) == 33400 * 16384
    assert fit.parse_vm_stat("?", 16 * GB) == 12 * GB


def group(folder, limit, used, stat="", names=("memory.max", "memory.current")):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip((*names, "memory.stat"), (limit, used, stat), strict=True):
        (folder / name).write_text(f"{content}\n")


def test_a_container_has_what_its_groups_leave(tmp_path):
    machine = fit.Memory(16 * GB, 12 * GB)
    group(tmp_path / "a" / "b", "max", 2 * GB)
    group(tmp_path / "a", 4 * GB, 3 * GB, f"anon 5\ninactive_file {GB}")
    assert fit.within_cgroup(machine, "0::/a/b\n", tmp_path) == fit.Memory(4 * GB, 2 * GB)
    assert fit.within_cgroup(machine, "0::/elsewhere\n", tmp_path) == machine
    assert fit.within_cgroup(machine, "nonsense", tmp_path) == machine


def test_the_page_cache_of_a_container_is_available(tmp_path):
    machine = fit.Memory(16 * GB, 12 * GB)
    group(tmp_path, 4 * GB, 4 * GB - 1000, f"anon {GB}\nfile {3 * GB}\ninactive_file {GB}\nactive_file {2 * GB}\nworkingset_refault_file 7")
    assert fit.within_cgroup(machine, "0::/", tmp_path) == fit.Memory(4 * GB, 3 * GB + 1000)
    group(tmp_path, 4 * GB, GB, f"inactive_file {2 * GB}\nactive_file {2 * GB}")
    assert fit.within_cgroup(machine, "0::/", tmp_path) == fit.Memory(4 * GB, 4 * GB), "never more than the limit"


def test_a_container_of_version_1(tmp_path):
    machine = fit.Memory(16 * GB, 12 * GB)
    group(
        tmp_path / "memory",
        3 * GB,
        2 * GB,
        f"inactive_file 5\nactive_file 6\ntotal_inactive_file {GB // 2}\ntotal_active_file {GB // 2}",
        names=("memory.limit_in_bytes", "memory.usage_in_bytes"),
    )
    assert fit.within_cgroup(machine, "7:cpu,memory:/docker/abc\n", tmp_path) == fit.Memory(3 * GB, 2 * GB)
