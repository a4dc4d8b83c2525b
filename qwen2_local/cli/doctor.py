"""`qwen2-local doctor`: what this machine has, what works, and what to do to be faster."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import click

from qwen2_local.sanitize import clean, clean_line


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def doctor(as_json: bool) -> None:
    """Check this machine. Exits with 4 if nothing here can run a model."""
    from qwen2_local.doctor import collect

    checks = collect()
    if as_json:
        print(json.dumps([asdict(check) for check in checks], ensure_ascii=False))
    else:
        width = max(len(check.subject) for check in checks)
        for check in checks:
            print(f"{check.level:<5} {clean_line(check.subject):<{width}}  {clean_line(check.text)}")
            if check.fix:
                print(f"{'':<5} {'':<{width}}  → {clean(check.fix)}")
    if any(check.level == "fail" for check in checks):
        sys.exit(4)
