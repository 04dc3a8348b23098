"""The connector's options, without vLLM: what means nothing in a server is refused, all else reaches the engine."""

import re
from pathlib import Path

import pytest

import kvortex
from kvortex.config import KVortexConfig
from kvortex.config.fields import hints_of
from kvortex.errors import ConfigError
from kvortex.vllm.options import WITHOUT_MEANING, ConnectorOptions

PACKAGE = Path(kvortex.__file__).parent
OF_THE_CONNECTOR = [*PACKAGE.glob("vllm/**/*.py"), PACKAGE / "planes" / "data.py", PACKAGE / "planes" / "control.py"]


def test_options_reach_the_engine() -> None:
    options = ConnectorOptions.from_extra_config(
        {"cpu_pool_bytes": "1GiB", "min_hit_blocks": 4, "load_deadline_s": None, "identity": {"model": "llama"}}
    )
    assert (options.engine.cpu_pool_bytes, options.min_hit_blocks) == (1 << 30, 4)
    assert (options.engine.load_deadline_s, options.engine.identity.model) == (None, "llama")
    assert options.engine.max_batch_bytes == 32 << 20


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"max_outstanding_requests": 8}, "max_outstanding_requests has no effect in vLLM"),
        ({"tier_shed": "newest"}, "tier_shed has no effect in vLLM"),
        ({"fetch_blocks": 64}, "fetch_blocks has no effect in vLLM"),
        ({"identity": {"tp_rank": 1, "tp_size": 2}}, r"identity\.tp_rank follows from vLLM"),
        ({"identity": {"model": "m", "pp_size": 2}}, r"identity\.pp_size follows from vLLM"),
        ({"identity": {"fingerprint": "f"}}, r"identity\.fingerprint follows from vLLM"),
        ({"identity": {"modle": "m"}}, "did you mean 'model'"),
        ({"identity": 3}, "identity must be ModelIdentity"),
        ({"cpu_pol_bytes": "1GiB"}, "did you mean 'cpu_pool_bytes'"),
        ({"min_hit_block": 2}, "did you mean 'min_hit_blocks'"),
        ({"engine": {}}, "unknown option 'engine'"),
        ({"cpu_pool_bytes": 16}, "did you mean '16GiB'"),
        ({"min_hit_blocks": 0}, "min_hit_blocks must be at least 1"),
        ({"min_hit_blocks": 1.5}, "min_hit_blocks must be a whole number"),
        ({"pending_wait_s": "long"}, "pending_wait_s must be a number"),
        ({"pending_wait_s": -1}, "pending_wait_s must not be negative"),
        ({"pending_wait_s": float("inf")}, "pending_wait_s must be a finite number"),
        ({"save_decoded": 1}, "save_decoded must be true or false"),
        ({"codec": "fp4"}, "codec must be one of"),
    ],
)
def test_what_means_nothing_is_refused_with_the_reason(extra: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConnectorOptions.from_extra_config(extra)


def test_every_setting_either_has_an_effect_or_is_refused() -> None:
    text = "".join(path.read_text() for path in OF_THE_CONNECTOR if path.name != "options.py")
    text += (PACKAGE / "tiering" / "tiering.py").read_text().split("def tier_of")[1]
    checked = re.findall(r'"(tier_\w+)", "', text)  # have one value only, in a server
    read = {name for name in hints_of(KVortexConfig) if re.search(rf"\.{name}\b", text) or name in checked}
    assert read == set(hints_of(KVortexConfig)) - set(WITHOUT_MEANING)
