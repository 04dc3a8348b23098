"""All settings, as one small frozen tree; the only module that reads settings from the environment or a file."""

import dataclasses
import logging
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from kvortex.config.fields import changed_fields, conform, from_text, hints_of, nearest, require, section_fields
from kvortex.config.redaction import without_passwords
from kvortex.config.renamed import RENAMED, warn_of_old_name
from kvortex.config.sections import (
    CodecConfig,
    DiskTierConfig,
    EvictionConfig,
    ModelIdentity,
    OwnerConfig,
    PoolConfig,
    Section,
    TierConfig,
    TransferConfig,
)
from kvortex.errors import ConfigError

logger = logging.getLogger(__name__)

EXTENT_ALIGNMENT_BYTES = 128  # a memory transaction of the GPU; every extent starts on one
ENV_PREFIX = "KVORTEX_"
ENV_FILE = "CONFIG"

Settings = Mapping[str, Any]
"""The settings of a section by name."""


@dataclass(frozen=True, slots=True, kw_only=True, init=False, repr=False)
class KVortexConfig:
    """Settings of an engine, in sections; checked when made. Sizes are bytes or text ("16GiB"), times seconds.

        KVortexConfig(pool="16GiB", codec="fp8", disk={"path": "/var/cache/kvortex", "fsync": True})

    Args:
        pool: the pool in host memory; a plain size sets `bytes`.
        eviction: which blocks are evicted from a full pool; a plain name sets `policy`.
        transfer: how blocks move between the paged cache and the pool.
        codec: how blocks are encoded; a plain name sets `name`.
        tier: lower tiers by their URLs, what is written to them, and how long calls wait; plain URLs set `urls`.
        disk: the disk below the pool; a plain path sets `path`. It needs the model's name in `identity`.
        identity: model, weights revision and ranks.
        owner: the owner of a pool that several engines share; a plain path sets `socket`.
        renamed: settings under their old names, such as `cpu_pool_bytes`; they override the others, with a
            `FutureWarning`.

    Raises:
        ConfigError: an unknown name, or a value of the wrong type or out of range.
    """

    pool: PoolConfig
    eviction: EvictionConfig
    transfer: TransferConfig
    codec: CodecConfig
    tier: TierConfig
    disk: DiskTierConfig
    identity: ModelIdentity
    owner: OwnerConfig

    def __init__(
        self,
        *,
        pool: PoolConfig | Settings | str | int = PoolConfig(),
        eviction: EvictionConfig | Settings | str = EvictionConfig(),
        transfer: TransferConfig | Settings = TransferConfig(),
        codec: CodecConfig | Settings | str = CodecConfig(),
        tier: TierConfig | Settings | str | Sequence[str] = TierConfig(),
        disk: DiskTierConfig | Settings | str | os.PathLike[str] = DiskTierConfig(),
        identity: ModelIdentity | Settings = ModelIdentity(),
        owner: OwnerConfig | Settings | str | os.PathLike[str] = OwnerConfig(),
        **renamed: Any,
    ) -> None:
        given = (pool, eviction, transfer, codec, tier, disk, identity, owner)
        for name, value in zip(SECTIONS, given, strict=True):
            object.__setattr__(self, name, value)
        conform(self)
        require(
            not (self.tier.urls and self.disk.path),
            f"give lower tiers as tier.urls ({self.lower_tier}) or as disk.path ({self.disk.path}), not both",
        )
        of_owner = self.lower_tier or ("tier.canonical_layout" if self.tier.canonical_layout else "")
        require(
            not (self.owner.socket and of_owner),
            f"lower tiers are set where the owner ({self.owner.socket}) is started: leave {of_owner} out here",
        )
        _require_settings(renamed)
        for old, value in renamed.items():
            section, name = RENAMED[old]
            warn_of_old_name(old, str(RENAMED[old]))
            object.__setattr__(self, section, dataclasses.replace(getattr(self, section), **{name: value}))

    def __getattr__(self, name: str) -> Any:
        if name not in RENAMED:
            raise AttributeError(f"KVortexConfig has no setting {name!r}; its sections are {', '.join(SECTIONS)}")
        place = RENAMED[name]
        warn_of_old_name(name, str(place))
        return getattr(getattr(self, place.section), place.name)

    def __repr__(self) -> str:
        """One line that makes the same settings again, but for passwords, which it does not show."""
        changes = {name: changed_fields(getattr(self, name)) for name in SECTIONS}
        shown = {name: _short(values, SECTIONS[name]) for name, values in changes.items() if values}
        return without_passwords(f"KVortexConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})")

    @property
    def lower_tier(self) -> str:
        """The URLs, without passwords, or the directory of the lower tiers; empty if there is none."""
        return without_passwords(" ".join(self.tier.urls)) or str(self.disk.path)

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed. Settings that a section's mapping or plain value does not name are kept.

            config.replace(pool={"bytes": "8GiB"}, codec="fp8")

        Raises:
            ConfigError: an unknown name, or a value of the wrong type or out of range.
        """
        _require_settings(changes)
        return dataclasses.replace(self, **{name: self._changed(name, value) for name, value in changes.items()})

    def _changed(self, name: str, value: Any) -> Any:
        if name in RENAMED or isinstance(value, SECTIONS[name]):
            return value
        return dataclasses.replace(getattr(self, name), **section_fields(name, value, SECTIONS[name]))

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> Self:
        """Make settings from a mapping by section, such as parsed JSON or TOML.

        Raises:
            ConfigError: an unknown name, a setting given twice, or a value of the wrong type or out of range.
        """
        _require_settings(name for name in settings if name not in SECTIONS)
        for old in sorted(set(settings) & set(RENAMED)):
            section, name = RENAMED[old]
            _require_once(settings.get(section, {}), SECTIONS[section], name, old)
        return cls(**settings)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read settings from a TOML file; each section is a table or a plain value.

        Raises:
            ConfigError: the file cannot be read, or an error of `from_mapping`; the message names the file.
        """
        place = Path(os.path.expanduser(path))
        try:
            settings = tomllib.loads(place.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"cannot read {place}: {error}") from error
        try:
            return cls.from_mapping(settings)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Read settings from variables such as `KVORTEX_POOL=16GiB` or `KVORTEX_TIER_TIMEOUT_S=5`: section, then name.

        `KVORTEX_CONFIG` names a TOML file; variables override its settings. An unknown variable that begins with
        `KVORTEX_` is an error if its name is close to a setting's name, and a warning otherwise.

        Raises:
            ConfigError: see `from_file`.
        """
        given = {
            name.removeprefix(ENV_PREFIX): text
            for name, text in (os.environ if environ is None else environ).items()
            if name.startswith(ENV_PREFIX)
        }
        base = cls.from_file(given[ENV_FILE]) if ENV_FILE in given else cls()
        _look_at_rest(given)
        changes = {name: _section_from(given, kind) for name, kind in SECTIONS.items()}
        return base.replace(**changes)


SECTIONS: Final[Mapping[str, type[Section]]] = hints_of(KVortexConfig)
"""Section -> its class."""


def _short(values: dict[str, Any], kind: type[Section]) -> Any:
    return values[kind.plain] if list(values) == [kind.plain] else values


def _require_settings(names: Iterable[object]) -> None:
    """Raise `ConfigError` for a name that is neither a section nor an old name; the message has a suggestion."""
    for name in names:
        if name in SECTIONS or name in RENAMED:
            continue
        guess = nearest(str(name), _MEANT)
        hint = f": did you mean {_MEANT[guess]}?" if guess else ""
        shown = without_passwords(repr(name))
        raise ConfigError(f"unknown setting {shown}{hint}; the sections are {', '.join(SECTIONS)}")


def _require_once(value: Any, kind: type[Section], name: str, old: str) -> None:
    """Raise `ConfigError` if a section sets what its old name sets too."""
    sets_it = name in value if isinstance(value, Mapping) else kind.plain == name
    if sets_it:
        raise ConfigError(f"{kind.section}.{name} is given twice, as {old} too: leave {old} out, it is the old name")


def _meant() -> dict[str, str]:
    """Names that a user may write for a setting -> the setting's name."""
    own = {name: name for name in SECTIONS}
    bare = {name: f"{section}.{name}" for section, kind in SECTIONS.items() for name in hints_of(kind)}
    whole = {f"{section}_{name}": f"{section}.{name}" for section, kind in SECTIONS.items() for name in hints_of(kind)}
    return {**bare, **whole, **{old: str(place) for old, place in RENAMED.items()}, **own}


