"""Passwords, which belong into no output, log or file."""

from __future__ import annotations

import re

_HIDDEN = "***"


def without_passwords(text: str) -> str:
    """A text with the passwords of the addresses in it hidden.

    >>> without_passwords("postgresql://lab:secret@db/mlflow?sslmode=require")
    'postgresql://lab:***@db/mlflow?sslmode=require'
    >>> without_passwords("https://lab.org?password=secret&team=a")
    'https://lab.org?password=***&team=a'
    """
    text = re.sub(r"(://[^:/@\s]*:)[^\s]*@", rf"\1{_HIDDEN}@", text)
    return re.sub(r"(?i)(\b\w*(?:password|token|secret)=)[^&\s'\"]*", rf"\1{_HIDDEN}", text)
