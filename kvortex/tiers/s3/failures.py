"""What a store answers, as our causes and in one line."""

import re
from typing import Final

from kvortex.tiers.base import Cause

MOST_CHARACTERS: Final = 300

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>\s*(\w{1,64})\s*</Code>")
_OF_ONE_KEY = re.compile(r"DeleteObjects request failed for key .*: (.*) \(code: (\w+)\)")
_MESSAGE = re.compile(r"<Message>([^<]{1,300})</Message>")
_NO_SPACE = ("QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "EntityTooLarge")
_NO_KEYS = "there are no keys; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give a profile"
# What the client's own words mean, in the order in which they are looked for: (words, kind, what is said).
_LOCAL: Final = (
    ("169.254.169.254", "NoKeys", _NO_KEYS),
    ("token file", "NoKeys", "the file with the token of this host's role cannot be read"),
    ("InvalidCertificate", "TLS", "the store's certificate is not trusted; name its authority as ca_file"),
    ("InvalidContentType", "TLS", "the store does not speak TLS; write its endpoint with http://"),
    ("dns error", "Dns", "no host of this name is found; check the endpoint and the name of the bucket"),
    ("ConnectionRefused", "Refused", "nothing listens there; check the endpoint and its port"),
    ("TimedOut", "Timeout", "no answer in time"),
)
_FIXES: Final = {
    "NoSuchBucket": "create the bucket, or check its name and the endpoint",
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID, or the profile",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY, or the profile",
    "ExpiredToken": "the keys have expired; get new ones",
    "AccessDenied": "allow s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject there",
    "AuthorizationHeaderMalformed": "check the region",
    "PermanentRedirect": "check the region",
    "RequestTimeTooSkewed": "set the clock of this host",
}
_LASTING: Final = ("TLS", "NoKeys")
_PASSING_STATUS: Final = (408, 429)


class StoreFailure(Exception):
    """The store did not do what it was asked to; the message is one line without keys.

    Args:
        kind: a short word for it; failures of the same kind are logged once a minute.
        message: what to say.
        status: the status of the answer; None if there was none.

    Attributes:
        is_absent: there is no such object.
        is_damaged: the object is shorter than its name and our index say.
    """

    def __init__(self, kind: str, message: str, status: int | None = None) -> None:
        super().__init__(message[:MOST_CHARACTERS])
        self.kind = kind
        self.status = status
        self.is_absent = kind == "NoSuchKey"
        self.is_damaged = status == 416

    @property
    def cause(self) -> Cause:
        """Why a block could not be moved."""
        if self.status == 507 or self.kind in _NO_SPACE:
            return Cause.NO_SPACE
        return Cause.PERMISSION if self.status in (401, 403) else Cause.IO_ERROR

    @property
    def is_lasting(self) -> bool:
        """True if the store refuses this client, so that another attempt is of no use before somebody acts."""
        refuses = self.status is not None and 300 <= self.status < 500 and self.status not in _PASSING_STATUS
        return refuses or self.kind in _LASTING


def failure_of(error: Exception) -> StoreFailure:
    """What an error of obstore means."""
    text = str(error)
    for words, kind, said in _LOCAL:
        if words in text:
            return StoreFailure(kind, said)
    if (status := _STATUS.search(text)) is not None:
        code, message = _CODE.search(text), _MESSAGE.search(text)
        return _answered(int(status[1]), code[1] if code else status[1], message[1] if message else "")
    if (refused := _OF_ONE_KEY.search(text)) is not None:  # one of several objects that are deleted together
        return _answered(403 if refused[2] == "AccessDenied" else 500, refused[2], refused[1])
    first, _, _ = text.partition("\n")
    return StoreFailure(type(error).__name__, first or type(error).__name__)


def _answered(status: int, code: str, message: str) -> StoreFailure:
    said = f"status {status}" if code == str(status) else f"status {status}, {code}"
    if message:
        said += f": {message.strip()}"
    if fix := _FIXES.get(code, _FIXES["AccessDenied"] if status == 403 else ""):
        said += f" ({fix})"
    return StoreFailure(code, said, status)
