"""Files that are read at once or refused, written whole or not at all, and checksums at their end."""

import hashlib
import io
import os
import secrets
from pathlib import Path

DIGEST_SIZE = hashlib.sha256().digest_size


class AtWorkError(BlockingIOError):
    """Another process works on the same run."""


class DamagedFileError(ValueError):
    """A file is not what it should be: changed, cut short, or something else."""


def check_plain(file: str | os.PathLike) -> None:
    """OSError where there is something else than a file or a folder: reading it might never end."""
    file = Path(file)
    if file.exists() and not file.is_file() and not file.is_dir():
        raise OSError(f"{file} is a pipe, a socket or a device, where a file should be")


def read_file(file: str | os.PathLike) -> bytes:
    """The content of a file. OSError at once where it cannot be read, or is a pipe, a socket or a device."""
    check_plain(file)
    return Path(file).read_bytes()


def add_digest(stream: io.BytesIO) -> None:
    """Write the SHA-256 of what is in a stream at its end."""
    stream.write(hashlib.sha256(stream.getbuffer()).digest())


def has_digest(content: bytes) -> bool:
    """Whether these bytes end with the SHA-256 of what precedes it."""
    return hashlib.sha256(content[:-DIGEST_SIZE]).digest() == content[-DIGEST_SIZE:]


def write_atomically(file: str | os.PathLike, content: bytes) -> None:
    """Put `content` into `file` so that at any moment, a crash included, it holds all the old or all the new.

    A file that holds it already is left alone, so that nothing fails where there is nothing to do.
    """
    file = Path(file)
    check_plain(file)
    if file.exists() and file.stat().st_size == len(content) and file.read_bytes() == content:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}.tmp")  # no other process writes into this one
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


def remove_temporaries(file: Path) -> None:
    """Remove what killed processes have left of the writing of `file`. None may be at it now."""
    for temporary in file.parent.glob(f"{file.name}.????????.tmp"):
        temporary.unlink(missing_ok=True)
