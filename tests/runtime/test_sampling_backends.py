"""Both backends sample as `sampling.py` says: the same distribution, and the same tokens for the same seed.

More draws with `QWEN2_LOCAL_ALL_POINTS=1 python -m pytest tests/runtime/test_sampling_backends.py`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qwen2_local import backends
from qwen2_local.backends.base import Backend, Choice, Layout, Row
from qwen2_local.chatml import render
from qwen2_local.loading import Opened, open_model
from qwen2_local.sampling import Window, choose, distribution, reference, uniform
from qwen2_local.types import Message, Sampling
from tests.support import random_qwen2, tiny
from tests.support.statistics import chi_squared_fits

LIMIT = 300
"""Of the random models' 320 ids."""
WIDTH = 200
DRAWS = 20_000 if os.environ.get("QWEN2_LOCAL_ALL_POINTS") else 8_000


@pytest.fixture(scope="module", params=["llama.cpp", "mlx"])
def deaf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """A model whose attention adds nothing: after the same token it has the same logits everywhere, so one step gives many draws."""
    folder = tmp_path_factory.mktemp("deaf")
    if request.param == "llama.cpp":
        pytest.importorskip("gguf")
        from qwen2_local.backends.llamacpp import LlamaCpp

        backend: Any = LlamaCpp.load(tiny.write_gguf(folder / "deaf.gguf", deaf=True, width=64, layers=1, inner=64), layout=Layout(1, 256), threads=1)
    else:
        pytest.importorskip("mlx")
        from tests.support import mlx_models

        config = random_qwen2.config(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64)
        weights = random_qwen2.weights(config, 1)
        for name in weights:
            if "o_proj" in name:
                weights[name][:] = 0
        backend = mlx_models.load(random_qwen2.write_mlx(folder, config, weights), context=256)
    yield backend
    backend.close()


@pytest.mark.parametrize(
    "choice",
    [
        Choice(LIMIT, temperature=1.5),
        Choice(LIMIT, temperature=4.0, top_p=0.95, top_k=20, repetition_penalty=1.1, penalized=np.arange(0, 300, 3, dtype=np.int32)),
        Choice(
            LIMIT, temperature=4.0, min_p=0.05, presence_penalty=0.5, frequency_penalty=0.2, logit_bias={7: 5.0},
            counted=np.array([7, 8], np.int32), counts=np.array([2, 9], np.int32), mask=lambda: np.full(10, 0x77777777, np.uint32),
        ),
    ],
    ids=["pure", "as Qwen2's own", "all others"],
)  # fmt: skip
def test_draws_have_the_distribution_of_the_reference(deaf: Backend, choice: Choice) -> None:
    token = 17
    deaf.arrange(Layout(1, 256))  # a test before may have failed half-way
    sequence = deaf.open()
    logits = deaf.step([Row(sequence, [token], logits="last")])[0].logits
    assert logits is not None
    expected = distribution(np.array(logits[-1]), choice)
    assert len(expected) >= 4
    drawn: Counter[int] = Counter()
    for start in range(0, DRAWS, WIDTH):
        deaf.trim(sequence, 0)
        rows = [Row(sequence, [token] * WIDTH, [replace(choice, uniform=uniform(3, start + place)) for place in range(WIDTH)])]
        drawn.update(chosen.token for chosen in deaf.step(rows)[0].chosen)
    assert drawn.total() == DRAWS
    assert chi_squared_fits(drawn, expected)


# The guide on both


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Opened, tuple[Backend, Backend]]]:
    if set(backends.available()) < {"mlx", "llama.cpp"}:
        pytest.skip("needs both backends")
    opened = open_model("guide:mlx-f32", backend="mlx")
    both = opened.plan.load(), open_model("guide:f16", backend="llama.cpp").plan.load()
    yield opened, both
    for backend in both:
        backend.close()


QUESTIONS = ["What is Qwen2?", "How do I install a model?", "你是谁？", "Say banana five times."]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.7, 0.8, 20, 1.1, seed=5),
        Sampling(1.0, seed=2**63, min_p=0.05),
        Sampling(repetition_penalty=1.3, penalty_window=16),
        Sampling(presence_penalty=1.5, frequency_penalty=0.5),
        Sampling(1.2, 0.9, 0, 1.05, seed=9, presence_penalty=0.5, frequency_penalty=-0.2, penalty_window=8, logit_bias={40: 3.0, 50: -100.0}),
    ],
    ids=["greedy", "Qwen2's own", "min_p", "window", "OpenAI's", "everything"],
)
def test_the_same_seed_gives_the_same_reply(pair: tuple[Opened, tuple[Backend, Backend]], sampling: Sampling) -> None:
    """Penalties, stops and random numbers alike: replies are equal, or first differ where the logits' own difference moves a token's edge."""
    opened, both = pair
    limit = opened.tokenizer.size
    same = 0
    for question in QUESTIONS:
        prompt = render(opened.tokenizer, [Message("user", question)])
        one, other = (write(backend, prompt, sampling, opened.stops, limit) for backend in both)
        same += one == other
        if one != other:
            place = next(n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
            require_tie(both, prompt, one[:place], sampling, limit, {one[place], other[place]})
    assert same >= len(QUESTIONS) // 2


def write(backend: Backend, prompt: Sequence[int], sampling: Sampling, stops: frozenset[int], limit: int) -> list[int]:
    """A reply of at most 24 tokens, with the stop that ended it."""
    sequence, fed, reply = backend.open(), list(prompt), []
    window = Window(prompt, sampling)
    while len(reply) < 24 and not (reply and reply[-1] in stops):
        choice = window.choice(limit, uniform(sampling.seed or 0, len(prompt) + len(reply)))
        (chosen,) = backend.step([Row(sequence, fed, [choice])])[0].chosen
        reply.append(chosen.token)
        window.add(chosen.token)
        fed = [chosen.token]
    backend.free(sequence)
    return reply


def require_tie(both: Sequence[Backend], prompt: Sequence[int], reply: Sequence[int], sampling: Sampling, limit: int, tokens: set[int]) -> None:
    """With logits between those of the two backends, each of `tokens` is chosen somewhere."""
    rows = []
    for backend in both:
        sequence = backend.open()
        logits = backend.step([Row(sequence, [*prompt, *reply], logits="last")])[0].logits
        assert logits is not None
        rows.append(np.array(logits[-1]))
        backend.free(sequence)
    window = Window(prompt, sampling)
    for token in reply:
        window.add(token)
    choice = window.choice(limit, uniform(sampling.seed or 0, len(prompt) + len(reply)))
    apart = float(np.abs(rows[0][:limit] - rows[1][:limit]).max())
    assert apart < 0.1, "the same model"
    # Weights change by a factor of e^(2 * apart / temperature) at most; probabilities and their sums by no more.
    slack = 4 * apart / max(sampling.temperature, 0.1)
    numbers = np.clip(choice.uniform + np.linspace(-slack, slack, 41), 0, 1 - 2**-53)
    moved = {reference(row, replace(choice, uniform=float(number))).token for row in rows for number in numbers}
    if sampling.temperature == 0:
        moved = {
            choose(row + np.eye(1, row.size, token, dtype=np.float32)[0] * 2 * np.float32(apart), choice).token for row in rows for token in tokens
        }
    assert tokens <= moved
