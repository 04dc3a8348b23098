"""Keys of a profile in the files of the AWS command line, which obstore does not read."""

import configparser
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvortex.errors import ConfigError

if TYPE_CHECKING:
    from obstore.store import S3Credential

READ_AGAIN_S: Final = 300.0
"""Seconds after which the files are read again, so that keys in them may change."""


class ProfileKeys:
    """Gives the keys of a profile, from `~/.aws/credentials` or `~/.aws/config`, or from the files that
    `AWS_SHARED_CREDENTIALS_FILE` and `AWS_CONFIG_FILE` name.

    Args:
        profile: its name.

    Raises:
        ConfigError: it has no keys there.
    """

    def __init__(self, profile: str) -> None:
        self._profile = profile
        self._find()

    def __call__(self) -> "S3Credential":
        """The keys of this moment, for obstore."""
        found = self._find()
        return {
            "access_key_id": found["aws_access_key_id"],
            "secret_access_key": found["aws_secret_access_key"],
            "token": found.get("aws_session_token"),
            "expires_at": datetime.now(UTC) + timedelta(seconds=READ_AGAIN_S),
        }

    def region(self) -> str | None:
        """The region of the profile, if it has one."""
        return self._section().get("region")

    def _find(self) -> dict[str, str]:
        section = self._section()
        if not section.get("aws_access_key_id") or not section.get("aws_secret_access_key"):
            raise ConfigError(
                f"s3: profile {self._profile!r} has no aws_access_key_id and aws_secret_access_key in {_shown_files()}"
            )
        return section

    def _section(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for path, name in zip(_files(), (f"profile {self._profile}", self._profile), strict=True):
            parser = configparser.RawConfigParser()
            try:
                parser.read(path, encoding="utf-8")
            except (configparser.Error, OSError, UnicodeDecodeError) as error:
                raise ConfigError(
                    f"s3: {path} cannot be read: {type(error).__name__}"
                ) from None  # its lines may have keys
            for each in (self._profile, name) if self._profile == "default" else (name,):
                if parser.has_section(each):
                    found |= dict(parser.items(each))
        return found


def _files() -> tuple[Path, Path]:
    """The file of settings, and that of keys, which goes before it."""
    return (
        Path(os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config").expanduser(),
        Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser(),
    )


def _shown_files() -> str:
    settings, keys = _files()
    return f"{keys} or {settings}"
