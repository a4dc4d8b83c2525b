"""Write yarn.npz: rotary frequencies of Qwen2's YaRN, and logits past the original context, as transformers computes them in float32.

Run once, in a throwaway environment: `pip install torch transformers==4.57.6; PYTHONPATH=. python tests/parity/golden/make_yarn.py`.
The models and texts are tests/support/yarn.py's. Of each: a checksum of the weights, the logits of the last positions, and how far from them
(root mean square, in standard deviations) the model without YaRN is.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.support.random_qwen2 import checksum, write_hf
from tests.support.yarn import CASES, FACTOR, HEAD_DIMS, LAST, Case


def frequencies(head_dim: int) -> tuple[np.ndarray, float]:
    """Of 7B and 72B (128) and of 0.5B (64): radians a token, and the factor on cosines and sines."""
    scaling = {"rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": 32768}
    config = Qwen2Config(hidden_size=4 * head_dim, num_attention_heads=4, rope_theta=1e6, rope_scaling=scaling, max_position_embeddings=131072)
    inverse, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    return inverse.numpy(), float(factor)


def logits(case: Case, config: dict[str, Any]) -> np.ndarray:
    """Of the last positions [LAST, vocabulary]."""
    with tempfile.TemporaryDirectory() as folder:
        write_hf(Path(folder), config, case.weights())
        model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        return model(torch.tensor([case.text()]), logits_to_keep=LAST).logits[0].numpy()


def main() -> None:
    """Compute all and write them beside this file."""
    out: dict[str, np.ndarray] = {}
    for head_dim in HEAD_DIMS:
        inverse, factor = frequencies(head_dim)
        out[f"frequencies/{head_dim}"], out[f"factor/{head_dim}"] = inverse, np.array(factor)
    for name, case in CASES.items():
        with_yarn, without = logits(case, case.stretched), logits(case, case.config)
        apart = float(np.sqrt(((with_yarn - without) ** 2).mean(axis=1)).min() / with_yarn.std())
        print(f"{name}: standard deviation {with_yarn.std():.2f}; without YaRN {apart:.3f} apart, at least", flush=True)
        out[f"{name}/about"] = np.array(json.dumps({"checksum": checksum(case.weights()), "without": apart}))
        out[f"{name}/logits"] = with_yarn.astype(np.float32)
    np.savez_compressed(Path(__file__).with_name("yarn.npz"), **out)


if __name__ == "__main__":
    main()
