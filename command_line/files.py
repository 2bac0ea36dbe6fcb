"""Files that are written whole or not at all, and checksums at their end."""

import errno
import glob
import hashlib
import io
import os
import platform
import zlib
from contextlib import suppress
from pathlib import Path

DIGEST_SIZE = hashlib.sha256().digest_size
MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"  # in names of files that are being written


class AtWorkError(BlockingIOError):
    """Another process works on the same run."""


class DamagedFileError(ValueError):
    """A file is not what it should be: changed, cut short, or something else."""


def add_digest(stream: io.BytesIO) -> None:
    """Write the SHA-256 of what is in a stream at its end."""
    stream.write(hashlib.sha256(stream.getbuffer()).digest())


def has_digest(content: bytes) -> bool:
    """Whether these bytes end with the SHA-256 of what precedes it."""
    return hashlib.sha256(content[:-DIGEST_SIZE]).digest() == content[-DIGEST_SIZE:]


def write_atomically(file: str | os.PathLike, content: bytes) -> None:
    """Put `content` into `file` so that at any moment, a crash included, it holds all the old or all the new.

    What killed processes of this machine have left of writing it is removed. A file that holds the content already is
    left alone, so that nothing fails where there is nothing to do.
    """
    file = Path(file)
    for left in file.parent.glob(f"{glob.escape(file.name)}.{MACHINE}-*.tmp"):
        with suppress(OSError, ValueError):
            if not is_alive(int(left.stem.rpartition("-")[2])):
                left.unlink()
    if file.is_file() and file.stat().st_size == len(content) and file.read_bytes() == content:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{MACHINE}-{os.getpid()}.tmp")  # no other process writes into this one
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError as error:  # of a full disk, Python does not say which file it was
        raise OSError(error.errno, f"cannot write it: {error.strerror or error}", str(file)) from error
    finally:
        temporary.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """Whether there is a process with this id on this machine."""
    try:
        os.kill(process, 0)
    except OSError as error:  # EPERM: it is another user's
        return error.errno == errno.EPERM
    return True
