"""Settings: checked when made, read from mappings, files and the environment."""

import dataclasses
import json
import operator
import re
from pathlib import Path

import numpy as np
import pytest

from kvortex.codecs import packing
from kvortex.config import (
    CODECS,
    GIB,
    MIB,
    KVortexConfig,
    ModelIdentity,
    PoolConfig,
    TierConfig,
    parse_bytes,
)
from kvortex.config.config import SECTIONS
from kvortex.config.fields import hints_of
from kvortex.config.renamed import RENAMED
from kvortex.errors import ConfigError
from kvortex.tiers import DiskTierConfig


def config_with(field: str, value: object) -> KVortexConfig:
    """The defaults, but for one field, `section.name` or a whole section."""
    section, _, name = field.partition(".")
    return KVortexConfig(**{section: {name: value} if name else value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pool.bytes", 0),
        ("pool.pin_piece_bytes", 4097),
        ("transfer.streams", 0),
        ("transfer.max_batch_requests", 0),
        ("transfer.max_batch_bytes", -1),
        ("transfer.linger_s", -0.1),
        ("transfer.max_consecutive_loads", 0),
        ("transfer.max_outstanding_requests", 0),
        ("eviction.watermark", 0.0),
        ("eviction.watermark", 1.1),
        ("eviction.ratio", 0.0),
        ("eviction.ratio", 1.0),
        ("eviction.ghost_entries", -1),
        ("eviction.ghost_entries", 10**30),
        ("eviction.policy", "fifo"),
        ("codec.name", "fp4"),
        ("transfer.linger_s", float("inf")),
        ("eviction.watermark", float("nan")),
        ("tier.load_deadline_s", -1),
        ("pool.bytes", 1e9 + 0.5),
        ("transfer.max_batch_requests", 2.5),
        ("transfer.max_batch_requests", "32"),
        ("tier.fetch_blocks", True),
        ("transfer.self_test", "no"),
        ("transfer.self_test", 0),
        ("pool.numa_aware", None),
        ("eviction.watermark", "0.5"),
        ("eviction.watermark", True),
        ("pool.bytes", None),
        ("pool.bytes", "many"),
        ("pool.bytes", np.array([1 << 30])),
        ("disk.path", 7),
        ("disk.path", b"/tmp"),
        ("disk.path", "~nobody-of-that-name/x"),
        ("identity", "llama"),
        ("identity", {"modle": "llama"}),
    ],
)
def test_a_value_out_of_range_names_its_field(field: str, value: object) -> None:
    message = "modle" if isinstance(value, dict) else "no size" if value == "many" else re.escape(field)
    with pytest.raises(ConfigError, match=message):
        config_with(field, value)


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [
        ("pool.bytes", "16GiB", 16 * GIB),
        ("pool.bytes", 1e9, 1_000_000_000),
        ("pool.bytes", np.int64(1 << 30), 1 << 30),
        ("disk.capacity_bytes", "2TiB", 2048 * GIB),
        ("transfer.max_batch_requests", np.uint8(7), 7),
        ("eviction.watermark", 1, 1.0),
        ("eviction.watermark", np.float32(0.5), 0.5),
        ("transfer.linger_s", np.int32(1), 1.0),
        ("transfer.self_test", np.bool_(False), False),
        ("tier.load_deadline_s", 0, 0.0),
        ("tier.load_deadline_s", None, None),
        ("tier.load_deadline_s", float("inf"), None),
        ("disk.path", Path("/somewhere"), "/somewhere"),
        ("disk.path", "", ""),
        ("identity", {"model": "llama", "tp_size": np.int64(2)}, ModelIdentity(model="llama", tp_size=2)),
    ],
)
def test_a_value_that_can_only_mean_one_thing_is_taken(field: str, value: object, kept: object) -> None:
    found = operator.attrgetter(field)(config_with(field, value))
    assert found == kept
    assert type(found) is type(kept)


