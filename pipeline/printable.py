"""Text that may leave the program: one line, without control characters and without the secrets of URLs.

Names, labels and paths come from others. In a raw text, a newline forges a line of the log, an escape code controls the
terminal, and a bidi mark changes what is shown. A URL may hold a password or a signature, which every file or database
that mentions the URL would keep. The program therefore handles such a URL without its secret; ``reveal`` returns the
real one to the code that opens it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_HIDDEN = "***"
_LONGEST_LINE = 4000
# Control characters, characters that change the direction or have no width, and lone surrogates. The joiners U+200C and
# U+200D are allowed: Persian, Hindi and many emoji are not readable without them.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|$~&])")
_SCHEME = r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):(?P<slashes>//?)"  # a URL that was turned into a path has one slash
_URL = re.compile(_SCHEME + r"(?P<rest>[^\s\"'<>]+)")
_WHOLE_URL = re.compile(_SCHEME + r"(?P<rest>.+)", re.DOTALL)
_AUTHORITY = re.compile(r"(?:\[[^\]]*\]|[^:]*)(?::\d*)?")
_PARAMETER = re.compile(r"(?P<sign>[?&;#])(?P<name>[^=&;#?]*)(?P<value>=[^&;#]*)?")
_PATH_PARAMETER = re.compile(r"(?P<sign>;)(?P<name>[^=;/]*)(?P<value>=[^;/]*)?")
# //user:password@host, as in a page.
_WITHOUT_SCHEME = re.compile(r"(?<![^\s\"'<>(=,])//[^\s\"'<>/@:]*:[^\s\"'<>/]*@")
# Over HTTP, every value of a query counts as a secret, except of these parameters. In a store's URL, a ? may be part of
# a name or a wildcard, so only parameters with a telling name count.
_PUBLIC_PARAMETERS = {"versionid", "generation", "snapshot"}
_SECRET_NAME = re.compile(r"sig|token|secret|key|password|credential|auth|policy|security", re.IGNORECASE)

_real: dict[str, str] = {}  # URL without its secret -> URL, for this process


def printable(text: str) -> str:
    """Return a text as one line that can be shown, logged or stored. The function is idempotent.

    Characters such as ``\\n``, ``\\x1b`` and ``\\u202e`` are escaped, and secrets in URLs become ``***``.
    """
    line = _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), redacted(text))
    return shortened(line, _LONGEST_LINE)


def markdown(text: str) -> str:
    """Return a text as one printable line, escaped for Markdown and HTML, also inside a table."""
    return _MARKDOWN.sub(r"\\\1", printable(" ".join(text.split())))


def redacted(text: str) -> str:
    """Replace the secrets in the URLs of a text by ``***``.

    Secrets are user and password, and the values of a query, a fragment or a path parameter.
    """
    if "//" in text and "@" in text:
        text = _WITHOUT_SCHEME.sub(f"//{_HIDDEN}@", text)
    return _URL.sub(_without_secrets, text) if ":/" in text else text


def conceal(url: str) -> str:
    """Return a URL or path without its secrets. This process remembers the real one for ``reveal``."""
    # A space ends a URL in a text, but not in an address.
    shown = redacted(_WHOLE_URL.sub(_without_secrets, url, count=1))
    if shown != url:
        _real[shown] = url
    return shown


def reveal(shown: str) -> str:
    """Return the URL that ``conceal`` received, or the text itself."""
    return _real.get(shown, shown)


def concealed() -> dict[str, str]:
    """Return the URLs that this process remembers, for another process to ``remember``. Keep them in memory only."""
    return dict(_real)


def remember(others: Mapping[str, str]) -> None:
    """Take over the URLs that another process remembers."""
    _real.update(others)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 file``, ``1,200 files``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shortened(text: str, most: int = 200) -> str:
    """Return the text, cut after ``most`` characters."""
    return text if len(text) <= most else f"{text[:most]}…"


def _without_secrets(url: re.Match[str]) -> str:
    scheme, rest = url["scheme"], url["rest"]
    over_http = scheme.lower() in ("http", "https")
    end = re.search(r"[/?#]", rest)
    authority, beyond = (rest[: end.start()], rest[end.start() :]) if end else (rest, "")
    if "@" in beyond and "@" not in authority and not _AUTHORITY.fullmatch(authority):  # a password with a slash in it
        credentials, _, beyond = rest.rpartition("@")
        authority = f"{credentials}@"
    user, sign, host = authority.rpartition("@")
    # In other URLs, a user name alone is public: a container (abfs), a revision (hf), an account (sftp).
    if sign and (":" in user or over_http):
        authority = f"{_HIDDEN}@{host}"
    begin = re.search(r"[?#]", beyond)
    path, query = (beyond[: begin.start()], beyond[begin.start() :]) if begin else (beyond, "")
    path = _PATH_PARAMETER.sub(lambda parameter: _hidden(parameter, over_http=over_http), path)
    query = _PARAMETER.sub(lambda parameter: _hidden(parameter, over_http=over_http), query)
    return f"{scheme}:{url['slashes']}{authority}{path}{query}"


def _hidden(parameter: re.Match[str], *, over_http: bool) -> str:
    sign, name, value = parameter["sign"], parameter["name"], parameter["value"]
    is_secret = name.lower() not in _PUBLIC_PARAMETERS if over_http else _SECRET_NAME.search(name) is not None
    if value is not None:
        return f"{sign}{name}={_HIDDEN}" if is_secret else parameter[0]
    return f"{sign}{_HIDDEN}" if over_http and sign in "?&" and name else parameter[0]
