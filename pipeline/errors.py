"""The exceptions of lorafleet. They stand for causes outside the program; a bug is an ``assert``.

::

    LorafleetError                     exit 1: something failed while the job ran
    ├── InputError                     exit 2: the call or the input is wrong; one message, no traceback
    │   ├── ConfigError                an unknown or invalid key, value or preset
    │   ├── DataError                  a data set that is missing, damaged, or cannot be learnt
    │   ├── EncoderError               an encoder that cannot be found, loaded or trusted
    │   ├── AdapterError               an adapter that does not fit, or is damaged
    │   └── LockedError                another run writes to the same place
    ├── ResumeError                    a checkpoint that would lead to other weights
    └── VerificationError              a saved adapter differs from the trained one

A message names the object, the expectation, the finding and the remedy.
"""

from __future__ import annotations

import errno
import sys

from pipeline.printable import printable

# Error codes for a path that cannot be used, and for a machine in trouble. Other codes, such as ENOENT, are bugs.
_BAD_PATH = ("ENAMETOOLONG", "ELOOP", "ENOTDIR", "EISDIR", "EACCES", "EPERM", "EROFS", "EXDEV", "ENODEV", "ENXIO")
_MACHINE = ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "ESTALE", "EMFILE", "ENFILE", "ENOMEM")


class LorafleetError(Exception):
    """Root of the tree. Its message is meant for the user.

    Each argument is one line of the message, and is made printable: names, labels and messages of other libraries may
    contain any character.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*map(printable, lines))

    def __str__(self) -> str:
        return "\n".join(self.args)


class InputError(LorafleetError):
    """The call or the input is wrong: exit code 2."""


class ConfigError(InputError):
    """The configuration has an unknown key, an invalid value, or an unknown preset or task name."""


class DataError(InputError):
    """A data set is missing, empty or of the wrong type, or its labels cannot be learnt."""


class EncoderError(InputError):
    """An encoder cannot be found, loaded or trusted."""


class AdapterError(InputError):
    """An adapter does not fit its encoder, or its files are damaged."""


class LockedError(InputError):
    """Another run is writing to the same place."""


class ResumeError(LorafleetError):
    """A checkpoint was made under other conditions, so resuming from it would give other weights."""


class DivergedError(LorafleetError):
    """A training gave numbers that are not finite. A smaller learning rate helps."""


class VerificationError(LorafleetError):
    """A saved adapter differs from the trained one when it is loaded again."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, printable and at most 300 characters long."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])[:300]


def refused_by_machine(error: OSError | UnicodeEncodeError) -> LorafleetError | None:
    """Translate an error of the operating system that is no bug; return None for any other.

    Such errors are a name that is too long or not in the locale's encoding, a missing permission, a full disk, and a
    lack of memory.
    """
    if isinstance(error, UnicodeEncodeError):
        if error.encoding != sys.getfilesystemencoding() or error.encoding == "utf-8":
            return None
        encoding = f"this locale, whose encoding is {error.encoding}"
        return InputError(f"{error.object!r}: no file can have this name in {encoding}; set LC_ALL=C.UTF-8")
    text = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    match errno.errorcode.get(error.errno or 0):
        case name if name in _BAD_PATH:
            return InputError(text)
        case name if name in _MACHINE:
            return LorafleetError(text)
    return None
