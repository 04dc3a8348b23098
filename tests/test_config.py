"""Settings: checked when made, read from mappings, files and the environment."""

from pathlib import Path

import numpy as np
import pytest

from kvortex.codecs import packing
from kvortex.config import CODECS, GIB, MIB, KVortexConfig, ModelIdentity, parse_bytes
from kvortex.errors import ConfigError
from kvortex.tiers import DiskTierConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cpu_pool_bytes", 0),
        ("pin_piece_bytes", 4097),
        ("num_transfer_streams", 0),
        ("max_batch_requests", 0),
        ("max_batch_bytes", -1),
        ("linger_s", -0.1),
        ("max_consecutive_loads", 0),
        ("max_outstanding_requests", 0),
        ("watermark", 0.0),
        ("watermark", 1.1),
        ("eviction_ratio", 0.0),
        ("eviction_ratio", 1.0),
        ("ghost_entries", -1),
        ("ghost_entries", 10**30),
        ("eviction_policy", "fifo"),
        ("codec", "fp4"),
        ("linger_s", float("inf")),
        ("watermark", float("nan")),
        ("load_deadline_s", -1),
        ("cpu_pool_bytes", 1e9 + 0.5),
        ("max_batch_requests", 2.5),
        ("max_batch_requests", "32"),
        ("fetch_blocks", True),
        ("self_test", "no"),
        ("self_test", 0),
        ("numa_aware", None),
        ("watermark", "0.5"),
        ("watermark", True),
        ("cpu_pool_bytes", None),
        ("cpu_pool_bytes", "many"),
        ("cpu_pool_bytes", np.array([1 << 30])),
        ("disk_path", 7),
        ("disk_path", b"/tmp"),
        ("disk_path", "~nobody-of-that-name/x"),
        ("identity", "llama"),
        ("identity", {"modle": "llama"}),
    ],
)
def test_a_value_out_of_range_names_its_field(field: str, value: object) -> None:
    with pytest.raises(
        ConfigError, match="modle" if isinstance(value, dict) else "no size" if value == "many" else field
    ):
        KVortexConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [
        ("cpu_pool_bytes", "16GiB", 16 * GIB),
        ("cpu_pool_bytes", 1e9, 1_000_000_000),
        ("cpu_pool_bytes", np.int64(1 << 30), 1 << 30),
        ("disk_capacity_bytes", "2TiB", 2048 * GIB),
        ("max_batch_requests", np.uint8(7), 7),
        ("watermark", 1, 1.0),
        ("watermark", np.float32(0.5), 0.5),
        ("linger_s", np.int32(1), 1.0),
        ("self_test", np.bool_(False), False),
        ("load_deadline_s", 0, 0.0),
        ("load_deadline_s", None, None),
        ("load_deadline_s", float("inf"), None),
        ("disk_path", Path("/somewhere"), "/somewhere"),
        ("disk_path", "", ""),
        ("identity", {"model": "llama", "tp_size": np.int64(2)}, ModelIdentity(model="llama", tp_size=2)),
    ],
)
def test_a_value_that_can_only_mean_one_thing_is_taken(field: str, value: object, kept: object) -> None:
    found = getattr(KVortexConfig(**{field: value}), field)
    assert found == kept
    assert type(found) is type(kept)


@pytest.mark.parametrize("field", ["cpu_pool_bytes", "disk_capacity_bytes", "pin_piece_bytes"])
@pytest.mark.parametrize("value", [16, "16", 512])
def test_a_size_without_its_unit_is_asked_for(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{field} = .* did you mean '{value}[GM]iB'\?"):
        KVortexConfig(**{field: value})


@pytest.mark.parametrize("path", ["~/kv", Path("~/kv")])
def test_a_path_begins_at_home(path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of-tests")
    assert KVortexConfig(disk_path=path).disk_path == "/home/of-tests/kv"
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
        {"cpu_pool_bytes": "1GiB", "watermark": 1, "identity": {"model": "m", "tp_size": 2}}
    )
    assert config.cpu_pool_bytes == GIB
    assert config.watermark == 1.0
    assert config.identity == ModelIdentity(model="m", tp_size=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cpu_pool": 1}, "unknown setting 'cpu_pool'"),
        ({"cpu_pol_bytes": 1}, "did you mean 'cpu_pool_bytes'"),
        ({3: 1}, "unknown setting 3"),
        ({"identity": {"modle": "x"}}, "unknown setting 'modle'"),
        ({"numa_aware": "yes"}, "numa_aware must be true or false"),
        ({"max_batch_requests": 1.5}, "max_batch_requests must be a whole number"),
        ({"max_batch_requests": True}, "max_batch_requests must be a whole number"),
        ({"identity": 3}, "identity must be ModelIdentity"),
    ],
)
def test_bad_mappings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KVortexConfig.from_mapping(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"ghost_entries": 0, "linger_s": 0.0, "watermark": 1.0, "pin_piece_bytes": 4096, "cpu_pool_bytes": 4096},
        {"num_transfer_streams": 1, "max_batch_requests": 1, "max_batch_bytes": 1, "max_consecutive_loads": 1},
        {"max_outstanding_requests": 1, "eviction_ratio": 0.001, "watermark": 0.001},
    ],
)
def test_the_edges_of_the_ranges_are_inside(settings: dict[str, float]) -> None:
    config = KVortexConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_settings_do_not_change() -> None:
    with pytest.raises(AttributeError):
        KVortexConfig().watermark = 0.5


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVORTEX_CONFIG", raising=False)
    monkeypatch.setenv("KVORTEX_CPU_POOL_BYTES", "5MiB")
    assert KVortexConfig.from_env().cpu_pool_bytes == 5 * MIB


