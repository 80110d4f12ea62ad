"""Tensors that are views of a mapped file: where they lie, whether the file is still the same, and reading them.

The mapping is that of the library that has read the file: safetensors maps it privately, so pages that nobody writes to
are those of the page cache, and a page that is written to becomes a copy in memory.

Pages are read by MADV_POPULATE_READ, which also tells errors. Over 2 GB of a virtual disk, on a machine that others
used too, it gave 2.0 ... 2.6 GB/s for 0.02 s of a processor's time; preadv into a buffer 1.1 ... 1.6 GB/s for
0.2 ... 0.4 s; and posix_fadvise(WILLNEED) of a megabyte at a time 1.4 ... 2.2 GB/s for 0.4 s, while one call of it, or
of madvise, for a whole layer reads no more than the kernel's read-ahead. Faults gave 1.3 ... 1.6 GB/s, for which the
thread that computes waits.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import bad

_POPULATE_READ = 22  # MADV_POPULATE_READ, of Linux 5.14
# Types of file systems, as /proc/self/mountinfo has them, whose pages come over a network, or from a program that may
# get them from there (FUSE).
_NETWORK = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "fuse", "lustre", "gpfs", "beegfs", "glusterfs", "orangefs")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

# {address of codes: what is called before an op reads them}. Codes that are no view of a mapped file have no entry.
uses: dict[int, Callable[[], None]] = {}


def before_use(codes: Tensor) -> None:
    """Let mapped codes be read from their file before an op uses them. A compiled graph does not call this.

    Raises:
        ValueError, OSError: the file has changed, or cannot be read.
    """
    if torch.compiler.is_compiling() or not uses or type(codes) not in (Tensor, torch.nn.Parameter):
        return
    try:
        use = uses.get(codes.data_ptr())
    except RuntimeError:  # a wrapper of torch.func, which has no address
        return
    if use is not None:
        use()


class MappedFile:
    """A file that is mapped, as it was when this was made. It stays open, so that its size can be asked for.

    Attributes:
        path: where it was opened.
    """

    def __init__(self, path: str) -> None:
        """Open a file.

        Raises:
            OSError: it cannot be opened.
            ValueError: it lies on a network file system.
        """
        self.path = path
        if (network := _network_type(path)) is not None:
            raise bad(
                path,
                "a file on a local disk, as pages that leave the memory are read again in each step, and one that a "
                "server fails to send ends the process",
                f"one on {network}",
            )
        self._file = open(path, "rb")
        self._stat = os.fstat(self._file.fileno())

    def check(self) -> None:
        """Raise ValueError if the file has been truncated, written to or replaced.

        A file that is truncated after this and before a page is read ends the process with SIGBUS.
        """
        held, was = os.fstat(self._file.fileno()), self._stat
        if (held.st_size, held.st_mtime_ns) != (was.st_size, was.st_mtime_ns):
            changed = "one that was written to" if held.st_size >= was.st_size else f"one of {held.st_size:,}"
            raise bad(self.path, f"the file of {was.st_size:,} bytes that is mapped", changed)
        try:
            named = os.stat(self.path)
        except OSError as error:
            raise bad(self.path, "the file that is mapped", f"none ({error.strerror})") from None
        if not os.path.samestat(named, was):
            raise bad(self.path, "the file that is mapped", "another, which has replaced it")


def _network_type(path: str) -> str | None:
    """The type of the file system of a file, if it is one of a network."""
    path, best, found = os.path.realpath(path), "", ""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            point = before.split()[4].replace("\\040", " ")
            inside = path.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):  # a later line of the same mount point covers it
                best, found = point, after.split()[0]
    return found if found.startswith(_NETWORK) else None


@dataclass(frozen=True)
class Mapping:
    """A part of the address space: begin ... end - 1. `path` is the file that is mapped there, or None."""

    begin: int
    end: int
    path: str | None


def mappings() -> list[Mapping]:
    """The mappings of this process, in ascending order."""
    found = []
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            parts = line.rstrip("\n").split(maxsplit=5)
            begin, end = (int(address, 16) for address in parts[0].split("-"))
            path = parts[5].replace("\\012", "\n") if len(parts) == 6 and parts[5].startswith("/") else None
            found.append(Mapping(begin, end, path))
    return found


@dataclass(eq=False, repr=False)
class Region:
    """The tensors of a layer in mapped files.

    Attributes:
        name: of the layer, for errors.
        tensors: the tensors, which keep their mappings alive.
        files: where they lie.
        position: in the order in which layers are used.
        touched: the clock of `MappedWeights` when it was last read or used, or None.
        queued: whether the reader has been asked for it.
        lock: held while it is read.
    """

    name: str
    tensors: list[Tensor]
    files: list[MappedFile]
    position: int = 0
    touched: int | None = None
    queued: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def read(self) -> None:
        """Read the pages that are not in memory, and enter all into the table of pages. Other threads go on meanwhile.

        Raises:
            OSError: a page cannot be read. Without this call its use would end the process with SIGBUS.
        """
        for tensor in self.tensors:
            begin = tensor.data_ptr() & -mmap.PAGESIZE
            while _libc.madvise(begin, tensor.data_ptr() + tensor.nbytes - begin, _POPULATE_READ):
                if (number := ctypes.get_errno()) in (errno.EAGAIN, errno.EINTR):
                    continue
                paths = ", ".join(file.path for file in self.files)
                if number == errno.EINVAL:
                    raise OSError(number, f"{paths}: mapped weights need Linux 5.14 or later (MADV_POPULATE_READ)")
                raise OSError(number, f"{paths}: {self.name} cannot be read ({os.strerror(number)})")


def read_bytes() -> int:
    """The bytes that this process has read from disks, faults of pages among them: read_bytes of /proc/self/io."""
    with open("/proc/self/io", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def region_of(name: str, tensors: Iterable[Tensor], maps: list[Mapping], files: dict[str, MappedFile]) -> Region:
    """Find where the tensors of a layer lie.

    Args:
        name: of the layer, for errors.
        tensors: its tensors; the first one is its codes. Others may be copies, as small tables are.
        maps: `mappings()`.
        files: {path: file}, to which new ones are added.

    Raises:
        ValueError: the codes are no view of a mapped file, or the file is not there any more.
    """
    found, paths = [], []
    for i, tensor in enumerate(tensors):
        path = _path_of(tensor, maps)
        if path is not None:
            found.append(tensor)
            paths.append(path)
        elif i == 0:
            where = "a copy in memory" if tensor.device.type == "cpu" else f"codes on {tensor.device}"
            raise bad(name, "codes that are a view of a mapped file", where)
    for path in paths:
        if path not in files:
            if path.endswith(" (deleted)") and not os.path.exists(path):
                raise bad(name, "codes of a file that is there", f"one of {path}")
            files[path] = MappedFile(path)
    return Region(name, found, [files[path] for path in dict.fromkeys(paths)])


def _path_of(tensor: Tensor, maps: list[Mapping]) -> str | None:
    if tensor.device.type != "cpu":
        return None
    low, high, address = 0, len(maps), tensor.data_ptr()
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if maps[middle].end <= address else (low, middle)
    return maps[low].path if low < len(maps) and maps[low].begin <= address else None
