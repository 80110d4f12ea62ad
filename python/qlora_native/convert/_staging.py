"""Write folders and files so that they appear whole or not at all: under another name, synced, and then renamed."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOKEN_BYTES = 8  # of the random part of a name, which has two hexadecimal digits for each


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Yield a folder beside `out` to write into. If no error occurs, it is renamed to `out`.

    If `out` is a link, the folder that it leads to is written, and the link stays.

    A killed process leaves a folder `.<out>.partial-<16 hexadecimal digits>`, which has only files. The next call for
    `out` removes such folders, and no others. It knows the folders of live processes by their locks, which end with the
    process.
    """
    out = Path(os.path.realpath(out))
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: expected a new or empty folder")
    if os.path.ismount(out):
        raise FileExistsError(f"{out}: expected a new or empty folder, got a mount point (name a new folder in it)")
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
    """Yield a path to write a file to. If no error occurs, the file is renamed to `out` (see `new_folder`)."""
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
    """Yield a new locked folder beside `out`, and remove it after an error. First remove leftovers of dead runs."""
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.partial-"
    name_of_ours = re.compile(f"{re.escape(prefix)}[0-9a-f]{{{2 * TOKEN_BYTES}}}")
    for name in os.listdir(out.parent):
        if name_of_ours.fullmatch(name):
            _remove_if_dead(out.parent / name)
    staged, lock = _locked_folder(out.parent, prefix)
    try:
        yield staged
        _sync(out.parent)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _locked_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    """Make a new folder, and lock it. Returns the folder and the descriptor that holds the lock."""
    while True:
        path = parent / f"{prefix}{secrets.token_hex(TOKEN_BYTES)}"
        path.mkdir()
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks, where no process removes leftovers either
            return path, lock
        if path.exists():
            return path, lock
        os.close(lock)  # another process has removed the folder as a leftover before it was locked: try again


def _remove_if_dead(folder: Path) -> None:
    """Remove the leftover of a killed process, unless a live one may be writing to it, or it has more than files."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    else:
        with os.scandir(folder) as entries:
            has_only_files = all(entry.is_file(follow_symlinks=False) for entry in entries)
        if has_only_files:
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
