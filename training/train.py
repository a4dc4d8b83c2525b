"""Train the guide: `python training/train.py` rebuilds its tokenizer and weights from `guide/`, in under two hours on 2 CPU cores.

Needs torch, tokenizers and numpy (`training/requirements.txt`); nothing else of the project. Everything random comes from the seed.
Writes a Hugging Face checkpoint to `qwen2_local/guide/`. An interrupted training goes on where it was, from `training/out/`; the data
may have changed since, then it learns the new ones with the tokenizer it began with.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import struct
import sys
import time
from dataclasses import asdict
from pathlib import Path

import corpus
import torch
import torch.nn.functional as F
from model import FakeQuant, Qwen2, Shape
from tokenizer import learn
from tokenizers import Tokenizer
from torch import Tensor

HERE = Path(__file__).parent
OUT = HERE / "out"
GUIDE = HERE.parent / "qwen2_local" / "guide"
POOL = 2048
"""Conversations made at once: sorted by length, so that a batch pads little."""


class Encoder:
    """Conversations to ids, loss mask and positions."""

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        self.tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # an answer that names <|im_end|> writes it, and does not end with it
        self.start, self.end = (tokenizer.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
        self.newline = tokenizer.encode("\n").ids
        self.context = context

    def message(self, role: str, text: str) -> list[int]:
        return [self.start, *self.tokenizer.encode(f"{role}\n{text}").ids, self.end, *self.newline]

    def count(self, turn: corpus.Turn) -> int:
        return sum(len(self.message("assistant", text)) for text in turn)

    def conversation(self, system: str, turns: list[corpus.Turn], rng: random.Random, whole: float = 1.0) -> tuple[list[int], list[bool], list[int]]:
        """ids; which of them the loss counts (the replies with their end); positions, half of the time with random gaps between messages.

        whole: how often the last reply is there to its end; else only its beginning, which is where it is decided what is answered.
        """
        parts: list[tuple[list[int], bool]] = [(self.message("system", system), False)]
        for user, reply in turns:
            parts += [(self.message("user", user), False), (self.message("assistant", reply), True)]
        if rng.random() >= whole:
            parts[-1] = (parts[-1][0][: rng.randrange(10, 20)], True)
        size = sum(len(ids) for ids, _ in parts)
        room = (self.context - size - 1) if rng.random() < 0.5 else 0
        gaps = sorted(rng.randrange(int(max(1, room) ** rng.random()) + 1) for _ in parts) if room > 0 else [0] * len(parts)
        ids: list[int] = []
        counted: list[bool] = []
        positions: list[int] = []
        head = len([self.start, *self.tokenizer.encode("assistant\n").ids])
        for (part, reply), gap in zip(parts, gaps, strict=True):
            positions += range(len(ids) + gap, len(ids) + gap + len(part))
            ids += part
            tail = len(self.newline) if part[-len(self.newline) :] == self.newline else 0
            counted += [False] * head + [reply] * (len(part) - head - tail) + [False] * tail
        return ids, counted, positions

    def batch(self, rows: list[tuple[list[int], list[bool], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
        """ids and positions [batch, time], and the targets [batch, time] with -1 where no loss is counted."""
        longest = padded(max(len(ids) for ids, _, _ in rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        positions = torch.zeros_like(ids)
        targets = torch.full_like(ids, -1)
        for at, (row, counted, places) in enumerate(rows):
            size = len(row)
            ids[at, :size] = torch.tensor(row)
            positions[at, :size] = torch.tensor(places)
            following = torch.tensor([*row[1:], 0])
            kept = torch.tensor([*counted[1:], False])
            targets[at, :size] = torch.where(kept, following, -1)
        return ids, positions, targets


def padded(length: int) -> int:
    """Lengths come in few sizes: the CPU library compiles a kernel for each new shape."""
    step = 16 if length <= 256 else 128
    return min(-(-length // step) * step, Shape().context)


class Batches:
    """Batches without end, of about `tokens` tokens each."""

    def __init__(self, sampler: corpus.Sampler, encoder: Encoder, tokens: int) -> None:
        self.sampler, self.encoder, self.tokens = sampler, encoder, tokens
        self.answers = {answer for question in sampler.corpus.questions for answer in question.answer.values()}
        self.whole = 1.0  # how often an answer at a conversation's end is trained on to its own end
        self.ready: list[list[tuple[list[int], list[bool], list[int]]]] = []
        self.left: list[tuple[list[int], list[bool], list[int]]] = []

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        rng = self.sampler.rng
        if not self.ready:
            rows = [self._conversation(rng) for _ in range(POOL)]
            rows += self.left
            rows.sort(key=lambda row: len(row[0]), reverse=True)
            while rows and len(rows) >= (many := self.tokens // padded(len(rows[0][0]))):
                self.ready.append(rows[:many])
                rows = rows[many:]
            self.left = rows
            rng.shuffle(self.ready)
        return self.encoder.batch(self.ready.pop())

    def _conversation(self, rng: random.Random) -> tuple[list[int], list[bool], list[int]]:
        system, turns = self.sampler.conversation()
        # What is copied from the conversation, a text to repeat, say, is always there to its end.
        return self.encoder.conversation(system, turns, rng, self.whole if turns[-1][1] in self.answers else 1.0)

    def next_long(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        row = self.encoder.conversation(*self.sampler.long(tokens, self.encoder.count), self.sampler.rng)
        return self.encoder.batch([row])


def drill(rng: random.Random, tokens: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of copying and nothing else: random ids over and over, the loss on all but their first time."""
    time = 128
    ids = torch.zeros(tokens // time, time, dtype=torch.long)
    targets = torch.full_like(ids, -1)
    for row in range(len(ids)):
        period = rng.randrange(4, 32)
        once = torch.tensor(rng.choices(range(vocabulary), k=period))
        ids[row] = once.repeat(time // period + 1)[:time]
        targets[row, period - 1 : -1] = ids[row, period:]
    return ids, torch.arange(time).expand_as(ids), targets


def loss_of(model: Qwen2, ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(ids, positions).flatten(0, 1)
        targets = targets.flatten()
        wanted = (targets >= 0).nonzero().flatten()
        # Filled up with ignored places, again for the sake of few shapes.
        wanted = torch.cat((wanted, (targets < 0).nonzero().flatten()[: -len(wanted) % 512]))
        logits = model.logits(hidden[wanted])
    return F.cross_entropy(logits.float(), targets[wanted], ignore_index=-1)


def held_out_score(model: Qwen2, encoder: Encoder, items: list[corpus.Item]) -> tuple[float, list[str]]:
    """The share of `items` whose greedy reply is the whole right answer, and those that fail.

    Teacher forcing decides it: greedy decoding gives the answer exactly if it is the most likely token at every place.
    """
    rng = random.Random(0)
    failed = []
    with torch.no_grad():
        for at in range(0, len(items), 32):
            part = items[at : at + 32]
            rows = []
            for question, language, ask in part:
                ids, counted, _ = encoder.conversation(corpus.SYSTEM, [(ask, question.answer[language])], rng)
                rows.append((ids, counted, list(range(len(ids)))))
            ids, positions, targets = encoder.batch(rows)
            best = model.logits(model(ids, positions)).argmax(-1)
            right = ((best == targets) | (targets < 0)).all(1)
            failed += [f"{question.id}|{ask}" for (question, _, ask), ok in zip(part, right.tolist(), strict=True) if not ok]
    return 1 - len(failed) / len(items), failed


def save_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """bfloat16, sorted by name, with the metadata transformers writes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name in sorted(tensors):
        raw = tensors[name].to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
        header[name] = {"dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def export(model: Qwen2, encoder: Encoder, folder: Path) -> None:
    """Write the checkpoint: config, generation_config, tokenizer and weights."""
    shape = model.shape
    pad = encoder.tokenizer.token_to_id("<|endoftext|>")
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": pad,
        "eos_token_id": encoder.end,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.context,
        "max_window_layers": shape.layers,
        "model_type": "qwen2",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "sliding_window": shape.context,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocabulary,
    }
    generation = {"bos_token_id": pad, "do_sample": False, "eos_token_id": [encoder.end, pad], "pad_token_id": pad, "repetition_penalty": 1.0}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(OUT / name, folder / name)
    save_safetensors(folder / "model.safetensors", dict(model.state_dict()))


def learned_tokenizer(data: corpus.Corpus, seed: int) -> Tokenizer:
    """A tokenizer learned from conversations; the guide in place stays whole until the very end."""
    sampler = corpus.Sampler(data, seed)
    return learn((text for _ in range(20_000) for turn in sampler.conversation()[1] for text in turn), OUT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=30_000_000, help="tokens to train on")
    parser.add_argument("--batch", type=int, default=4096, help="tokens a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.006, help="of Muon, for the matrices")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=GUIDE, help="where the checkpoint goes")
    parser.add_argument("--resume", action="store_true", help="go on from training/out")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)

    data = corpus.load(options.seed)
    OUT.mkdir(exist_ok=True)
    state = OUT / "state.pt"
    resuming = options.resume and state.exists()
    # One learned anew, from data that have changed since, would give the saved weights' tokens other meanings.
    tokenizer = Tokenizer.from_file(str(OUT / "tokenizer.json")) if resuming else learned_tokenizer(data, options.seed + 1)
    encoder = Encoder(tokenizer, Shape().context)
    batches = Batches(corpus.Sampler(data, options.seed + 2), encoder, options.batch)

    model = Qwen2(Shape())
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() < 2]
    muon = torch.optim.Muon(matrices, lr=options.rate, momentum=0.95, weight_decay=0.02, adjust_lr_fn="original")
    groups = [{"params": [model.model.embed_tokens.weight], "lr": 0.002, "weight_decay": 0.01}, {"params": others, "lr": 0.002, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    optimizers = (muon, adam)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    size = sum(p.numel() for p in model.parameters())
    held = {"readings": list(corpus.single_readings(data)), "entries": list(corpus.entries(data))}
    corpus_tokens = tokenizer.get_vocab_size()
    counts = ", ".join(f"{len(items)} {name}" for name, items in held.items())
    print(f"{len(data.questions)} questions, held out {counts}, {corpus_tokens} tokens, {size / 1e6:.2f} M parameters", flush=True)

    seen, step, started = 0, 0, time.monotonic()
    quantized = random.Random(options.seed + 3)
    if resuming:
        saved = torch.load(state, weights_only=False)
        model.load_state_dict(saved["model"])
        for optimizer, part in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(part)
        batches.sampler.rng.setstate(saved["rng"])
        quantized.setstate(saved["quantized"])
        seen, step = saved["seen"], saved["step"]
    averages = [8.0, 8.0]
    copies = step > 0
    while seen < options.tokens:
        progress = seen / options.tokens
        rate = min(1.0, (step + 1) / 60) * (1.0 if progress < 0.5 else max(0.02, 2 * (1 - progress)))
        for optimizer, base in zip(optimizers, rates, strict=True):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * rate
        # First nothing but copying, which other tasks would wash out of the weights; then a reminder now and then is enough.
        copies = copies or averages[1] < 0.5 or progress > 0.03
        drilling = not copies or step % (8 if progress < 0.3 else 16) == 0
        if drilling:
            batch = drill(quantized, options.batch, corpus_tokens)
        elif progress > 0.5 and step % 12 == 1:
            batch = batches.next_long(quantized.choice((1024, 2048, 3072, 4096, 6144, 7400)))
        else:
            batch = batches.next()
        # Once the answers are known by heart, what there is to learn is which of them a question wants.
        batches.whole = 1.0 if progress < 0.2 else 0.3
        # Later on, two steps of three see the weights as a 4-bit file holds them.
        FakeQuant.mode = quantized.choice(("", "q4_0", "mlx")) if progress > 0.65 else ""
        loss = loss_of(model, *batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += batch[0].numel()
        averages[drilling] = 0.9 * averages[drilling] + 0.1 * loss.item()
        step += 1
        if step % 25 == 0:
            minutes = (time.monotonic() - started) / 60
            print(f"step {step}  {seen / 1e6:.2f} M tokens  loss {averages[0]:.4f}  copying {averages[1]:.4f}  {minutes:.1f} min", flush=True)
        if step % 250 == 0:
            FakeQuant.mode = ""
            shares = ", ".join(f"{name} {held_out_score(model, encoder, items)[0]:.1%}" for name, items in held.items())
            print(f"  held out, right to the letter: {shares}", flush=True)
        if step % 100 == 0:
            parts = [optimizer.state_dict() for optimizer in optimizers]
            saved = {"model": model.state_dict(), "optimizers": parts, "rng": batches.sampler.rng.getstate(), "quantized": quantized.getstate()}
            torch.save(saved | {"seen": seen, "step": step}, OUT / "state.tmp")
            (OUT / "state.tmp").replace(state)
    FakeQuant.mode = ""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    export(model, encoder, options.out)
    scores = {}
    for mode in ("", "q4_0", "mlx"):
        FakeQuant.mode = mode
        for name, items in held.items():
            share, failed = held_out_score(model, encoder, items)
            scores[f"{name} {mode or 'bf16'}"] = share
            print(f"held out {name}, {mode or 'bf16'}: {share:.2%}", flush=True)
            if not mode:
                print("\n".join(failed))
    report = {"seed": options.seed, "tokens": seen, "steps": step, "shape": asdict(model.shape), "held_out_to_the_letter": scores}
    (OUT / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    # glibc would give every large buffer back to the system and fault it in again: a third of the time.
    keep = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**28)}
    if os.environ.get("MALLOC_TRIM_THRESHOLD_") != keep["MALLOC_TRIM_THRESHOLD_"]:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | keep)
    main()
