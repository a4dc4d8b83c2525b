"""`qwen2-local chats`: what was said, to list, read, search, take out, bring in and delete."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import click

from qwen2_local import files, kvcache, paths
from qwen2_local.chats import ChatStore, Summary, deletion, exchange
from qwen2_local.cli import output
from qwen2_local.errors import UsageError
from qwen2_local.formats.magic import open_regular
from qwen2_local.sanitize import clean

_AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_FORMAT = click.Choice(get_args(exchange.Format))
_ENDINGS = {".md": "markdown", ".markdown": "markdown"}


@click.group(invoke_without_command=True)
@_AS_JSON
@click.pass_context
def chats(context: click.Context, as_json: bool) -> None:
    """List, read, search, export, import, rename and delete saved chats. `qwen2-local chat --resume ID` goes on with one.

    They are in one file for you alone, chats.db in the data folder. What is deleted is gone from there for good.
    """
    if context.invoked_subcommand is None:
        _list(as_json)


@chats.command("list")
@_AS_JSON
def list_(as_json: bool) -> None:
    """List the chats, the last used first."""
    _list(as_json)


@chats.command(short_help="Print a chat.")
@click.argument("number", metavar="ID", type=int)
@_AS_JSON
def show(number: int, as_json: bool) -> None:
    """Print the chat ID, as it stands now. With --json all of it, all branches, ids and timings too."""
    with _store() as store:
        store.require_listed(number)
        record = store.record(number)
    if as_json:
        print(exchange.to_json(record))
        return
    text = exchange.to_markdown(record)
    print(clean(text) if sys.stdout.isatty() else text, end="")
    if any(one.state == "partial" for one in exchange.conversation(record)[-1:]):
        output.note("(The last reply was stopped, or broke off.)")


@chats.command(short_help="List chats with some words.")
@click.argument("words", nargs=-1, required=True)
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="The most chats to list.")
@_AS_JSON
def search(words: tuple[str, ...], limit: int, as_json: bool) -> None:
    """List chats with a message or title that has all WORDS. They may go on: "quant" finds quantization."""
    with _store() as store:
        hits = store.search(" ".join(words), limit=limit)
    if as_json:
        print(json.dumps([asdict(hit) for hit in hits]))
    elif hits:
        _table([hit.chat for hit in hits], [hit.excerpt for hit in hits])
    else:
        output.note("Nothing was found.")


@chats.command(short_help="Write chats to a file.")
@click.argument("numbers", metavar="ID...", type=int, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All chats, as JSON.")
@click.option("--format", "form", type=_FORMAT, help="Default: JSON, or what the ending of FILE says.")
@click.option("-o", "--output", "target", metavar="FILE", type=click.Path(path_type=Path), help="Where to write it. Default: stdout.")
def export(numbers: tuple[int, ...], everything: bool, form: exchange.Format | None, target: Path | None) -> None:
    """Write chats to a file.

    \b
    json      all of them, branches, ids and timings too, one on each line: what `import` takes back unchanged
    markdown  one conversation, to read
    openai    one conversation, a list of {"role", "content"}
    """
    if everything == bool(numbers):
        raise click.UsageError("Say which chats, by their IDs, or --all.")
    form = form or ("markdown" if target is not None and target.suffix.lower() in _ENDINGS else "json")
    if form != "json" and (everything or len(numbers) > 1):
        raise click.UsageError(f"A file as {form} holds one chat. --format json takes many.")
    with _store() as store:
        for number in numbers:
            store.require_listed(number)
        records = map(store.record, [one.id for one in store.summaries()] if everything else numbers)
        write = {"json": exchange.to_json, "markdown": exchange.to_markdown, "openai": exchange.to_openai}[form]
        texts = (write(record).removesuffix("\n") + "\n" for record in records)
        if target is None:
            for text in texts:
                print(text, end="")
            return
        with files.staging_file(target) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            file.writelines(texts)
    output.note(f"Wrote {target}.")


@chats.command("import", short_help="Add chats from files.")
@click.argument("sources", metavar="FILE...", nargs=-1, required=True)
@click.option("--format", "form", type=_FORMAT, help="Default: told from what the file holds.")
@_AS_JSON
def import_(sources: tuple[str, ...], form: exchange.Format | None, as_json: bool) -> None:
    """Add the chats in each FILE ("-" is stdin): what `export` writes in any of its formats, or lists of messages as OpenAI's API takes them.

    Nothing of a FILE is added if anything in it is wrong.
    """
    added: list[int] = []
    with _store() as store:
        for source in sources:
            added += store.insert_all(list(exchange.read(_bytes(source), source, form)))
    if as_json:
        print(json.dumps({"chats": added}))
    else:
        output.note(f"Added {'chat' if len(added) == 1 else f'{len(added):,} chats:'} {_numbers(added)}.")


@chats.command(short_help="Give a chat another title.")
@click.argument("number", metavar="ID", type=int)
@click.argument("title")
@_AS_JSON
def rename(number: int, title: str, as_json: bool) -> None:
    """Give the chat ID another TITLE; with "", that from its first question."""
    with _store() as store:
        store.require_listed(number)
        store.rename(number, title)
        shown = store.summary(number).title
    if as_json:
        print(json.dumps({"id": number, "title": shown}))
    else:
        output.note(f"Chat {number} is now called {shown}.")


@chats.command(short_help="Delete chats for good.")
@click.argument("numbers", metavar="ID...", type=int, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All chats.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_AS_JSON
def rm(numbers: tuple[int, ...], everything: bool, yes: bool, as_json: bool) -> None:
    """Delete chats for good: texts, search index, and what models have computed of them."""
    if everything == bool(numbers):
        raise click.UsageError("Say which chats, by their IDs, or --all.")
    with _store() as store:
        every = [*(one.id for one in store.summaries()), *store.trashed()]
        doomed = every if everything else sorted({store.summary(number).id for number in numbers})
        what = f"chat {doomed[0]} ({store.summary(doomed[0]).title})" if len(doomed) == 1 else f"{len(doomed):,} chats"
        if not doomed or not output.confirmed(what, yes=yes):
            doomed = []
        else:
            deletion.delete(store, doomed, disk=kvcache.Disk(paths.kv()))
    if as_json:
        print(json.dumps({"deleted": doomed}))
    elif doomed:
        output.note(f"Deleted {what}.")


@contextmanager
def _store() -> Iterator[ChatStore]:
    with ChatStore.open() as store:
        for note in store.notes:
            output.note(f"note: {note}")
        if store.kept:
            deletion.purge(store, disk=kvcache.Disk(paths.kv()))
        yield store


def _list(as_json: bool) -> None:
    with _store() as store:
        summaries = store.summaries()
    if as_json:
        print(json.dumps([asdict(one) for one in summaries]))
    elif summaries:
        _table(summaries, [f"{'(pinned) ' if one.pinned else ''}{one.title}" for one in summaries])
    else:
        output.note("There are no chats yet. `qwen2-local chat` begins one.")


def _table(summaries: Iterable[Summary], texts: Iterable[str]) -> None:
    now = time.time()
    rows = [(str(one.id), output.ago(now - one.used), one.model, f"{one.messages:,}", text) for one, text in zip(summaries, texts, strict=True)]
    output.table([("ID", "LAST USED", "MODEL", "MESSAGES", "CHAT"), *rows])


def _bytes(source: str) -> bytes:
    """What is in a file, or on stdin, and a byte more than may be in it if that is too much."""
    if source == "-":
        return sys.stdin.buffer.read(exchange.MOST_BYTES + 1)
    path = Path(source)
    try:
        with open_regular(path) as file:
            return file.read(min(path.stat().st_size, exchange.MOST_BYTES) + 1)
    except FileNotFoundError:
        raise UsageError(f"There is no file {source}.", hint="Check its name.") from None


def _numbers(numbers: list[int]) -> str:
    """Numbers that follow each other, in words: "3, 4", "3 to 99"."""
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 3 else ", ".join(map(str, numbers))
