"""Folders and files that appear whole or not at all: written under another name, synced to the disk, then renamed."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["new_file", "new_folder"]


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which becomes `out` by a rename when all has ended well.

    What a killed process leaves is called `.<out>.partial-<random>`. The next call for `out` removes it: a process that
    writes holds a lock on its folder, which ends with the process.

    Raises:
        FileExistsError: `out` is there and not an empty folder, at the beginning or at the end.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: expected a new or empty folder")
    with _staged(out) as staged:
        yield staged
        for path in (*staged.iterdir(), staged):
            _sync(path)
        try:
            os.replace(staged, out)  # an empty folder of that name gives way
        except OSError:
            if out.is_dir() and any(out.iterdir()):
                raise FileExistsError(f"{out}: expected a new or empty folder; another run has filled it") from None
            raise


@contextmanager
def new_file(out: str | Path) -> Iterator[Path]:
    """A path to write a file to, which becomes `out` by a rename when all has ended well; see `new_folder`.

    Raises:
        FileExistsError: `out` is there, at the beginning or at the end.
    """
    out = Path(out).absolute()
    if os.path.lexists(out):
        raise FileExistsError(f"{out}: expected a new file")
    with _staged(out) as staged:
        yield staged / "file"
        _sync(staged / "file")
        if os.path.lexists(out):
            raise FileExistsError(f"{out}: expected a new file; another run has written it")
        os.replace(staged / "file", out)
        staged.rmdir()


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, locked, which is removed if anything goes wrong; what dead runs have left goes too."""
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.partial-"
    for left in out.parent.glob(f"{_literal(prefix)}*"):
        _remove_if_dead(left)
    staged, lock = _locked_folder(out.parent, prefix)
    try:
        yield staged
        _sync(out.parent)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _literal(text: str) -> str:
    """A pattern for glob that matches `text` alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)


def _locked_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock."""
    while True:
        path = parent / f"{prefix}{secrets.token_hex(8)}"
        path.mkdir()
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks, where nobody takes this for a leftover either
            return path, lock
        if path.exists():
            return path, lock
        os.close(lock)  # another process took it for a leftover before it was locked


def _remove_if_dead(folder: Path) -> None:
    """Remove what a killed process has left; leave what a live one is writing, or what cannot be told."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