@pytest.mark.parametrize("field", ["pool.bytes", "disk.capacity_bytes", "pool.pin_piece_bytes"])
@pytest.mark.parametrize("value", [16, "16", 512])
def test_a_size_without_its_unit_is_asked_for(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{field} = .* did you mean '{value}[GM]iB'\?"):
        config_with(field, value)


@pytest.mark.parametrize("path", ["~/kv", Path("~/kv")])
def test_a_path_begins_at_home(path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of-tests")
    assert KVortexConfig(disk=path).disk.path == "/home/of-tests/kv"
    assert DiskTierConfig(path=path, capacity_bytes="1GiB").path == "/home/of-tests/kv"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("read_threads", 2.5),
        ("direct", "yes"),
        ("fsync", 1),
        ("capacity_bytes", "much"),
        ("rescan_interval_s", "1"),
        ("touch_interval_s", None),
    ],
)
def test_settings_of_the_disk_tier_are_as_strict(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match="no size" if value == "much" else field):
        DiskTierConfig(**{"path": "/x", "capacity_bytes": GIB, field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("model", None), ("model", 3), ("weights_revision", b"abc"), ("tp_size", 2.5), ("pp_size", 0)]
)
def test_an_identity_is_checked_too(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        ModelIdentity(**{field: value})


def test_the_codecs_are_those_that_there_are() -> None:
    assert sorted(CODECS) == sorted(packing.CODECS)


@pytest.mark.parametrize("ranks", [{"tp_rank": 2, "tp_size": 2}, {"pp_rank": -1}])
def test_ranks(ranks: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="rank"):
        ModelIdentity(**ranks)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4096", 4096),
        ("16GiB", 16 * GIB),
        ("1.5 gib", 3 * GIB // 2),
        (" 512 MiB ", 512 * MIB),
        ("7B", 7),
        ("2TiB", 2048 * GIB),
        ("3kib", 3072),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "16GB", "many", "1e3x", "inf", "nan", "1e999", "1 2", "0x10", "2.5", "0.5B"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="no size"):
        parse_bytes(text)


def test_from_mapping() -> None:
    config = KVortexConfig.from_mapping(
        {"pool": "1GiB", "eviction": {"watermark": 1}, "identity": {"model": "m", "tp_size": 2}}
    )
    assert config.pool.bytes == GIB
    assert config.eviction.watermark == 1.0
    assert config.identity == ModelIdentity(model="m", tp_size=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cpu": 1}, "unknown setting 'cpu'; the sections are pool, eviction"),
        ({"pol": 1}, "unknown setting 'pol': did you mean pool\\?"),
        ({"pool_byte": 1}, r"did you mean pool\.bytes\?"),
        ({"timeout_s": 1}, r"did you mean tier\.timeout_s\?"),
        ({"cpu_pol_bytes": 1}, r"did you mean pool\.bytes\?"),
        ({3: 1}, "unknown setting 3"),
        ({"pool": {"byts": 1}}, "unknown setting 'byts': did you mean 'bytes'\\?; PoolConfig knows bytes"),
        ({"identity": {"modle": "x"}}, "unknown setting 'modle'"),
        ({"pool": {"numa_aware": "yes"}}, r"pool\.numa_aware must be true or false"),
        ({"transfer": {"max_batch_requests": 1.5}}, r"transfer\.max_batch_requests must be a whole number"),
        ({"transfer": {"max_batch_requests": True}}, r"transfer\.max_batch_requests must be a whole number"),
        ({"transfer": 5}, "transfer must be TransferConfig, a mapping of its settings; not int"),
        ({"pool": ["1GiB"]}, "pool must be PoolConfig, a mapping of its settings, or its bytes alone; not list"),
        ({"pool": True}, "pool must be PoolConfig"),
        ({"pool": None}, "pool must be PoolConfig"),
        ({"identity": 3}, "identity must be ModelIdentity"),
        ({"pool": "1GiB", "cpu_pool_bytes": "2GiB"}, r"pool\.bytes is given twice, as cpu_pool_bytes too"),
        ({"tier": {"timeout_s": 1}, "tier_timeout_s": 2}, r"tier\.timeout_s is given twice, as tier_timeout_s too"),
    ],
)
def test_bad_mappings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KVortexConfig.from_mapping(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {
            "eviction": {"ghost_entries": 0, "watermark": 1.0},
            "transfer": {"linger_s": 0.0},
            "pool": {"pin_piece_bytes": 4096, "bytes": 4096},
        },
        {
            "transfer": {
                "streams": 1,
                "max_batch_requests": 1,
                "max_batch_bytes": 1,
                "max_consecutive_loads": 1,
                "max_outstanding_requests": 1,
            },
            "eviction": {"ratio": 0.001, "watermark": 0.001},
        },
    ],
)
def test_the_edges_of_the_ranges_are_inside(settings: dict[str, dict[str, float]]) -> None:
    config = KVortexConfig(**settings)
    for section, values in settings.items():
        assert {name: getattr(getattr(config, section), name) for name in values} == values