def test_from_file(tmp_path: Path) -> None:
    path = tmp_path / "kvortex.toml"
    path.write_text('cpu_pool_bytes = "2GiB"\neviction_ratio = 0.1\n[identity]\nmodel = "llama"\n')
    config = KVortexConfig.from_file(path)
    assert (config.cpu_pool_bytes, config.eviction_ratio, config.identity.model) == (2 * GIB, 0.1, "llama")
    path.write_text("cpu_pool_bytes = \n")
    with pytest.raises(ConfigError, match="cannot read"):
        KVortexConfig.from_file(path)
    with pytest.raises(ConfigError, match="cannot read"):
        KVortexConfig.from_file(tmp_path / "absent.toml")
    path.write_text("watermark = 3\n")
    with pytest.raises(ConfigError, match=r"kvortex\.toml: watermark must lie"):
        KVortexConfig.from_file(path)
    path.write_bytes(b'eviction_policy = "\xff"\n')
    with pytest.raises(ConfigError, match="cannot read"):
        KVortexConfig.from_file(path)
    path.write_text('[identity]\nmodel = "Größe"\n', encoding="utf-8")
    assert KVortexConfig.from_file(path).identity.model == "Größe"


def test_from_env(tmp_path: Path) -> None:
    path = tmp_path / "kvortex.toml"
    path.write_text("watermark = 0.5\n")
    config = KVortexConfig.from_env(
        {
            "KVORTEX_CONFIG": str(path),
            "KVORTEX_CPU_POOL_BYTES": "3GiB",
            "KVORTEX_NUMA_AWARE": "0",
            "KVORTEX_LINGER_S": "0.25",
        }
    )
    assert (config.watermark, config.cpu_pool_bytes, config.numa_aware, config.linger_s) == (0.5, 3 * GIB, False, 0.25)
    assert KVortexConfig.from_env({}) == KVortexConfig()
    for text, value in (("1", True), ("YES", True), ("on", True), ("False", False), ("no", False), ("off", False)):
        assert KVortexConfig.from_env({"KVORTEX_SELF_TEST": text}).self_test is value
    assert KVortexConfig.from_env({"KVORTEX_EVICTION_POLICY": "s3fifo"}).eviction_policy == "s3fifo"
    assert KVortexConfig.from_env({"KVORTEX_GHOST_ENTRIES": "7"}).ghost_entries == 7
    assert KVortexConfig.from_env({"KVORTEX_MAX_BATCH_REQUESTS": "1e1"}).max_batch_requests == 10
    for text, seconds in (("0", 0.0), ("1.5", 1.5), ("none", None), ("inf", None)):
        assert KVortexConfig.from_env({"KVORTEX_LOAD_DEADLINE_S": text}).load_deadline_s == seconds


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("NUMA_AWARE", "maybe"),
        ("LINGER_S", "soon"),
        ("WATERMARK", "2"),
        ("GHOST_ENTRIES", "1.5"),
        ("CPU_POOL_BYTES", "16"),
        ("IDENTITY_TP_RANK", "1"),
        ("IDENTITY", "llama"),
    ],
)
def test_a_bad_value_in_the_environment_names_its_setting(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"(?i){name.removeprefix('IDENTITY_')}"):
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
        ("CPU_POL_BYTES", "CPU_POOL_BYTES"),
        ("POOL_BYTES", "CPU_POOL_BYTES"),
        ("WATER_MARK", "WATERMARK"),
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
    config = KVortexConfig(cpu_pool_bytes="16GiB", codec="fp8", identity=ModelIdentity(model="llama"))
    assert (
        repr(config) == "KVortexConfig(cpu_pool_bytes=17179869184, codec='fp8', identity=ModelIdentity(model='llama'))"
    )
    assert eval(repr(config)) == config


def test_a_path_with_a_null_character_is_refused_when_the_config_is_made() -> None:
    for path in ("x\0y", "~/\0", "\0"):
        with pytest.raises(ConfigError, match=r"disk_path .* null character"):
            KVortexConfig(disk_path=path, identity=ModelIdentity(model="m"))
