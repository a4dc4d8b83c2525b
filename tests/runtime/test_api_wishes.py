"""What may be asked of a reply, many replies at once, and the async twins: the public API with the built-in model, on both backends."""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

import qwen2_local
from qwen2_local import Completion, Message, Piece, Qwen2, Sampling, backends
from qwen2_local.errors import InvalidPrompt, InvalidSampling, SchemaError, TruncatedReply, UnknownModel, UnsupportedSchema, UsageError, WorkerDied
from qwen2_local.types import Score, Usage
from tests.support import tiny_checkpoint

BACKENDS = ("llama.cpp", "mlx")
SMALLER = {"llama.cpp": "guide:q4_0", "mlx": "guide:mlx-4bit"}
QUESTION = "What is GGUF?"
QUESTIONS = [QUESTION, "What is MLX?", "How large is the 7B model?", "What does `ls` do?", "Hello", "什么是GGUF？"]
ENDLESS: dict[str, Any] = {"temperature": 100.0, "seed": 3, "max_tokens": 5000}


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name not in backends.available():
        pytest.skip(f"{name} is not installed here")
    return name


@pytest.fixture(scope="module")
def model(backend: str) -> Iterator[Qwen2]:
    with Qwen2("guide", backend=backend) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def reply(model: Qwen2) -> Completion:
    return model.stream(QUESTION, max_tokens=12).finish()


def soon(holds: Any, seconds: float = 10) -> bool:
    """Does it become true?"""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.01)
    return False


# Forms


FORMAT = {
    "type": "object",
    "properties": {"name": {"enum": ["GGUF", "MLX"]}, "year": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "year"],
    "additionalProperties": False,
}


class Format:
    """A pydantic model, as far as anybody looks."""

    def __init__(self, text: str) -> None:
        self.text = text

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return FORMAT

    @classmethod
    def model_validate_json(cls, text: str) -> Format:
        return cls(text)


class Picky(Format):
    @classmethod
    def model_validate_json(cls, text: str) -> Format:
        raise ValueError("The year is wrong.")


def test_a_schema_gives_its_value(model: Qwen2) -> None:
    value = model.ask("A file format", schema=FORMAT, max_tokens=100)
    assert value["name"] in ("GGUF", "MLX")
    assert 0 <= value["year"] <= 9
    assert set(value) == {"name", "year"}
    assert model.ask("A file format", schema={"enum": [["only", 1]]}) == ["only", 1]


def test_a_class_with_a_schema_gives_an_instance(model: Qwen2) -> None:
    value = model.ask("A file format", schema=Format, max_tokens=100)
    assert isinstance(value, Format)
    assert '"year"' in value.text
    assert isinstance(asyncio.run(model.aask("A file format", schema=Format, max_tokens=100)), Format)
    assert [type(one) for one in model.map(["A", "B"], schema=Format, max_tokens=100)] == [Format, Format]
    with pytest.raises(SchemaError, match="year is wrong"):
        model.ask("A file format", schema=Picky, max_tokens=100)


def test_a_reply_that_is_cut_short_is_no_value(model: Qwen2) -> None:
    with pytest.raises(TruncatedReply, match="whole"):
        model.ask("A file format", schema=Format, max_tokens=2)


def test_a_schema_that_cannot_be_kept_to(model: Qwen2, reply: Completion) -> None:
    for schema in ({"not": {"type": "string"}}, {"type": "array", "uniqueItems": True}, 5):
        with pytest.raises(UnsupportedSchema):
            model.ask("A file format", schema=schema)  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="only one"):
        model.stream("a", regex="a", choice=["b"])
    assert model.ask(QUESTION, max_tokens=12) == reply.text


def test_choice_and_regex(model: Qwen2) -> None:
    assert model.ask("Is GGUF a file format?", choice=["oui", "non"]) in ("oui", "non")
    date = model.stream("When?", regex="[0-9]{4}-[0-9]{2}").finish()
    assert len(date.text) == 7
    assert date.finish_reason == "stop"


# Ends, log-probabilities, sampling


def test_a_stop_string_ends_the_reply_and_is_never_shown(model: Qwen2, reply: Completion) -> None:
    middle = len(reply.text) // 2
    stop = reply.text[middle : middle + 6]
    stream = model.stream(QUESTION, max_tokens=12, stop=["never this", stop])
    assert "".join(piece.text for piece in stream) == reply.text[: reply.text.index(stop)]
    assert stream.completion is not None
    assert stream.completion.finish_reason == "stop"
    assert stream.completion.tokens == reply.tokens[: len(stream.completion.tokens)]
    assert model.ask(QUESTION, max_tokens=12) == reply.text
    with pytest.raises(InvalidSampling, match="stop"):
        model.ask(QUESTION, stop="")