def test_settings_do_not_change() -> None:
    with pytest.raises(AttributeError):
        KVortexConfig().pool = 5
    with pytest.raises(AttributeError):
        KVortexConfig().eviction.watermark = 0.5


def test_a_changed_copy_keeps_the_rest() -> None:
    config = KVortexConfig(pool={"bytes": "1GiB", "numa_aware": False}, identity={"model": "m"})
    changed = config.replace(pool="2GiB", codec="fp8", tier=TierConfig(timeout_s=2), identity={"tp_size": 2})
    assert changed.pool == PoolConfig(bytes=2 * GIB, numa_aware=False)
    assert (changed.codec.name, changed.tier.timeout_s) == ("fp8", 2.0)
    assert changed.identity == ModelIdentity(model="m", tp_size=2)
    assert config.pool.bytes == GIB
    for changes, message in (
        ({"pol": 1}, "did you mean pool"),
        ({"pool": {"byte": 1}}, "did you mean 'bytes'"),
        ({"transfer": 5}, "transfer must be TransferConfig"),
    ):
        with pytest.raises(ConfigError, match=message):
            config.replace(**changes)


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVORTEX_CONFIG", raising=False)
    monkeypatch.setenv("KVORTEX_POOL", "5MiB")
    assert KVortexConfig.from_env().pool.bytes == 5 * MIB


def test_from_file(tmp_path: Path) -> None:
    path = tmp_path / "kvortex.toml"
    path.write_text('pool = "2GiB"\n[eviction]\nratio = 0.1\n[identity]\nmodel = "llama"\n')
    config = KVortexConfig.from_file(path)
    assert (config.pool.bytes, config.eviction.ratio, config.identity.model) == (2 * GIB, 0.1, "llama")
    path.write_text("pool = \n")
    with pytest.raises(ConfigError, match="cannot read"):
        KVortexConfig.from_file(path)
    with pytest.raises(ConfigError, match="cannot read"):
        KVortexConfig.from_file(tmp_path / "absent.toml")
    path.write_text("[eviction]\nwatermark = 3\n")
    with pytest.raises(ConfigError, match=r"kvortex\.toml: eviction\.watermark must lie"):
        KVortexConfig.from_file(path)
    path.write_bytes(b'eviction = "\xff"\n')
    with pytest.raises(ConfigError, match="cannot read"):
        KVortexConfig.from_file(path)
    path.write_text('[identity]\nmodel = "Größe"\n', encoding="utf-8")
    assert KVortexConfig.from_file(path).identity.model == "Größe"


def test_from_env(tmp_path: Path) -> None:
    def read(**variables: str) -> KVortexConfig:
        return KVortexConfig.from_env({f"KVORTEX_{name}": text for name, text in variables.items()})

    path = tmp_path / "kvortex.toml"
    path.write_text("[eviction]\nwatermark = 0.5\n")
    config = read(CONFIG=str(path), POOL="3GiB", POOL_NUMA_AWARE="0", TRANSFER_LINGER_S="0.25")
    assert (config.eviction.watermark, config.transfer.linger_s) == (0.5, 0.25)
    assert config.pool == PoolConfig(bytes=3 * GIB, numa_aware=False)
    assert KVortexConfig.from_env({}) == KVortexConfig()
    for text, value in (("1", True), ("YES", True), ("on", True), ("False", False), ("no", False), ("off", False)):
        assert read(TRANSFER_SELF_TEST=text).transfer.self_test is value
    assert read(EVICTION_POLICY="s3fifo").eviction.policy == "s3fifo"
    assert read(EVICTION="s3fifo").eviction.policy == "s3fifo"
    assert read(EVICTION_GHOST_ENTRIES="7").eviction.ghost_entries == 7
    assert read(TRANSFER_MAX_BATCH_REQUESTS="1e1").transfer.max_batch_requests == 10
    assert read(POOL_BYTES="1GiB").pool.bytes == GIB
    assert read(DISK="/somewhere", DISK_CAPACITY_BYTES="2TiB").disk == DiskTierConfig(
        path="/somewhere", capacity_bytes="2TiB"
    )
    for text, seconds in (("0", 0.0), ("1.5", 1.5), ("none", None), ("inf", None)):
        assert read(TIER_LOAD_DEADLINE_S=text).tier.load_deadline_s == seconds


