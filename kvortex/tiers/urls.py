"""Lower tiers by URL, such as `disk:///var/cache/kvortex?capacity_bytes=500GiB`, `redis://host:6379` or `s3://bucket`.

Another package adds a scheme by an entry point of the group `kvortex.tiers`, whose name is the scheme:

    [project.entry-points."kvortex.tiers"]
    mystore = "my_package:make_tier"

It names a function `make_tier(url: TierUrl, namespace: bytes) -> Tier`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

from kvortex.config import DiskTierConfig
from kvortex.config.fields import conformed, from_text, hints_of, nearest, require_known
from kvortex.config.redaction import without_passwords
from kvortex.errors import ConfigError
from kvortex.tiers.base import Tier
from kvortex.tiers.disk import DiskTier
from kvortex.tiers.redis import RedisTier
from kvortex.tiers.redis.settings import OPTIONS, settings_of
from kvortex.tiers.s3 import S3Tier
from kvortex.tiers.s3.settings import OPTIONS as S3_OPTIONS
from kvortex.tiers.s3.settings import SCHEME as S3_SCHEME
from kvortex.tiers.s3.settings import settings_of as s3_settings_of

ENTRY_POINTS: Final = "kvortex.tiers"


@dataclass(frozen=True, slots=True, repr=False)
class TierUrl:
    """A URL of a lower tier, in parts.

    Attributes:
        text: all of it.
        scheme: the kind of tier.
        host: host, port and user, as written; empty if there are none.
        path: the path, with its leading slash if it has one.
        options: the query, name -> text.
    """

    text: str
    scheme: str
    host: str
    path: str
    options: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> "TierUrl":
        """Take a URL apart.

        Raises:
            ConfigError: no URL, or an option is given twice.
        """
        try:
            parts = urlsplit(text)
            pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        except ValueError as error:
            why = "" if "@" in text else f": {error}"  # which may say the password
            raise ConfigError(f"{without_passwords(text)!r} is no URL of a tier{why}") from None
        if not parts.scheme or parts.fragment:
            raise ConfigError(
                f"{without_passwords(text)!r} is no URL of a tier; "
                "write it as disk:///var/cache/kvortex?capacity_bytes=64GiB"
            )
        names = [name for name, _ in pairs]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"{without_passwords(text)!r} gives {', '.join(sorted(twice))} twice")
        return cls(text, parts.scheme, parts.netloc, unquote(parts.path), dict(pairs))

    def __repr__(self) -> str:
        return f"TierUrl({without_passwords(self.text)!r})"

    def without(self, name: str) -> tuple["TierUrl", str | None]:
        """The same URL without an option, and that option's text; None if it has none."""
        options = {other: text for other, text in self.options.items() if other != name}
        return replace(self, options=options), self.options.get(name)

    def values(self, hints: Mapping[str, Any]) -> dict[str, Any]:
        """The options as values of types: numbers, true and false, sizes ("64GiB" for a name that ends in `bytes`).

        Args:
            hints: the type of each option that there is.

        Raises:
            ConfigError: an option is unknown, or has no such value.
        """
        require_known(self.options, hints, f"{self.scheme}:", "option")
        values = {}
        for name, text in self.options.items():
            shown = f"{self.scheme}.{name}"
            values[name] = conformed(shown, from_text(shown, text, hints[name]), hints[name])
        return values


TierMaker: TypeAlias = Callable[[TierUrl, bytes], Tier]
"""URL and namespace digest of 32 bytes -> the tier, not opened."""


def _make_disk(url: TierUrl, namespace: bytes) -> Tier:
    if url.host:
        host = url.host.rpartition("@")[2]
        raise ConfigError(f"disk: names a host, {host!r}; a directory has three slashes: disk:///{host}{url.path}")
    hints = {name: hint for name, hint in hints_of(DiskTierConfig).items() if name != "path"}
    return DiskTier(DiskTierConfig(path=url.path, **url.values(hints)), namespace=namespace)


def _make_redis(url: TierUrl, namespace: bytes) -> Tier:
    settings = settings_of(url.scheme, url.host, url.path, url.values(OPTIONS[url.scheme]))
    return RedisTier(settings, namespace=namespace)


def _make_s3(url: TierUrl, namespace: bytes) -> Tier:
    return S3Tier(s3_settings_of(url.host, url.path, url.values(S3_OPTIONS)), namespace=namespace)


OWN: Final[Mapping[str, TierMaker]] = {
    "disk": _make_disk,
    **dict.fromkeys(OPTIONS, _make_redis),
    S3_SCHEME: _make_s3,
}
"""The schemes of this package."""


def tier_from_url(url: TierUrl | str, namespace: bytes) -> Tier:
    """Make the tier of a URL, not opened.

    Args:
        url: the URL.
        namespace: digest of the namespace, 32 bytes.

    Raises:
        ConfigError: no URL, no package knows its scheme, or its options are invalid.
    """
    if isinstance(url, str):
        url = TierUrl.parse(url)
    if url.scheme in OWN:
        return OWN[url.scheme](url, namespace)
    others = entry_points(group=ENTRY_POINTS)
    found = [entry for entry in others if entry.name == url.scheme]
    if not found:
        raise ConfigError(_unknown(url, others))
    try:
        make: TierMaker = found[0].load()
    except Exception as error:  # another package's module can raise anything
        raise ConfigError(f"the package of {url.scheme}: tiers cannot be imported: {error}") from error
    return make(url, namespace)


def _unknown(url: TierUrl, others: Iterable[EntryPoint]) -> str:
    known = sorted({*OWN, *(entry.name for entry in others)})
    guess = nearest(url.scheme, known)
    hint = f"did you mean {guess}:?" if guess else "is its package installed?"
    return f"no tier has the scheme {url.scheme!r}: {hint} There are {', '.join(f'{name}:' for name in known)}"