def test_log_probabilities(model: Qwen2, reply: Completion) -> None:
    stream = model.stream(QUESTION, max_tokens=12, logprobs=3)
    pieces = [piece for piece in stream if piece.logprob is not None]
    done = stream.finish()
    assert done.tokens == reply.tokens, "they change nothing"
    assert done.logprobs == tuple((piece.logprob, piece.top) for piece in pieces)
    for piece in pieces:
        assert len(piece.top) == 3
        assert piece.top[0] == (piece.token, piece.logprob), "greedy: the likeliest"
        assert [logprob for _, logprob in piece.top] == sorted((logprob for _, logprob in piece.top), reverse=True)
        assert piece.logprob is not None
        assert piece.logprob <= 0
    assert reply.logprobs == ()
    assert model.stream(QUESTION, max_tokens=2, logprobs=0).finish().logprobs[0][1] == ()


def test_a_biased_token_comes_or_does_not(model: Qwen2, reply: Completion) -> None:
    first = reply.tokens[0]
    assert model.stream(QUESTION, max_tokens=1, logit_bias={first: -100}).finish().tokens[0] != first
    wanted = model.tokenizer.encode("x")[0]
    assert set(model.stream(QUESTION, max_tokens=3, logit_bias={wanted: 100}).finish().tokens) == {wanted}


def test_lookup_and_a_draft_change_nothing_but_the_speed(model: Qwen2, backend: str) -> None:
    text = "alpha beta gamma delta " * 6
    plain = model.complete(text, max_tokens=24).finish()
    assert model.complete(text, max_tokens=24, lookup=True).finish().tokens == plain.tokens
    with Qwen2("guide", backend=backend, draft=SMALLER[backend], context=512) as drafted:
        done = drafted.complete(text, max_tokens=24).finish()
        assert done.tokens == plain.tokens
        assert 0 <= done.usage.accepted_tokens <= done.usage.drafted_tokens
        assert done.usage.drafted_tokens > 0


def test_a_draft_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    config = tiny_checkpoint.dense()
    tiny_checkpoint.write(tmp_path / "other", config, tiny_checkpoint.weights(config))
    with pytest.raises(UsageError, match="vocabularies differ"):
        Qwen2("guide", draft=str(tmp_path / "other"))


# Scores


def test_a_score_is_of_every_token_but_the_first(model: Qwen2) -> None:
    text = "GGUF is the file format of llama.cpp."
    score = model.score(text)
    assert score.tokens == tuple(model.tokenizer.encode(text))[1:]
    assert len(score.logprobs) == len(score.tokens)
    assert all(logprob <= 0 for logprob in score.logprobs)
    assert score.perplexity >= 1
    assert asyncio.run(model.ascore(text)).logprob == pytest.approx(score.logprob, rel=1e-2)


def test_what_is_written_is_as_likely_as_it_is_scored(model: Qwen2) -> None:
    done = model.complete("What is GGUF?", max_tokens=1, logprobs=0).finish()
    token = model.tokenizer.decode(done.tokens)
    score = model.loglikelihood("What is GGUF?", token)
    assert score.tokens == done.tokens
    assert score.greedy
    assert score.logprob == pytest.approx(done.logprobs[0][0], abs=0.02)
    assert asyncio.run(model.aloglikelihood("What is GGUF?", token)).greedy


def test_token_ids_are_scored_from_any_place_on(model: Qwen2) -> None:
    ids = model.tokenizer.encode("GGUF is the file format of llama.cpp.")
    whole, end = model.score_ids(ids, 1), model.score_ids(ids, len(ids) - 2)
    assert whole == model.score("GGUF is the file format of llama.cpp.")
    assert end.tokens == tuple(ids[-2:])
    assert end.logprobs == pytest.approx(whole.logprobs[-2:], abs=1e-6)
    for first in (0, len(ids), -1):
        with pytest.raises(InvalidPrompt):
            model.score_ids(ids, first)


def test_what_is_known_of_a_prompt_is_what_is_cached(model: Qwen2) -> None:
    chat = model.chat()
    chat.send(f"{time.time()}: {QUESTION}", max_tokens=8)
    said = [*chat.ids(), *model.tokenizer.encode("and more")]
    assert model.known(said) == model.known(said) == model.write(said, max_tokens=1).finish().usage.cached_tokens
    assert model.pid is None, "it runs in this process"


