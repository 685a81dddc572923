"""What a user can put right, in one sentence."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the caller can mend: the message is one sentence that names the thing and the remedy.

    The command line prints it on stderr without a traceback and exits with 2.
    """


def nearest(name: str, known: Iterable[str], most: int = 3) -> str:
    """The ending of an error sentence: " Did you mean 'a' or 'b'?", or nothing when no known name comes near."""
    lower: dict[str, str] = {}
    for item in sorted(known):
        lower.setdefault(item.lower(), item)
    close = difflib.get_close_matches(name.lower(), lower, most, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(lower[item]) for item in close)}?" if close else ""
