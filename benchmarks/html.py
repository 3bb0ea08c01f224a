"""HTML by functions: text is escaped unless it is HTML already, so nothing from outside can run."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from pathlib import Path

_STYLE = Path(__file__).parent / "evaluation" / "report.css"
_VOID = ("br", "img", "meta", "wbr")
# Characters that HTML and XML forbid.
_FORBIDDEN = dict.fromkeys(
    (*range(9), 11, 12, *range(14, 32), *range(127, 160), 0xFFFE, 0xFFFF), "\ufffd"
)


class Html(str):
    """HTML; every other string is text."""

    __slots__ = ()


def html_from_text(text: str) -> Html:
    """Return text from outside as HTML that shows it, in an element or in a quoted attribute."""
    plain = text.encode("utf-8", "replace").decode().translate(_FORBIDDEN)
    return Html(escape(plain, quote=True))


def join(*parts: str) -> Html:
    """Return HTML and escaped text in one."""
    return Html("".join(part if isinstance(part, Html) else html_from_text(part) for part in parts))


def tag(name: str, /, *inside: str, **attributes: str) -> Html:
    """Return an element; an underscore stands for a hyphen, and `class_` for class."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html_from_text(value)}"'
        for key, value in attributes.items()
    )
    end = "" if name in _VOID else f"{join(*inside)}</{name}>"
    return Html(f"<{name}{words}>{end}")


def page(title: str, *body: str, script: str = "") -> str:
    """Return a whole page: one file, no network, and only `script` can run."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        + (f"script-src 'sha256-{digest}'; " if script else "")
        + "base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(_STYLE.read_text(encoding="utf-8"))),
    )
    end = tag("script", Html(script)) if script else ""
    whole = tag("html", head, tag("body", tag("h1", title), *body, end), lang="en")
    return f"<!DOCTYPE html>\n{whole}\n"
