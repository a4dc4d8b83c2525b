"""Write logits.npz: what transformers computes for small random Qwen2 models of every shape, in float32.

Run once, in a throwaway environment: `pip install torch transformers==5.23.0; PYTHONPATH=. python tests/parity/golden/make_logits.py`.
The weights are NumPy's, from a seed (tests/support/random_qwen2.py), so that the tests make the same ones without torch; the file holds, by
the name of a case, its config, its seed, a checksum of the weights, the token ids, and the logits at some of the positions.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.support.random_qwen2 import checksum, config, moe_config, weights, write_hf

UNTIED = {"tie_word_embeddings": False}
TOKENS = 96
POSITIONS = [0, 1, 2, 30, 63, 95]


def heads(count: int, kv: int, channels: int) -> dict[str, Any]:
    return {"num_attention_heads": count, "num_key_value_heads": kv, "hidden_size": count * channels}


CASES: dict[str, dict[str, Any]] = {
    "tied, heads 4/2 of 32": config(**heads(4, 2, 32)),
    "untied, heads 6/2 of 64": config(**heads(6, 2, 64), **UNTIED),
    "tied, heads 8/1 of 32, theta 1e4": config(**heads(8, 1, 32), rope_theta=1e4),
    "untied, heads 4/4 of 64, eps 1e-2": config(**heads(4, 4, 64), **UNTIED, rms_norm_eps=1e-2),
    "tied, heads 4/2 of 128, theta 1e4": config(**heads(4, 2, 128), rope_theta=1e4),
    "deep": config(**heads(4, 2, 32), num_hidden_layers=8),
    "yarn": config(
        **heads(4, 2, 64), rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, max_position_embeddings=128
    ),
    "moe, top 2 of 8": moe_config(**heads(4, 2, 32)),
    "moe, top 3 of 4, normalized": moe_config(**heads(4, 1, 64), num_experts=4, num_experts_per_tok=3, norm_topk_prob=True),
}


def main() -> None:
    """Compute each case and write them all beside this file."""
    out: dict[str, np.ndarray] = {}
    for seed, (name, case) in enumerate(CASES.items()):
        made = weights(case, seed)
        tokens = np.random.RandomState(seed).randint(0, case["vocab_size"], TOKENS)
        with tempfile.TemporaryDirectory() as folder:
            write_hf(Path(folder), case, made)
            model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
            assert not any(loading.values()), loading
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
        print(f"{name}: standard deviation {logits.std():.2f}")
        about = {"config": case, "seed": seed, "checksum": checksum(made), "positions": POSITIONS}
        out[f"{name}/about"] = np.array(json.dumps(about))
        out[f"{name}/tokens"] = tokens.astype(np.int32)
        out[f"{name}/logits"] = logits[POSITIONS].astype(np.float32)
    np.savez_compressed(Path(__file__).with_name("logits.npz"), **out)


if __name__ == "__main__":
    main()
