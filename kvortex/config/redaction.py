"""What must not be in logs and messages."""

import re

_PASSWORD = re.compile(r"(//[^/@:\s]*:)[^/?#\s]*@")
_OPTION = re.compile(r"([?&](?!\w*_file=)\w*(?:password|secret|token)\w*=)[^&#\s'\"]+", re.IGNORECASE)


def without_passwords(text: str) -> str:
    """URLs without their passwords, and without options that are called a password, a secret or a token; names of files
    with them stay."""
    return _OPTION.sub(r"\1***", _PASSWORD.sub(r"\1***@", text))
