"""What must not be in logs and messages."""

import re

_PASSWORD = re.compile(r"(//[^/@:\s]*:)[^/?#\s]*@")


def without_passwords(text: str) -> str:
    """URLs without their passwords."""
    return _PASSWORD.sub(r"\1***@", text)