_MEANT: Final = _meant()


def _variables() -> dict[str, tuple[type[Section], str]]:
    """Environment variable, without its prefix -> section and field."""
    variables: dict[str, tuple[type[Section], str]] = {}
    for section, kind in SECTIONS.items():
        variables |= {f"{section}_{name}".upper(): (kind, name) for name in hints_of(kind)}
        if kind.plain:
            variables[section.upper()] = (kind, kind.plain)
    return variables


_VARIABLES: Final = _variables()
_OLD_VARIABLES: Final = {old.upper(): (SECTIONS[place.section], place.name) for old, place in RENAMED.items()}


def _section_from(given: Mapping[str, str], kind: type[Section]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, (owner, name) in {**_OLD_VARIABLES, **_VARIABLES}.items():
        if owner is not kind or variable not in given:
            continue
        shown = f"{ENV_PREFIX}{variable}"
        if name in values:
            raise ConfigError(f"{shown} sets {kind.section}.{name}, and so does another variable: keep one of them")
        if variable not in _VARIABLES:
            warn_of_old_name(shown, f"{ENV_PREFIX}{kind.section}_{name}".upper())
        values[name] = from_text(f"{kind.section}.{name}", given[variable], hints_of(kind)[name])
    return values


def _look_at_rest(given: Mapping[str, str]) -> None:
    known = {ENV_FILE, *_VARIABLES, *_OLD_VARIABLES}
    for name in sorted(set(given) - known):
        guess = nearest(name, known)
        if guess is not None:
            raise ConfigError(f"{ENV_PREFIX}{name} is no setting: did you mean {ENV_PREFIX}{guess}?")
        logger.warning("%s%s is no setting of KVortex and has no effect on it", ENV_PREFIX, name)