OTHER_VALUES = {
    "pool.lease_share": 0.25,
    "eviction.policy": "arc",
    "codec.name": "fp8",
    "tier.urls": "disk:///somewhere disk:///elsewhere",
    "tier.inclusion": "exclusive",
    "tier.admission": "second_touch",
    "tier.shed": "oldest",
    "disk.direct": True,
}
SETTINGS = [f"{section}.{name}" for section, kind in SECTIONS.items() for name in hints_of(kind)]


def other_value(setting: str) -> object:
    """A value that is not the default, and in range."""
    default = operator.attrgetter(setting)(KVortexConfig())
    by_type = {bool: not default, int: 8192, float: 0.5, str: "/somewhere", type(None): 0.5}
    return OTHER_VALUES[setting] if setting in OTHER_VALUES else by_type[type(default)]


NEED_OTHERS = ("identity.tp_rank", "identity.pp_rank", "owner.priority", "owner.quota")  # a size, or a socket


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name not in NEED_OTHERS])
def test_every_setting_has_one_name_everywhere(setting: str, tmp_path: Path) -> None:
    section, name = setting.split(".")
    value = other_value(setting)
    config = config_with(setting, value)
    assert config != KVortexConfig()
    assert KVortexConfig.from_env({f"KVORTEX_{section}_{name}".upper(): str(value)}) == config
    path = tmp_path / "kvortex.toml"
    path.write_text(f"[{section}]\n{name} = {json.dumps(value)}\n")
    assert KVortexConfig.from_file(path) == config
    assert KVortexConfig().replace(**{section: {name: value}}) == config


def test_what_an_engine_gets_of_a_shared_pool_needs_the_socket_of_its_owner(tmp_path: Path) -> None:
    given = {"socket": "/run/kv.sock", "priority": -3, "quota": "20GiB"}
    config = KVortexConfig(owner=given)
    assert (config.owner.priority, config.owner.quota) == (-3, 20 * GIB)
    assert KVortexConfig.from_env({f"KVORTEX_OWNER_{n}".upper(): str(value) for n, value in given.items()}) == config
    path = tmp_path / "kvortex.toml"
    path.write_text("[owner]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in given.items()))
    assert KVortexConfig.from_file(path) == config
    assert KVortexConfig(owner="/run/kv.sock").replace(owner={"priority": -3, "quota": 20 * GIB}) == config
    assert (KVortexConfig().owner.priority, KVortexConfig().owner.quota) == (None, None)
    assert KVortexConfig(owner={"socket": "/s", "priority": 0}).owner.priority == 0
    for name in ("priority", "quota"):
        with pytest.raises(ConfigError, match=rf"give the socket of an owner as owner\.socket, or leave owner\.{name}"):
            KVortexConfig(owner={name: 8192}, disk="/somewhere") if name == "quota" else KVortexConfig(owner={name: 0})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quota": 0}, r"leave it out for no quota, or give a size such as 20GiB"),
        ({"quota": "0"}, r"leave it out for no quota"),
        ({"quota": 20}, r"did you mean '20GiB'"),
        ({"quota": -1}, r"owner\.quota must be at least 1"),
        ({"quota": "40%"}, r"no size; write it as 16GiB"),
        ({"quota": 1 << 62}, r"below 4 EiB"),
        ({"priority": 1001}, r"owner\.priority must lie in \[-1000, 1000\]"),
        ({"priority": -1001}, r"owner\.priority must lie in"),
        ({"priority": 0.5}, r"owner\.priority must be a whole number"),
    ],
)
def test_a_share_that_cannot_be_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KVortexConfig(owner={"socket": "/run/kv.sock", **given})


def test_a_variable_and_its_short_form_are_one_setting() -> None:
    with pytest.raises(ConfigError, match=r"sets pool\.bytes, and so does another variable"):
        KVortexConfig.from_env({"KVORTEX_POOL": "1GiB", "KVORTEX_POOL_BYTES": "1GiB"})


