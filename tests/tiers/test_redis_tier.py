"""The tier over Redis keeps the contract over a real server: by Unix socket, by TCP, and by TLS."""

import hashlib
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, cast

import pytest
import trustme

from kvortex.testing.tier_conformance import ROOMY_BYTES, TierConformance
from kvortex.tiers import RedisTier, Tier
from tests.tiers.redis_support import Proxy, RedisServer, tier_over


class TestRedisTier(TierConformance):
    """By Unix socket; the tier evicts, because the suite states a capacity."""

    keeps_blocks_after_closing = True
    server: ClassVar[RedisServer]
    lists_roomy: ClassVar[bool] = True

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def running(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        with RedisServer() as cls.server:
            yield

    def url(self) -> str:
        return self.server.url()

    def make_tier(self, root: Path, namespace: bytes, capacity_bytes: int) -> Tier:
        url = f"{self.url()}&prefix={hashlib.sha256(str(root).encode()).hexdigest()[:16]}:[x]*:"
        if self.lists_roomy or capacity_bytes != ROOMY_BYTES:
            url += f"&capacity_bytes={capacity_bytes}"
        return tier_over(url, namespace)

    def raw_keys(self, tier: Tier) -> set[bytes]:
        prefix = cast(RedisTier, tier)._blocks._prefix
        return {bytes.fromhex(name[-64:].decode()) for name in self.server.ask("KEYS", "*") if name.startswith(prefix)}

    def raw_read(self, tier: Tier, key: bytes) -> bytes:
        return cast(bytes, self.server.ask("GET", cast(RedisTier, tier)._blocks.name_of(key)))

    def raw_write(self, tier: Tier, key: bytes, data: bytes) -> None:
        self.server.ask("SET", cast(RedisTier, tier)._blocks.name_of(key), data)


class TestRedisTierByTls(TestRedisTier):
    """By TLS, with a certificate that an authority of the test has signed; without a list of what is there."""

    proxy: ClassVar[Proxy]
    ca_file: ClassVar[Path]
    lists_roomy = False

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def running(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        cls.ca_file = tmp_path_factory.mktemp("tls") / "ca.pem"
        authority.cert_pem.write_to_path(str(cls.ca_file))
        with RedisServer() as cls.server, Proxy(cls.server.socket, context) as cls.proxy:
            yield

    def url(self) -> str:
        return self.proxy.url(f"&ca_file={self.ca_file}", scheme="rediss")
