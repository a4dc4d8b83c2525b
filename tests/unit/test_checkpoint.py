import shutil
from pathlib import Path

import pytest

from qwen2_local.errors import BadFile
from qwen2_local.formats.checkpoint import expected_tensors, is_mlx, member, open_checkpoint, parameters
from qwen2_local.formats.config import parse_config
from tests.support.checkpoints import CONFIG, MOE_CONFIG, write_checkpoint


def tensors(config, experts="each", dtype="BF16"):
    return {name: (dtype, shape) for name, shape in expected_tensors(parse_config(config, "config.json"), experts)}


@pytest.mark.parametrize("shards", [1, 3])
def test_one_file_or_shards(tmp_path, shards):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, CONFIG, tensors(CONFIG), shards=shards))
    assert checkpoint.layout == "hf"
    assert len(checkpoint.shards) == shards
    assert len(checkpoint.tensors) == 2 + 2 * 12
    assert checkpoint.weight_bytes == 2 * parameters(checkpoint.config)
    assert checkpoint.raw == CONFIG


def test_a_single_file_may_have_an_index_as_mlx_lm_writes_it(tmp_path):
    folder = write_checkpoint(tmp_path, CONFIG, tensors(CONFIG), metadata={"format": "mlx"})
    names = ", ".join(f'"{name}": "model.safetensors"' for name in tensors(CONFIG))
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{names}}}}}')
    assert open_checkpoint(folder).layout == "mlx"
    assert is_mlx(folder)


def test_the_tied_head_may_be_there_and_inv_freq_is_ignored(tmp_path):
    made = tensors(CONFIG) | {"lm_head.weight": ("BF16", (300, 64)), "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (8,))}
    assert open_checkpoint(write_checkpoint(tmp_path, CONFIG, made)).config.tied


@pytest.mark.parametrize("experts", ["each", "fused", "switch"])
def test_the_three_layouts_of_experts(tmp_path, experts):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, MOE_CONFIG, tensors(MOE_CONFIG, experts)))
    assert checkpoint.weight_bytes == 2 * parameters(checkpoint.config)


def test_an_mlx_folder_with_some_matrices_quantized(tmp_path):
    config = CONFIG | {"quantization": {"group_size": 32, "bits": 4, "model.layers.0.mlp.up_proj": {"group_size": 64, "bits": 8}}}
    made = {}
    for name, (dtype, shape) in tensors(CONFIG).items():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and "layers.1" not in name:
            bits, group = (8, 64) if module.endswith("0.mlp.up_proj") else (4, 32)
            rows, columns = shape
            made[name] = ("U32", (rows, columns * bits // 32))
            made[f"{module}.scales"] = made[f"{module}.biases"] = ("BF16", (rows, columns // group))
        else:
            made[name] = (dtype, shape)
    folder = write_checkpoint(tmp_path, config, made)
    assert open_checkpoint(folder).layout == "mlx"
    assert is_mlx(folder)


@pytest.fixture
def snapshot(tmp_path):
    folder = write_checkpoint(tmp_path / "models--Qwen--x" / "snapshots" / "abc", CONFIG, tensors(CONFIG))
    blobs = tmp_path / "models--Qwen--x" / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        shutil.move(path, blobs / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    return folder


def test_a_snapshot_in_hugging_face_s_cache_is_links_into_blobs(snapshot):
    assert open_checkpoint(snapshot).layout == "hf"
    assert not is_mlx(snapshot)


def test_a_snapshot_is_opened_from_inside_and_by_a_link(snapshot, tmp_path, monkeypatch):
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    monkeypatch.chdir(snapshot)
    for folder in (link, Path()):
        assert open_checkpoint(folder).layout == "hf"
        assert not is_mlx(folder)


def test_a_member_is_a_file_of_the_folder(snapshot, tmp_path):
    assert member(snapshot, "config.json").read_text()
    assert not member(snapshot, "none.json").exists()
    outside = tmp_path / "secret.json"
    outside.write_text("{}")
    for folder in (snapshot, tmp_path / "plain"):
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").symlink_to(outside)
        with pytest.raises(BadFile, match="link out of its folder"):
            member(folder, "tokenizer.json")


@pytest.mark.parametrize(
    ("shape", "count", "tensor_count"),
    [
        ({"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864, "vocab_size": 151936}, 0.49e9, 290),
        ({"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 8960, "vocab_size": 151936}, 1.54e9, 338),
    ],
)
def test_the_real_sizes(shape, count, tensor_count):
    config = parse_config(CONFIG | shape, "config.json")
    assert parameters(config) == pytest.approx(count, rel=0.01)
    assert len(list(expected_tensors(config))) == tensor_count
