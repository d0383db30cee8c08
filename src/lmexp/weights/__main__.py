"""`python -m lmexp.weights list | fetch [NAME ...] | verify [NAME ...] | seal`."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from urllib.parse import urlsplit

from rich.console import Console

from lmexp.errors import LmexpError
from lmexp.weights import files, packaging, registry, store
from lmexp.weights.registry import Entry, FileEntry


def _every() -> list[Entry | FileEntry]:
    return [*registry.ENTRIES.values(), *registry.FILES.values()]


def _find(name: str) -> Entry | FileEntry:
    return registry.FILES[name] if name in registry.FILES else store.find_entry(name)


def _origin(entry: Entry | FileEntry) -> str:
    if isinstance(entry, FileEntry) and entry.address is not None:
        return str(urlsplit(entry.address).hostname)
    package = entry.sdist if isinstance(entry, FileEntry) else entry.wheel
    return "this package" if package is None else f"{package.package} {package.version}"


def _state(entry: Entry | FileEntry) -> str:
    """ "ready", "absent" or the reason why the file can't be used."""
    if isinstance(entry, FileEntry):
        return files.state(entry, store.cache_folder(), store.say_on_stderr)
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
    for entry in _every():
        state = _state(entry)
        state = state if state in ("ready", "absent") else "damaged"
        file = f"\n  file: {entry.filename}" if isinstance(entry, FileEntry) else ""
        console.print(
            f"\n{entry.name:22} {state:9}{entry.megabytes:5g} MB  from {_origin(entry)}\n"
            f"  {entry.purpose}\n  licence: {entry.licence}\n  source: {entry.source}{file}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
    return 0


def fetch_weights(console: Console, names: Sequence[str]) -> int:
    """Fetch what is absent or damaged; without names, all but the files of third parties."""
    for entry in [_find(name) for name in names or registry.ENTRIES]:
        if isinstance(entry, FileEntry):
            path = store.file_path(entry.name)
        else:
            path = store.load(entry.name).path
        console.print(f"{entry.name}: ready, {path}", soft_wrap=True)
    return 0


def verify_weights(console: Console, names: Sequence[str]) -> int:
    """Check digests; with names all must be there, without names the absent are passed over."""
    failed = False
    counts = Counter[str]()
    for entry in [_find(name) for name in names] or _every():
        state = _state(entry)
        packaged = isinstance(entry, Entry) and entry.packaged
        failed |= state != "ready" and (state != "absent" or bool(names) or packaged)
        said = {"ready": "verified", "absent": "absent, nothing to verify"}.get(state, state)
        counts["damaged" if said == state else said.partition(",")[0]] += 1
        console.print(f"{entry.name}: {said}", soft_wrap=True)
    console.print(", ".join(f"{counts[word]} {word}" for word in ("verified", "absent", "damaged")))
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit status: 0 done, 1 verification failed, 2 bad input or no way to fetch.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lmexp.weights",
        description="List, fetch and verify network weights; seal those in this package.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what there is, whence, under which licence, what is on disk")
    for name, text, default in (
        ("fetch", "fetch what is absent or damaged", "all but the files of third parties"),
        (
            "verify",
            "read what is on disk and compare its digests with those that are expected; fetches "
            "nothing",
            "all; what is absent is then no fault",
        ),
    ):
        command = commands.add_parser(name, help=text, description=f"{text.capitalize()}.")
        command.add_argument("names", nargs="*", metavar="NAME", help=f"default: {default}")
    commands.add_parser(
        "seal",
        help="for maintainers: record the digests of the weights in this package",
        description="For maintainers: write the content digests of the weights in this package "
        f"(lmexp/weights/data) to {registry.DIGESTS.name} beside them. Run it in a checkout after "
        "one of them was trained anew, and commit both; until then verify calls the file damaged.",
    )
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
    except KeyboardInterrupt:
        print("lmexp: stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
