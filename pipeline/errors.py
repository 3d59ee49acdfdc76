"""Every error that is the user's or the world's, in one tree; a fault of ours is an ``assert``.

::

    LorafleetError                     exit 1: something failed while the job ran
    ├── InputError                     exit 2: the call or the input is wrong; one message, no traceback
    │   ├── ConfigError                a key, a value, a preset
    │   ├── DataError                  a data set: missing, empty, wrong type, labels that cannot be learnt
    │   ├── EncoderError               an encoder that cannot be found, loaded or trusted
    │   ├── AdapterError               an adapter that does not fit, or is damaged
    │   └── LockedError                another run writes to the same place
    ├── ResumeError                    a checkpoint that would not end in the same weights
    └── VerificationError              what was saved is not what was trained

A message says which thing, what was expected, what was found, and what to do.
"""

from __future__ import annotations

import errno
import sys

from pipeline.printable import printable

# What the machine says of a place that was named, and of its own state. A file that we did not make would be our own fault.
_NOT_THERE = ("ENAMETOOLONG", "ELOOP", "ENOTDIR", "EISDIR", "EACCES", "EPERM", "EROFS", "EXDEV", "ENODEV", "ENXIO")
_NOT_NOW = ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "ESTALE", "EMFILE", "ENFILE", "ENOMEM")


class LorafleetError(Exception):
    """Root of the tree; its text is meant for the person who started the run.

    Each argument is one line of it, and made printable: names, labels and what other libraries say may hold anything.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*map(printable, lines))

    def __str__(self) -> str:
        return "\n".join(self.args)


class InputError(LorafleetError):
    """The call or the input is wrong: exit code 2."""


class ConfigError(InputError):
    """A misspelt key, a value out of range, an unknown preset or MTEB task name."""


class DataError(InputError):
    """A data set that is missing, empty, of the wrong type, or whose labels cannot be learnt."""


class EncoderError(InputError):
    """An encoder that cannot be found, loaded or trusted."""


class AdapterError(InputError):
    """An adapter that does not fit its encoder, or whose files are damaged."""


class LockedError(InputError):
    """Another run holds the place that this one wants to write."""


class ResumeError(LorafleetError):
    """A checkpoint made under other conditions: going on from it would not give the same weights."""


class VerificationError(LorafleetError):
    """A saved adapter that, loaded again, is not the one that was trained."""


def first_line(error: BaseException) -> str:
    """The part of another library's message that ours quotes: printable, at most 300 characters."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])[:300]


def refused_by_machine(error: OSError | UnicodeEncodeError) -> LorafleetError | None:
    """The same as an error of ours, if it is not our fault.

    Such are a name that is too long or not in the locale's encoding, no permission, a full disk, no memory.
    """
    if isinstance(error, UnicodeEncodeError):
        if error.encoding != sys.getfilesystemencoding() or error.encoding == "utf-8":
            return None
        encoding = f"this locale, whose encoding is {error.encoding}"
        return InputError(f"{error.object!r}: no file can have this name in {encoding}; set LC_ALL=C.UTF-8")
    text = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    match errno.errorcode.get(error.errno or 0):
        case name if name in _NOT_THERE:
            return InputError(text)
        case name if name in _NOT_NOW:
            return LorafleetError(text)
    return None