def test_nothing_to_score(model: Qwen2) -> None:
    for call in (lambda: model.score(""), lambda: model.score("a"), lambda: model.loglikelihood("a", ""), lambda: model.loglikelihood("", "a")):
        with pytest.raises(InvalidPrompt):
            call()


# Many at once


def test_map_gives_the_replies_in_order(model: Qwen2) -> None:
    alone = [model.ask(question, max_tokens=8) for question in QUESTIONS]
    assert model.map(QUESTIONS, concurrency=4, max_tokens=8) == alone
    assert model.map((f"{question}\n" for question in QUESTIONS), concurrency=1, max_tokens=8) == alone, "lines of a file, say"
    assert model.map([]) == []
    assert asyncio.run(model.amap(QUESTIONS, concurrency=3, max_tokens=8)) == alone


def test_map_raises_the_first_error_and_stops_the_rest(model: Qwen2, reply: Completion) -> None:
    drawn: list[str] = []

    def prompts() -> Iterator[str]:
        for number in itertools.count():
            drawn.append("" if number == 3 else QUESTION)
            yield drawn[-1]

    with pytest.raises(InvalidPrompt, match="empty"):
        model.map(prompts(), concurrency=2, max_tokens=2)
    assert len(drawn) < 12, "few more are drawn than are under way"
    assert [thread for thread in threading.enumerate() if "map" in thread.name] == []
    assert model.ask(QUESTION, max_tokens=12) == reply.text


def test_an_error_of_the_prompts_themselves_stops_all(model: Qwen2) -> None:
    def prompts() -> Iterator[str]:
        yield QUESTION
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.map(prompts(), **ENDLESS)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(model.amap(prompts(), **ENDLESS))


@pytest.mark.parametrize("concurrency", [0, -1, True, 1.5])
def test_no_concurrency_at_all(model: Qwen2, concurrency: Any) -> None:
    with pytest.raises(UsageError, match="concurrency"):
        model.map(["a"], concurrency=concurrency)
    with pytest.raises(UsageError, match="concurrency"):
        asyncio.run(model.amap(["a"], concurrency=concurrency))


# Stopping


def test_a_stream_may_be_closed_from_another_thread(model: Qwen2, reply: Completion) -> None:
    stream = model.complete("Qwen2", **ENDLESS)
    pieces: list[Piece] = []
    reader = threading.Thread(target=lambda: pieces.extend(stream), daemon=True)
    reader.start()
    assert soon(lambda: len(pieces) > 3)
    stream.close()
    reader.join(10)
    assert not reader.is_alive()
    assert stream.completion is not None
    assert stream.completion.finish_reason == "cancelled"
    assert model.ask(QUESTION, max_tokens=12) == reply.text


def test_async_replies_come_piece_by_piece_and_together(model: Qwen2, reply: Completion) -> None:
    async def all_of_it() -> None:
        async with model.astream(QUESTION, max_tokens=12) as stream:
            pieces = [piece async for piece in stream]
        assert "".join(piece.text for piece in pieces) == reply.text
        assert stream.completion is not None
        assert stream.completion.tokens == reply.tokens
        assert await asyncio.gather(*(model.aask(QUESTION, max_tokens=12) for _ in range(4))) == [reply.text] * 4
        assert (await model.arespond([Message("user", QUESTION)], max_tokens=12).finish()).tokens == reply.tokens
        assert (await model.acomplete("Qwen2", max_tokens=2).finish()).usage.completion_tokens == 2
        with pytest.raises(InvalidPrompt):
            await model.aask("")
        with pytest.raises(InvalidPrompt):
            await model.acomplete("").finish()

    asyncio.run(all_of_it())


def test_a_cancelled_task_stops_the_work(model: Qwen2, reply: Completion) -> None:
    async def cancelled() -> list[Completion | None]:
        stream = model.acomplete("Qwen2", **ENDLESS)
        await anext(stream)
        tasks = [asyncio.create_task(work) for work in (stream.finish(), model.aask("Qwen2", **ENDLESS), model.amap(["Qwen2"] * 5, **ENDLESS))]
        await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        assert all(isinstance(one, asyncio.CancelledError) for one in await asyncio.gather(*tasks, return_exceptions=True))
        closed = model.acomplete("Qwen2", **ENDLESS)
        await anext(closed)
        await closed.aclose()
        while stream.completion is None:
            await asyncio.sleep(0.01)
        return [stream.completion, closed.completion]

    for done in asyncio.run(asyncio.wait_for(cancelled(), 60)):
        assert done is not None
        assert done.finish_reason == "cancelled"
    assert soon(lambda: not [thread for thread in threading.enumerate() if thread.name == "qwen2-local async"]), "nobody works on"
    assert model.ask(QUESTION, max_tokens=12) == reply.text


