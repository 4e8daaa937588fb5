"""What can go wrong, said to the person who can mend it: what was found, what was needed, what to do."""

from __future__ import annotations

import errno


class HybridCacheError(Exception):
    """The base of every error this library raises on purpose."""


class SettingError(HybridCacheError, ValueError):
    """A setting has a value that means nothing here."""


class ArgumentError(HybridCacheError, TypeError):
    """A call has an argument that its function does not know, or of a kind that it cannot use."""


class PromptError(HybridCacheError, ValueError):
    """The prompt cannot be read by this model: empty, not token ids, or ids beyond the vocabulary."""


class BudgetError(HybridCacheError, MemoryError):
    """A memory budget is too small for what was asked of it. Nothing that was stored is lost.

    `fits_later`: it would do without what requests that run now hold; `fits_soon`: as soon as what was let
    go of while it is written to disk is held no longer.
    """

    def __init__(self, said: str = "", *, fits_later: bool = False, fits_soon: bool = False):
        super().__init__(said)
        self.fits_later = fits_later
        self.fits_soon = fits_soon


class CacheMismatchError(HybridCacheError, ValueError):
    """A cache handed in does not stand where its caller says, or is of a kind that cannot be stored."""


class NotStoredError(HybridCacheError, LookupError):
    """Something was asked of a prompt of which nothing is stored."""


class PinnedError(HybridCacheError):
    """What was to be forgotten is pinned. Nothing was forgotten."""


class ModelError(HybridCacheError):
    """A model or tokenizer could not be loaded from where it was said to be."""


class AdapterError(ModelError):
    """An adapter cannot be used with the model that is there: not found, of another model, a full fine-tune."""


class BackendError(HybridCacheError, ImportError):
    """MLX is installed without a library that computes for it, or without the driver that this needs."""


class RouterError(HybridCacheError):
    """A router cannot be canonicalized: no experts, an unknown block, another model, a place to write to."""


class ClosedError(HybridCacheError, RuntimeError):
    """The cache was closed before the call, or it is another process's, of which this one is a fork."""


class GroupError(HybridCacheError, RuntimeError):
    """A group of ranks cannot be formed, or has lost one: which, and why. It serves nothing any more."""


def refusal(error: OSError) -> str:
    """What the system would not do, as a sentence: which file, and why."""
    if error.filename is None and error.errno in FULL:  # what is written to has no name here
        return f"The disk is full: {error.strerror}. Make room there, or name another place."
    if error.filename is None or error.strerror is None:
        return str(error)
    name = error.filename.decode() if isinstance(error.filename, bytes) else error.filename
    why = _REFUSALS.get(type(error), f": {error.strerror}")
    return f"{name}{why}."


def printable(text: str) -> str:
    """The text on one line, with an escape for each character that a terminal would follow, or not show."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What the system says where no byte more can be written."""

_REFUSALS: dict[type[OSError], str] = {
    FileNotFoundError: " does not exist, or the directory that it is to be in does not",
    FileExistsError: " exists already",
    IsADirectoryError: " is a directory, where a file is needed",
    NotADirectoryError: " is no directory, or a part of that path is a file",
    PermissionError: ": this user has no permission for that",
}
