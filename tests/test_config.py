"""Settings: checked when made, read from mappings, files and the environment."""

from pathlib import Path

import pytest

from kvortex.config import GIB, MIB, KVortexConfig, ModelIdentity, parse_bytes
from kvortex.errors import ConfigError


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
        ("eviction_policy", "fifo"),
    ],
)
def test_a_value_out_of_range_names_its_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        KVortexConfig(**{field: value})


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


@pytest.mark.parametrize("text", ["", "GiB", "16GB", "many", "1e3x", "inf", "nan", "1e999", "1 2", "0x10"])
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
        ({"identity": {"modle": "x"}}, "unknown setting 'modle'"),
        ({"numa_aware": "yes"}, "numa_aware must be bool"),
        ({"max_batch_requests": 1.5}, "max_batch_requests must be int"),
        ({"max_batch_requests": True}, "max_batch_requests must be int"),
        ({"identity": 3}, "identity must be ModelIdentity"),
    ],
)
def test_bad_mappings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KVortexConfig.from_mapping(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"ghost_entries": 0, "linger_s": 0.0, "watermark": 1.0, "pin_piece_bytes": 4096, "cpu_pool_bytes": 1},
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
            "KVORTEX_UNRELATED": "x",
        }
    )
    assert (config.watermark, config.cpu_pool_bytes, config.numa_aware, config.linger_s) == (0.5, 3 * GIB, False, 0.25)
    assert KVortexConfig.from_env({}) == KVortexConfig()
    for text, value in (("1", True), ("YES", True), ("on", True), ("False", False), ("no", False), ("off", False)):
        assert KVortexConfig.from_env({"KVORTEX_SELF_TEST": text}).self_test is value
    assert KVortexConfig.from_env({"KVORTEX_EVICTION_POLICY": "s3fifo"}).eviction_policy == "s3fifo"
    assert KVortexConfig.from_env({"KVORTEX_GHOST_ENTRIES": "7"}).ghost_entries == 7
    for name, text in (("NUMA_AWARE", "maybe"), ("LINGER_S", "soon"), ("WATERMARK", "2")):
        with pytest.raises(ConfigError):
            KVortexConfig.from_env({f"KVORTEX_{name}": text})
