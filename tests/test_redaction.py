"""Passwords of lower tiers are nowhere to be seen: all ways in which settings are printed, at once."""

import json
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvortex import KVortexConfig, KVortexEngine
from kvortex.cli.main import main
from kvortex.config import TierConfig
from kvortex.config.redaction import without_passwords
from kvortex.errors import ConfigError
from kvortex.testing.tier_conformance import NAMESPACE
from kvortex.tiers import TierUrl, tier_from_url
from tests.engine_support import BLOCK_SIZE, chain, make_cache

SECRET = "s3cret"
URLS = (
    f"redis://me:{SECRET}@127.0.0.1:1",
    f"unix://:{SECRET}@/no/such/redis.sock?db=1",
    f"redis+cluster://me:{SECRET}@127.0.0.1:1,127.0.0.1:2?prefix=a:",
    f"redis+sentinel://me:{SECRET}%2F@127.0.0.1:1/main",
    f"redis://me:{SECRET}@{SECRET}@127.0.0.1:1",
    f"mystore://host/path?secret_key={SECRET}&region=x&token={SECRET}#",
    f"mystore://host/path?access_password={SECRET}",
)
CONFIG = KVortexConfig(tier=URLS, identity={"model": "m"})


def texts() -> Iterator[str]:
    for each in (CONFIG, CONFIG.tier, CONFIG.replace(pool="1GiB"), TierConfig(urls=URLS[:1])):
        yield from (repr(each), str(each), f"{each}", f"{each!r}", f"{[each]}")
    yield CONFIG.lower_tier
    yield json.dumps({"lower_tier": CONFIG.lower_tier})
    for url in URLS[:4]:
        parsed = TierUrl.parse(url)
        yield from (repr(parsed), str(parsed), repr(parsed.without("db")))
        tier: Any = tier_from_url(url, NAMESPACE)
        yield from (repr(tier), repr(tier._settings), tier._settings.address)


def test_no_way_of_printing_settings_shows_a_password() -> None:
    shown = list(texts())
    assert not [text for text in shown if SECRET in text]
    assert sum("redis://me:***@127.0.0.1:1" in text for text in shown) > 10
    assert repr(KVortexConfig(tier=URLS[0])) == "KVortexConfig(tier=('redis://me:***@127.0.0.1:1',))"


MISTAKES: list[Callable[[], object]] = [
    lambda: CONFIG.replace(disk="/b"),
    lambda: CONFIG.replace(owner="/run/kvortex.sock"),
    lambda: KVortexConfig(tier=[URLS[0].encode()]),  # type: ignore[list-item]
    lambda: KVortexConfig(tier={URLS[0]: 1}),
    lambda: KVortexConfig(tier={"urls": {URLS[0]: 1}}),
    lambda: KVortexConfig(tier={"timeout_s": URLS[0]}),
    lambda: KVortexConfig(tier={"admission": URLS[0]}),
    lambda: KVortexConfig(pool=URLS[0]),
    lambda: KVortexConfig(codec=URLS[0]),
    lambda: KVortexConfig.from_mapping({URLS[0]: 1}),
    lambda: KVortexConfig.from_env({"KVORTEX_POOL": URLS[0]}),
    lambda: KVortexConfig.from_env({"KVORTEX_POOL_NUMA_AWARE": URLS[0]}),
    lambda: KVortexConfig.from_env({"KVORTEX_TIER": URLS[0], "KVORTEX_DISK": "/a"}),
    *(
        lambda url=url: tier_from_url(url, NAMESPACE)  # type: ignore[misc]
        for url in (
            f"redist://me:{SECRET}@cache",
            f"disk://me:{SECRET}@cache/a",
            f"redis://me:{SECRET}@[cache",
            f"redis://me:{SECRET}@cache\u2100",
            f"redis://me:{SECRET}@cache:port",
            f"redis://me:{SECRET}@cache?tls=1",
            f"redis://me:{SECRET}@cache/x",
            f"redis://me:{SECRET}@cache?ttl_s=1&ttl_s=1",
            f"redis://me:{SECRET}@cache?ttl_s=x",
            f"redis://me:{SECRET}@cache#a",
            f"redis://me:{SECRET}@cache?password_file=/dev/null",
            f"unix://me:{SECRET}@host/a",
            f"redis+cluster://me:{SECRET}@a/1",
            f"redis+sentinel://me:{SECRET}@a",
        )
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_no_message_shows_a_password(mistake: Callable[[], object]) -> None:
    with pytest.raises(ConfigError) as raised:
        mistake()
    told = [str(error) for error in _chain(raised.value)]
    assert not any(SECRET in text for text in told)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """What a traceback would print: the error, and those that it names as its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


async def test_no_log_of_an_engine_shows_a_password(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    tiers = {"urls": URLS[:4], "timeout_s": 1.0}
    config = KVortexConfig(pool="1MiB", tier=tiers, identity={"model": "m"})
    async with KVortexEngine.create(config) as engine:
        engine.register_kv_caches(make_cache(), BLOCK_SIZE)
        await engine.wait_tier()
        await engine.load_blocks(chain(4), range(4))
        await engine.save_blocks(chain(4), range(4))
        await engine.flush()
        shown = [repr(engine.get_stats()), str(engine.get_stats())]
    lines = [record.getMessage() + str(record.exc_text or "") for record in caplog.records]
    lines += ["".join(traceback.format_exception(*record.exc_info)) for record in caplog.records if record.exc_info]
    assert any("redis" in line for line in lines)
    assert not [line for line in [*lines, *shown] if SECRET in line]


def test_no_output_of_a_command_shows_a_password(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "kvortex.toml"
    config.write_text(f'tier = ["{URLS[0]}", "redis://me:{SECRET}@cache:port"]\n[identity]\nmodel = "m"\n')
    assert main(["serve", "--config", str(config), "--disk", "/a"]) == 2
    out, err = capsys.readouterr()
    assert "me:***@" in err
    assert SECRET not in out + err


def test_what_is_no_password_stays() -> None:
    for text in (
        "redis://cache:6379/0?prefix=a:b",
        "redis+sentinel://a/main?password_file=/etc/secret&sentinel_password_file=/a@b",
        "disk:///var/a@b?seal_keys=/etc/kvortex/seal.keys",
        "ratio 1:2 at http://example.org",
    ):
        assert without_passwords(text) == text
