"""The connector's options, without vLLM: what means nothing in a server is refused, all else reaches the engine."""

import re
from pathlib import Path

import pytest

import kvortex
from kvortex.config.config import SECTIONS
from kvortex.config.fields import hints_of
from kvortex.errors import ConfigError
from kvortex.vllm.options import WITHOUT_MEANING, ConnectorOptions

PACKAGE = Path(kvortex.__file__).parent
OF_THE_CONNECTOR = [
    *PACKAGE.glob("vllm/**/*.py"),
    *PACKAGE.glob("tiering/*.py"),  # by an owner
    *(PACKAGE / "planes" / name for name in ("data.py", "control.py")),
]


def test_options_reach_the_engine() -> None:
    options = ConnectorOptions.from_extra_config(
        {"pool": "1GiB", "min_hit_blocks": 4, "tier": {"load_deadline_s": None}, "identity": {"model": "llama"}}
    )
    assert (options.engine.pool.bytes, options.min_hit_blocks) == (1 << 30, 4)
    assert (options.engine.tier.load_deadline_s, options.engine.identity.model) == (None, "llama")
    assert options.engine.transfer.max_batch_bytes == 32 << 20
    shared = {"owner": {"socket": "/run/kvortex.sock", "priority": 1, "quota": "20GiB"}}
    owner = ConnectorOptions.from_extra_config(shared).engine.owner
    assert (owner.priority, owner.quota) == (1, 20 << 30)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"transfer": {"max_outstanding_requests": 8}}, r"transfer\.max_outstanding_requests has no effect in vLLM"),
        ({"pool": {"lease_share": 0.5}}, r"pool\.lease_share has no effect in vLLM"),
        ({"identity": {"tp_rank": 1, "tp_size": 2}}, r"identity\.tp_rank follows from vLLM"),
        ({"identity": {"model": "m", "pp_size": 2}}, r"identity\.pp_size follows from vLLM"),
        ({"identity": {"fingerprint": "f"}}, r"identity\.fingerprint follows from vLLM"),
        ({"identity": {"modle": "m"}}, "did you mean 'model'"),
        ({"identity": 3}, "identity must be ModelIdentity"),
        ({"pol": "1GiB"}, "did you mean 'pool'"),
        ({"pool": {"byte": "1GiB"}}, "did you mean 'bytes'"),
        ({"min_hit_block": 2}, "did you mean 'min_hit_blocks'"),
        ({"engine": {}}, "unknown option 'engine'"),
        ({"pool": 16}, "did you mean '16GiB'"),
        ({"min_hit_blocks": 0}, "min_hit_blocks must be at least 1"),
        ({"min_hit_blocks": 1.5}, "min_hit_blocks must be a whole number"),
        ({"pending_wait_s": "long"}, "pending_wait_s must be a number"),
        ({"pending_wait_s": -1}, "pending_wait_s must not be negative"),
        ({"pending_wait_s": float("inf")}, "pending_wait_s must be a finite number"),
        ({"save_decoded": 1}, "save_decoded must be true or false"),
        ({"codec": "fp4"}, r"codec\.name must be one of"),
        ({"owner": {"priority": 1}}, r"give the socket of an owner as owner\.socket"),
        ({"owner": {"quota": "1GiB"}, "disk": "/var/cache"}, r"give the socket of an owner as owner\.socket"),
    ],
)
def test_what_means_nothing_is_refused_with_the_reason(extra: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConnectorOptions.from_extra_config(extra)


def test_the_staging_buffers_are_as_large_as_asked_for() -> None:
    for extra in ({"transfer": {"max_batch_bytes": "1MiB"}}, {"transfer": {"linger_s": 0.5}}, {}):
        config = ConnectorOptions.from_extra_config(extra).engine
        assert config.transfer.max_batch_bytes == (1 << 20 if "max_batch_bytes" in str(extra) else 32 << 20)


def test_names_from_before_the_sections_are_read_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match=r"cpu_pool_bytes is now pool\.bytes"):
        options = ConnectorOptions.from_extra_config({"cpu_pool_bytes": "1GiB", "min_hit_blocks": 2})
    assert (options.engine.pool.bytes, options.min_hit_blocks) == (1 << 30, 2)


def test_every_setting_either_has_an_effect_or_is_refused() -> None:
    text = "".join(path.read_text() for path in OF_THE_CONNECTOR if path.name != "options.py")
    on_disk = "".join(path.read_text() for path in PACKAGE.glob("tiers/disk/*.py"))
    tiering = (PACKAGE / "tiering" / "tiering.py").read_text()
    assert "DiskTier(config.disk," in tiering
    settings = {f"{section}.{name}" for section, kind in SECTIONS.items() for name in hints_of(kind)}
    settings -= {name for name in settings if name.startswith("identity.")}  # all of it, or refused: see above
    read = {name for name in settings if re.search(rf"\b{re.escape(name)}\b", text)}
    read |= {name for name in settings if re.search(rf"\b_?config\.{name.removeprefix('disk.')}\b", on_disk)}
    read |= {"tier.urls"} if "config.tier.urls)" in tiering else set()
    assert read == settings - set(WITHOUT_MEANING)
