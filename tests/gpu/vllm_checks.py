"""The connector inside vLLM on a GPU, where a test on a CPU cannot go: FP8 caches, packing and sleep mode.

    python tests/gpu/vllm_checks.py           # needs vLLM and one GPU; no model is downloaded
    python tests/gpu/vllm_checks.py auto:fp8  # one of the engines alone: cache dtype and codec

Each gets an engine in a process of its own: half a minute each, twice that where nothing is compiled yet.
A line a case; the exit status is 1 if tokens differ, hits did not happen, or the device reports an error.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ENGINES = ("auto:raw", "fp8:raw", "auto:fp8")  # cache dtype and codec
LIKELY = 20
BLOCK_SIZE = 16
MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the connector's halves are looked at from here
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to scale the weights
    "PYTHONHASHSEED": "0",
}


class Checks:
    """An engine and what was found out with it."""

    def __init__(self, engine: str, model: str) -> None:
        self._began_s = time.monotonic()
        import vllm
        from vllm.config import KVTransferConfig

        from kvortex.testing.dummy_model import scale_weights

        dtype, self.codec = engine.split(":")
        self.engine = engine
        self.failures = 0
        self._vllm = vllm
        self._random = random.Random(1)
        connector = KVTransferConfig(
            kv_connector="KVortexConnector",
            kv_connector_module_path="kvortex.vllm",
            kv_role="kv_both",
            kv_connector_extra_config={"pool": "2GiB", "codec": self.codec},
        )
        self.llm = vllm.LLM(
            model=model,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="bfloat16",
            kv_cache_dtype=dtype,
            block_size=BLOCK_SIZE,
            max_model_len=12288,
            gpu_memory_utilization=0.3,
            enable_sleep_mode=True,
            seed=0,
            kv_transfer_config=connector,
            disable_log_stats=False,
        )
        self.llm.apply_model(partial(scale_weights, factor=40.0))

    @property
    def _scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler

    @property
    def _worker(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._worker

    @property
    def loaded(self) -> int:
        return int(self._scheduler.stats.snapshot().hits)

    def prompt(self, length: int) -> list[int]:
        return [self._random.randrange(10, 32000) for _ in range(length)]

    def ask(self, tokens: list[int], count: int = 12) -> list[int]:
        parameters = self._vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        (output,) = self.llm.generate([{"prompt_token_ids": tokens}], parameters, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    def likely_first(self, tokens: list[int]) -> set[int]:
        """The most likely tokens after a prompt."""
        parameters = self._vllm.SamplingParams(temperature=0.0, max_tokens=1, logprobs=LIKELY, detokenize=False)
        (output,) = self.llm.generate([{"prompt_token_ids": tokens}], parameters, use_tqdm=False)
        (position,) = output.outputs[0].logprobs
        return {token for token, value in position.items() if value.rank <= LIKELY}

    def forget_on_device(self) -> None:
        """Let saves be counted, then drop the GPU's prefix cache: from here on only KVortex can help."""
        time.sleep(0.1)
        self.ask(self.prompt(3), 2)
        assert self.llm.reset_prefix_cache()

    def report(self, case: str, equal: bool, loaded: int, wanted: int) -> None:
        good = equal and loaded == wanted
        self.failures += not good
        print(
            f"{self.engine:8} {case:38} tokens {'equal ' if equal else 'DIFFER'} blocks loaded {loaded:4} of {wanted:4}"
            f"   {'ok' if good else 'FAILED'} at {time.monotonic() - self._began_s:.1f} s",
            flush=True,
        )

    def check_hits(self, case: str, tokens: list[int], reference: list[int], blocks: int) -> None:
        """The GPU has forgotten `tokens`: KVortex must bring `blocks` back, and the answer be the reference."""
        self.forget_on_device()
        before = self.loaded
        answer = self.ask(tokens)
        self.report(case, answer == reference, self.loaded - before, blocks)

    # -- cases -------------------------------------------------------------------------------------

    def repeated(self) -> None:
        answers = []
        for length in (1000, 1024, 1025, 6000):
            tokens = self.prompt(length)
            self.ask(tokens)
            answers.append(self.ask(tokens))  # with the GPU's own hit: the same arithmetic as after a load
            # vLLM computes at least one token: of a prompt of whole blocks the last one is loaded all the same.
            self.check_hits(f"repeated prompt of {length}", tokens, answers[-1], length // BLOCK_SIZE)
        self.report("answers depend on the prompt", len({tuple(answer) for answer in answers}) == len(answers), 0, 0)

    def packed(self) -> None:
        """Packing loses a little: most of the likely tokens stay, where other blocks would leave none of them."""
        same_tokens = kept = 0
        for length in (1000, 1024, 1025, 6000):
            tokens = self.prompt(length)
            self.ask(tokens)
            answer, likely = self.ask(tokens), self.likely_first(tokens)
            self.forget_on_device()
            before = self.loaded
            again = self.ask(tokens)
            loaded = self.loaded - before
            self.forget_on_device()
            kept += len(likely & self.likely_first(tokens))
            same_tokens += sum(a == b for a, b in zip(answer, again, strict=True))
            self.report(f"packed prompt of {length}", True, loaded, length // BLOCK_SIZE)
        self.report(f"{kept} of {4 * LIKELY} likely first tokens kept", 2 * kept > 4 * LIKELY, 0, 0)
        index = self._scheduler._control.index
        packed_nbytes = self._worker._data.sizes[0].packed
        self.report("blocks rest packed", index.committed_bytes == packed_nbytes * len(index), 0, 0)
        print(f"{self.engine:8} {same_tokens} of 48 answered tokens as without packing")

    def shared_prefix(self) -> None:
        prefix = self.prompt(1600)
        self.ask(prefix)
        for number in range(2):
            tokens = prefix + self.prompt(100)
            reference = self.ask(tokens)  # computed behind the GPU's own prefix
            self._scheduler.reset_cache()
            self.llm.reset_prefix_cache()
            self.ask(prefix)
            self.check_hits(f"shared prefix, tail {number}", tokens, reference, 1600 // BLOCK_SIZE)

    def sleep(self) -> None:
        """vLLM has the connector forget everything when it goes to sleep: afterwards it is stored and found again."""
        tokens = self.prompt(2000)
        cold, hit = self.ask(tokens), self.ask(tokens)
        self.forget_on_device()
        for level_of_sleep in range(2):
            self.llm.sleep(level=1)
            self.llm.wake_up()
            before = self.loaded
            answer = self.ask(tokens)
            self.report(f"after sleep {level_of_sleep}", answer in (cold, hit), self.loaded - before, 0)
            self.check_hits(f"after sleep {level_of_sleep}, again", tokens, hit, 2000 // BLOCK_SIZE)

    def sleep_during_a_save(self) -> None:
        tokens = self.prompt(8000)
        self.ask(tokens)
        reference = self.ask(tokens)
        self.llm.reset_prefix_cache()
        self._scheduler.reset_cache()
        self._worker._thread.loop.call_soon_threadsafe(time.sleep, 1.0)  # the save begins only after the sleep
        self.ask(tokens, 1)
        unread = sum(not save.read.is_set() for save in self._worker._unread)
        self.llm.sleep(level=1)
        left = self._worker._jobs.num_transfers
        self.report("a save under way when sleep begins", unread > 0 and left == 0, 0, 0)
        time.sleep(0.5)
        self.llm.wake_up()
        self.ask(tokens)
        self.check_hits("after it", tokens, reference, 8000 // BLOCK_SIZE)

    def counted(self) -> None:
        """What was loaded and saved is in vLLM's metrics, too."""
        self.forget_on_device()
        counters = {metric.name: metric.value for metric in self.llm.get_metrics() if hasattr(metric, "value")}
        self.report("saved blocks in vLLM's metrics", counters["vllm:kvortex_saved_blocks"] > 0, 0, 0)
        self.report("loaded blocks in vLLM's metrics", True, int(counters["vllm:kvortex_loaded_blocks"]), self.loaded)

    def run(self) -> int:
        import torch

        exact = (self.repeated, self.shared_prefix, self.sleep, self.sleep_during_a_save)
        for case in exact if self.codec == "raw" else (self.packed,):
            case()
        self.counted()
        torch.cuda.synchronize()
        self.llm.llm_engine.engine_core.engine_core.shutdown()
        return self.failures


def main() -> int:
    if len(sys.argv) == 3:
        return 1 if Checks(sys.argv[1], sys.argv[2]).run() else 0
    from kvortex.testing.dummy_model import write_config

    began_s, status = time.monotonic(), 0
    environment = {**os.environ, **ENVIRONMENT}
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), architectures=["LlamaForCausalLM"], model_type="llama", **MODEL)
        for engine in sys.argv[1:] or ENGINES:
            done = subprocess.run([sys.executable, __file__, engine, folder], env=environment)
            status |= done.returncode != 0
    print(f"{'FAILED' if status else 'all good'}, {time.monotonic() - began_s:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