# Names from before the sections.


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_read_with_a_warning_that_has_the_new_one(old: str, tmp_path: Path) -> None:
    place = RENAMED[old]
    value = other_value(str(RENAMED[old]))
    new = KVortexConfig(**{place.section: {place.name: value}})
    assert new != KVortexConfig()
    warns = pytest.warns(FutureWarning, match=rf"setting {old} is now {place.section}\.{place.name}")
    with warns:
        assert KVortexConfig(**{old: value}) == new
    with warns:
        assert KVortexConfig.from_mapping({old: value}) == new
    with warns:
        assert getattr(new, old) == value
    with warns:
        assert dataclasses.replace(KVortexConfig(), **{old: value}) == new
    path = tmp_path / "kvortex.toml"
    path.write_text(f"{old} = {json.dumps(value)}\n")
    with warns:
        assert KVortexConfig.from_file(path) == new


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_variable_is_read_with_a_warning_that_has_the_new_one(old: str) -> None:
    section, name = RENAMED[old]
    value = other_value(str(RENAMED[old]))
    given = {f"KVORTEX_{old.upper()}": str(value)}
    if old.upper() == f"{section}_{name}".upper():  # the same variable as before
        config = KVortexConfig.from_env(given)
    else:
        with pytest.warns(
            FutureWarning, match=f"KVORTEX_{old.upper()} is now KVORTEX_{section.upper()}_{name.upper()};"
        ):
            config = KVortexConfig.from_env(given)
    assert getattr(getattr(config, section), name) == value


def test_a_name_that_never_was_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no setting 'pool_size'; its sections are pool"):
        KVortexConfig().pool_size  # noqa: B018


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("POOL_NUMA_AWARE", "maybe"),
        ("TRANSFER_LINGER_S", "soon"),
        ("EVICTION_WATERMARK", "2"),
        ("EVICTION_GHOST_ENTRIES", "1.5"),
        ("POOL_BYTES", "16"),
        ("IDENTITY_TP_RANK", "1"),
    ],
)
def test_a_bad_value_in_the_environment_names_its_setting(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"(?i){name.replace('_', '.', 1)}"):
        KVortexConfig.from_env({f"KVORTEX_{name}": text})


def test_the_identity_comes_from_the_environment_too(tmp_path: Path) -> None:
    path = tmp_path / "kvortex.toml"
    path.write_text('[identity]\nmodel = "llama"\nweights_revision = "a"\n')
    config = KVortexConfig.from_env(
        {"KVORTEX_CONFIG": str(path), "KVORTEX_IDENTITY_WEIGHTS_REVISION": "b", "KVORTEX_IDENTITY_TP_SIZE": "4"}
    )
    assert config.identity == ModelIdentity(model="llama", weights_revision="b", tp_size=4)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("POL_BYTES", "POOL_BYTES"),
        ("CPU_POL_BYTES", "CPU_POOL_BYTES"),
        ("EVICTION_WATER_MARK", "EVICTION_WATERMARK"),
        ("IDENTITY_MODLE", "IDENTITY_MODEL"),
        ("CONFIGS", "CONFIG"),
    ],
)
def test_a_mistyped_variable_is_an_error_with_the_nearest_name(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"KVORTEX_{name} is no setting: did you mean KVORTEX_{meant}\\?"):
        KVortexConfig.from_env({f"KVORTEX_{name}": "1GiB"})


@pytest.mark.parametrize("name", ["KVORTEX_SERVICE_HOST", "KVORTEX_PORT_8000_TCP", "KVORTEX_UNRELATED"])
def test_a_variable_of_somebody_else_is_said_and_left_alone(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A service called kvortex gives every container of its namespace such variables."""
    assert KVortexConfig.from_env({name: "10.0.0.1"}) == KVortexConfig()
    assert name in caplog.text


def test_it_prints_on_one_line_what_is_not_the_default() -> None:
    assert repr(KVortexConfig()) == "KVortexConfig()"
    config = KVortexConfig(pool="16GiB", codec="fp8", identity=ModelIdentity(model="llama"))
    assert repr(config) == "KVortexConfig(pool=17179869184, codec='fp8', identity={'model': 'llama'})"
    config = config.replace(pool={"numa_aware": False})
    assert eval(repr(config)) == config


def test_a_path_with_a_null_character_is_refused_when_the_config_is_made() -> None:
    for path in ("x\0y", "~/\0", "\0"):
        with pytest.raises(ConfigError, match=r"disk\.path .* null character"):
            KVortexConfig(disk=path, identity=ModelIdentity(model="m"))