# What comes out


def test_every_result_travels_between_processes(model: Qwen2) -> None:
    done = model.stream(QUESTION, max_tokens=3, logprobs=2).finish()
    results = [
        done, replace(done, chunks=("a", "b")), done.usage, Usage(1, 2, 3, 0.5, 0.5, 4, 5), Piece("你", 7, -0.5, ((7, -0.5),)),
        model.score("GGUF is a file format."), Score((1,), (-0.5,), True), Message("user", "你"), model.info, model.sampling,
        Sampling(temperature=0.5, logit_bias={3: 1.5}, seed=7, penalty_window=64),
    ]  # fmt: skip
    for result in results:
        assert pickle.loads(pickle.dumps(result)) == result
        assert hash(result) == hash(pickle.loads(pickle.dumps(result)))


# A worker


def test_a_model_in_a_worker_is_the_same_model(model: Qwen2, backend: str, reply: Completion) -> None:
    with Qwen2("guide", backend=backend, worker=True) as remote:
        assert replace(remote.info, notes=()) == replace(model.info, notes=())
        done = remote.stream(QUESTION, max_tokens=12, logprobs=2).finish()
        assert done.tokens == reply.tokens
        assert len(done.logprobs) == len(done.tokens)
        assert remote.ask("Is it?", choice=["oui", "non"]) in ("oui", "non")
        assert remote.score("GGUF is a file.").logprob == pytest.approx(model.score("GGUF is a file.").logprob, rel=0.05)
        stream = remote.complete("Qwen2", **ENDLESS)
        next(stream)
        pid = remote._engine.pid  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDied):
            list(stream)
        assert stream.completion is not None, "what came is kept"
        assert remote.ask(QUESTION, max_tokens=12) == reply.text, "the next request starts another"


def test_idle_time_is_for_a_worker() -> None:
    with pytest.raises(UsageError, match="worker"):
        Qwen2("guide", idle_s=5)


# Slips of the hand


def test_an_option_that_does_not_exist_is_not_passed_over(model: Qwen2) -> None:
    slip: Any = {"max_token": 5}
    with pytest.raises(UsageError, match="Did you mean max_tokens"):
        model.ask("What is GGUF?", **slip)
    with pytest.raises(UsageError, match="max_tokens"):
        model.chat().send("What is GGUF?", **slip)


def test_what_is_no_text_and_no_message(model: Qwen2) -> None:
    for wrong in (None, 7, b"Hi"):
        with pytest.raises(UsageError, match="not a text"):
            model.ask(cast(Any, wrong))
        with pytest.raises(UsageError, match="not a text"):
            model.map([cast(Any, wrong)])
    for asked in ("Hi", [{"role": "user", "content": "Hi"}]):
        with pytest.raises(UsageError, match="not a Message"):
            model.respond(cast(Any, asked))


def test_one_text_is_not_taken_for_a_list_of_letters(model: Qwen2) -> None:
    with pytest.raises(UsageError, match="not several"):
        model.map("What is GGUF?")
    with pytest.raises(UsageError, match="not several"):
        asyncio.run(model.amap("What is GGUF?"))


def test_a_policy_that_does_not_exist(model: Qwen2) -> None:
    with pytest.raises(UsageError, match="overflow"):
        model.chat(overflow="drop")


def test_a_path_is_a_model_too(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"model\.gguf"):
        Qwen2(tmp_path / "model.gguf")
    with pytest.raises(UnknownModel):
        Qwen2(Path("guide"))  # a path, not the name


@pytest.mark.parametrize("idle_s", [0, -1])
def test_idle_time_is_time(idle_s: float) -> None:
    with pytest.raises(UsageError, match="idle_s"):
        Qwen2("guide", worker=True, idle_s=idle_s)


def test_a_score_shows_what_it_is_for() -> None:
    assert repr(Score((1, 2), (-1.0, -3.0), False)) == "Score(logprob=-4, perplexity=7.38906, greedy=False, tokens=2)"


def test_completion_in_a_notebook_offers_the_api() -> None:
    assert "Qwen2" in dir(qwen2_local)
    assert "logging" not in dir(qwen2_local)
