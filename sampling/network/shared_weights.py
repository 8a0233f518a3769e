"""One copy of a network's weights for all processes of a machine that draw with it on its CPUs.

A checkpoint stores experts one by one, float32, in boxes; a network has them stacked, in the precision that it
computes in. So the first process that wants a network writes its weights, as they are in memory, to a file that
all processes map: a machine then holds them once, as pages of the file, which it may also drop and read again.

The file is of the safetensors format, and its header follows from the checkpoint's fingerprint, the choice of
weights, and the name, type and shape of each tensor alone: who finds just these bytes, and a file as long as they
say, has the file. Tensors begin at multiples of 64 bytes, as those that torch allocates, because a matrix product
may round otherwise elsewhere.

Whoever uses the file holds a shared lock on it. The last one to let go removes it; what killed processes leave is
removed when the next file is made beside it.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import torch
from torch import Tensor, nn

from ditmoe.data.storage.claims import Claims
from ditmoe.data.storage.files import remove_abandoned
from ditmoe.model.errors import UnwritableError, UserError
from ditmoe.model.outside.files import replacing

SHARED_WEIGHTS: Final = "shared-weights"
"""In the folder of a run, unless another is named."""
SUFFIX: Final = ".safetensors"
_ALIGNMENT: Final = 64
_NAMES: Final = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}
_WAIT_SECONDS: Final = 0.1

Write = Callable[[Mapping[str, Tensor]], None]
"""(name → memory of all tensors): fills them from the checkpoint."""


@dataclass(frozen=True)
class WeightsFile:
    """What the file of a network holds, and where."""

    header: bytes
    tensors: dict[str, Tensor]
    """On the meta device: type and shape."""
    begins: dict[str, int]
    """Where each begins in the file."""
    size: int
    """Bytes of the file."""

    @classmethod
    def of(cls, network: nn.Module, identity: str) -> "WeightsFile":
        """The file for the parameters of a network.

        Args:
            identity: stands for their values.
        """
        entries: dict[str, object] = {"__metadata__": {"format": "pt", "ditmoe": identity}}
        begins, end = {}, 0
        tensors = {name: parameter.detach().to("meta") for name, parameter in network.named_parameters()}
        for name, tensor in tensors.items():
            begins[name], end = end, end + tensor.nbytes
            entries[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begins[name], end],
            }
            if gap := -end % _ALIGNMENT:  # the format knows no gaps: they are tensors too
                entries[f"gap.{end}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
                end += gap
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        header = len(text).to_bytes(8, "little") + text
        places = {name: len(header) + begin for name, begin in begins.items()}
        return cls(header, tensors, places, len(header) + end)

    @property
    def name(self) -> str:
        """Of the file: equal for equal weights in equal types."""
        return f"{hashlib.sha256(self.header).hexdigest()[:16]}{SUFFIX}"

    def write(self, file: BinaryIO, fill: Write) -> None:
        """Write the weights into the file's own pages, where they will be mapped: no other copy is made.

        Raises:
            OSError: the file system has no room for them, which is asked for first. A page without room would end
                the process.
        """
        file.write(self.header)
        file.flush()
        _reserve(file, self.size)
        fill(self.map(Path(file.name), written=True))

    def map(self, path: Path, written: bool = False) -> dict[str, Tensor]:
        """The weights in the file; what is written to them stays with this process, or goes there (`written`)."""
        whole = torch.from_file(str(path), shared=written, size=self.size, dtype=torch.uint8)
        return {
            name: whole[self.begins[name] : self.begins[name] + tensor.nbytes]
            .view(tensor.dtype)
            .view(tensor.shape)
            for name, tensor in self.tensors.items()
        }


def share_weights(network: nn.Module, identity: str, folder: Path, fill: Write) -> None:
    """Give a network on the meta device its weights from a file that all processes of the machine map.

    The file is in use as long as the network is there.

    Args:
        network: its parameters are given memory, with `requires_grad` off; its buffers stay as they are.
        identity: stands for the values of the weights.
        folder: where the file lies, or is made.
        fill: reads the weights from the checkpoint, as one process does for all.

    Raises:
        UnwritableError: the file system refuses, or has not twice the room.
        UserError: the checkpoint is damaged.
    """
    content = WeightsFile.of(network, identity)
    path = folder / content.name
    try:
        lock = _held(path, content) or _made(path, content, fill)
    except OSError as error:
        raise UnwritableError(path, error.strerror or str(error)) from error
    try:
        for name, tensor in content.map(path).items():
            owner, _, last = name.rpartition(".")
            setattr(network.get_submodule(owner), last, nn.Parameter(tensor, requires_grad=False))
    except BaseException:
        _release(lock, path, os.getpid())
        raise
    weakref.finalize(network, _release, lock, path, os.getpid())


def _made(path: Path, content: WeightsFile, fill: Write) -> BinaryIO:
    """The file, made by this process or another, and held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    claims = Claims(path.parent)
    while True:
        with ExitStack() as stack:
            try:
                claim = stack.enter_context(claims.taken(path.name))
            except UserError as error:
                raise UnwritableError(path, str(error)) from error
            if (lock := _held(path, content)) is not None:
                return lock
            if claim is not None:
                _make_room(path, content.size)
                with replacing(path) as file:
                    content.write(file, fill)
                continue
        time.sleep(_WAIT_SECONDS)


def _reserve(file: BinaryIO, size: int) -> None:
    """Give a file its size, with room on the disk for all of it."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    while missing := size - file.tell():
        file.write(bytes(min(missing, 2**20)))
    file.flush()


def _held(path: Path, content: WeightsFile) -> BinaryIO | None:
    """The file, open and locked by this process; None: it is not there, or is not whole."""
    while True:
        try:
            # Some systems lock only files that are open for writing. Closing one without a buffer does not seek:
            # processes that are forked meanwhile have its position in common.
            file: BinaryIO = path.open("r+b" if os.access(path, os.W_OK) else "rb", buffering=0)
        except FileNotFoundError:
            return None
        _lock(file, fcntl.LOCK_SH)
        # Before it was locked it may have been removed, and made anew.
        try:
            there = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except FileNotFoundError:
            there = False
        if there:
            whole = os.fstat(file.fileno()).st_size == content.size
            if whole and file.read(len(content.header)) == content.header:
                return file
            file.close()
            return None
        file.close()


def _release(file: BinaryIO, path: Path, process: int) -> None:
    """Let go of a file, which the last of its users removes."""
    with file:
        if os.getpid() != process:
            return
        # First the own lock: of two who let go at once, each would else find the other's.
        _lock(file, fcntl.LOCK_UN)
        if _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            with suppress(OSError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    path.unlink()


def _lock(file: BinaryIO, how: int) -> bool:
    """Whether the file is locked now; never on a file system without locks, where nobody removes what is used."""
    try:
        fcntl.flock(file, how)
    except OSError:
        return False
    return True


def _make_room(path: Path, size: int) -> None:
    """Remove what nobody uses any more.

    Raises:
        UnwritableError: less than twice the size is free: the next checkpoint, say, wants room too.
    """
    remove_abandoned(path.parent)
    for other in _files(path.parent):
        with suppress(OSError), other.open("r+b") as file:
            if _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                other.unlink()
    free = shutil.disk_usage(path.parent).free
    if free < 2 * size:
        raise UnwritableError(path, f"{free:,} bytes are free, expected twice the {size:,} that it takes")


def _files(folder: Path) -> Iterator[Path]:
    names = (path for path in folder.iterdir() if path.suffix == SUFFIX and len(path.stem) == 16)
    return (path for path in names if set(path.stem) <= set("0123456789abcdef"))
