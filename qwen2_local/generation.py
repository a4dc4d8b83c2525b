"""What a model itself says about generation: how to sample, and which tokens end a reply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qwen2_local.errors import BadFile, InvalidSampling
from qwen2_local.types import Sampling

_LIMIT_IDS = 64


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """A model's own defaults: sampling, and the ids of the tokens that end a reply."""

    sampling: Sampling = field(default_factory=Sampling)
    eos: tuple[int, ...] = ()


def from_config(config: Mapping[str, object], *, fallback: GenerationDefaults, where: str = "generation_config.json") -> GenerationDefaults:
    """From a parsed generation_config.json, with Hugging Face's meaning: greedy unless `do_sample`, and the repetition penalty in both.

    `fallback` gives the sampling where the file is silent about it; its ids end a reply too. Raises BadFile naming the field.
    """
    given = {name: value for name, value in config.items() if value is not None}
    names = {"do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
    sampling = fallback.sampling
    if names & given.keys():
        penalty = given.get("repetition_penalty", 1.0)
        sample = given.get("do_sample", False)
        if not isinstance(sample, bool):
            raise _bad(where, "do_sample", sample)
        if sample:
            # What Hugging Face assumes for the values left out.
            kept = given.get("top_p", 1.0), given.get("top_k", 50), given.get("min_p", 0.0)
            sampling = _sampling(where, given.get("temperature", 1.0), *kept, penalty)
        else:
            sampling = _sampling(where, 0.0, 1.0, 0, 0.0, penalty)
    own = _ids(given["eos_token_id"], where) if "eos_token_id" in given else ()
    return GenerationDefaults(sampling, tuple(dict.fromkeys(own + fallback.eos)))


def from_gguf(
    keys: Mapping[str, object], special: Mapping[str, int], *, fallback: Sampling | None = None, where: str = "The GGUF file"
) -> GenerationDefaults:
    """From the keys of a GGUF file and the control tokens of its tokenizer.

    Files older than the `general.sampling.*` keys say nothing about sampling: they get `fallback`, or greedy. A GGUF names one end
    token; as in llama.cpp, the tokens called <|im_end|> and <|endoftext|> end a reply too. Raises BadFile naming the key.
    """
    prefix = "general.sampling."
    given = {name.removeprefix(prefix): value for name, value in keys.items() if name.startswith(prefix)}
    sampling = fallback or Sampling()
    if given.keys() & {"temp", "top_p", "top_k", "min_p", "penalty_repeat"}:
        kept = given.get("top_p", 1.0), given.get("top_k", 0), given.get("min_p", 0.0)
        sampling = _sampling(where, given.get("temp", 1.0), *kept, given.get("penalty_repeat", 1.0))
    named = [number for key in ("eos", "eot") if (number := keys.get(f"tokenizer.ggml.{key}_token_id")) is not None]
    known = [special[name] for name in ("<|im_end|>", "<|endoftext|>") if name in special]
    return GenerationDefaults(sampling, _ids(named + known, where))


def _sampling(where: str, temperature: object, top_p: object, top_k: object, min_p: object, penalty: object) -> Sampling:
    for name, value in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p), ("repetition_penalty", penalty)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _bad(where, name, value)
    if type(top_k) is not int:
        raise _bad(where, "top_k", top_k)
    assert isinstance(temperature, (int, float)) and isinstance(top_p, (int, float))
    assert isinstance(min_p, (int, float)) and isinstance(penalty, (int, float))
    try:
        return Sampling(float(temperature), float(top_p), top_k, float(penalty), min_p=float(min_p))
    except (InvalidSampling, OverflowError) as error:
        reason = error.what if isinstance(error, InvalidSampling) else "A value is too large."
        raise BadFile(f"{where}: {reason}", hint=_REPAIR) from error


def _ids(value: object, where: str) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    if len(ids) > _LIMIT_IDS or any(type(number) is not int or not 0 <= number < 2**31 for number in ids):
        raise _bad(where, "eos_token_id", value)
    return tuple(dict.fromkeys(ids))


_REPAIR = "Fetch the file again, or correct it."


def _bad(where: str, name: str, value: object) -> BadFile:
    return BadFile(f"{where}: {name} has no valid value ({repr(value)[:60]}).", hint=_REPAIR)
