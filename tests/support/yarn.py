"""Small models and long texts that show whether YaRN is right: what golden/make_yarn.py and test_yarn.py share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.support import random_qwen2
from tests.support.random_qwen2 import Weights

FACTOR = 4.0
VOCABULARY = 320
LAST = 24
"""Positions at the end of a text whose logits are compared."""


@dataclass(frozen=True)
class Case:
    """original: the context that YaRN stretches; tokens: of the text, more than that."""

    config: dict[str, Any]
    original: int
    tokens: int
    seed: int

    @property
    def stretched(self) -> dict[str, Any]:
        """The config with YaRN in it, as Qwen2's cards say to write it."""
        scaling = {"type": "yarn", "rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": self.original}
        return self.config | {"rope_scaling": scaling, "max_position_embeddings": round(FACTOR * self.original)}

    def weights(self) -> Weights:
        """Random, but attention is sharp enough to find its way in tens of thousands of tokens."""
        made = random_qwen2.weights(self.config, self.seed)
        for name in made:
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                made[name] *= np.float32(1.7)
        return made

    def text(self) -> list[int]:
        """Each quarter of it has its own words, so that looking at the wrong place shows; the end mixes them."""
        random = np.random.RandomState(self.seed)
        quarter = np.minimum(np.arange(self.tokens) * 4 // self.tokens, 3)
        ids = quarter * (VOCABULARY // 4) + random.randint(0, VOCABULARY // 4, self.tokens)
        ids[-4 * LAST :] = random.randint(0, VOCABULARY, 4 * LAST)
        return [int(n) for n in ids]


def _heads(count: int, kv: int, channels: int) -> dict[str, Any]:
    return {"num_attention_heads": count, "num_key_value_heads": kv, "hidden_size": count * channels, "vocab_size": VOCABULARY}


CASES = {
    "dense, past 32,768": Case(random_qwen2.config(**_heads(1, 1, 64), num_hidden_layers=1), 32768, 33_000, 1),
    "moe, past 32,768": Case(random_qwen2.moe_config(**_heads(1, 1, 64), num_hidden_layers=1, num_experts=4), 32768, 33_000, 2),
    "dense, heads 4/2 of 64, past 512": Case(random_qwen2.config(**_heads(4, 2, 64)), 512, 1800, 3),
    "dense, heads 2/1 of 128, past 512": Case(random_qwen2.config(**_heads(2, 1, 128)), 512, 1800, 4),
    "moe, heads 4/2 of 64, past 512": Case(random_qwen2.moe_config(**_heads(4, 2, 64)), 512, 1800, 5),
}
HEAD_DIMS = (64, 128)
"""Of Qwen2's models."""
