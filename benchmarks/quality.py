"""What packing changes: a transformer's KV through the packing kernels, against the same KV kept as it is.

    python benchmarks/quality.py [--prompts 4] [--prompt-tokens 1024] [--positions 256] [--layers 4] [--json]

The transformer is a Llama with random weights: there is no trained one here. Its weights are scaled so that attention
picks few tokens and the next token depends on the context; both are measured and printed. A prompt's KV is rounded to
the cache's dtype, packed into a pool by the kernels that the engine uses on host memory, wiped, unpacked, and the
positions behind the prompt are computed in float32 on it (teacher-forced, in one pass). The same pass on the KV that
was not packed is what everything is compared with, so only the codec differs. Every block is packed, whatever it
loses; what the guard would have kept as it is, is counted beside.

Three kinds of keys: `plain`; `scaled`, some channels of K 10 to 50 times as large, and of Q as much smaller, so that
attention is the same function; `offset`, some channels of K shifted by 10 to 50, which attention hardly sees as long
as K is exact. The second table compares groups and scales, in torch, on the same KV.
"""

import argparse
import contextlib
import copy
import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvortex.cli.transformer import cache_argument
from kvortex.codecs import RAW, packing_for, too_lossy
from kvortex.kernels import HostKernels, HostPackKernels
from kvortex.layout import KVLayout

BLOCK_SIZE, HEAD_DIM = 16, 128
SCORE_STD, LOGIT_STD = 3.0, 3.0
KEYS = ("plain", "scaled", "offset")
OUTLIERS = {61: 10.0, 62: 25.0, 63: 50.0}  # channel: factor or offset; those that rotary embedding turns least
KINDS = (
    (RAW, torch.bfloat16),
    ("fp8", torch.bfloat16),
    ("fp8", torch.float16),
    ("fp8", torch.float32),
    ("bf16", torch.float32),
)
BOUNDS = (0.02, 0.03, 0.05)
GROUPS = {"32 elements": 32, "token, head": HEAD_DIM, "4 KiB tile": 2048, "block, segment, head": BLOCK_SIZE * HEAD_DIM}
SCALE_BYTES = {"power of two": 1, "amax / 448": 4}
SMALL_TOKEN = 1e-3


@dataclass(frozen=True)
class Quality:
    """What a codec changed. Errors are relative L2; `alone`: only that layer's KV was packed; KL in nats."""

    keys: str
    codec: str
    dtype: str
    k_error: float
    v_error: float
    attention_alone: tuple[float, ...]  # a layer
    attention: tuple[float, ...]
    attention_overall: float
    agreement: float
    kl_mean: float
    kl_p99: float
    block_error_median: float
    block_error_max: float
    kept_as_is: dict[str, float]  # share of blocks, by bound


@dataclass(frozen=True)
class Context:
    """That the context matters: entropies in nats, and what another prompt's KV does to the next token; KL in nats."""

    keys: str
    attention_entropy: tuple[float, ...]  # a layer
    uniform_entropy: float
    token_entropy: float
    other_agreement: float
    other_kl: float
    bfloat16_agreement: float  # of the same KV where the model computes in bfloat16: a yardstick
    bfloat16_kl: float


@dataclass(frozen=True)
class Grouping:
    """What a choice of group and scale costs in fp8 of bfloat16."""

    content: str
    group: str
    scale: str
    overhead: float  # bytes of scales over bytes of codes
    k_error: float
    v_error: float
    worst_vector: float  # relative error of one token's head, the largest
    rounded_again: float  # share of elements that bfloat16 cannot hold once unpacked
    changed_by_second: float  # share of elements that packing again changes
    attention_overall: float


@dataclass(frozen=True)
class Decoded:
    """`logits [prompts, positions, vocab]` and each layer's attention output `[prompts, positions, heads * D]`."""

    logits: torch.Tensor
    attention: tuple[torch.Tensor, ...]


def make_model(keys: str, layers: int, hidden: int, heads: int, kv_heads: int, vocab: int) -> Any:
    """A Llama whose activations are of order 1 and whose attention scores have a deviation of about SCORE_STD."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=8192,
        attention_bias=True,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    model.lm_head.weight.mul_(LOGIT_STD)
    for layer in model.model.layers:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.mul_(SCORE_STD**0.5)
        _add_outliers(attention, keys)
    return model


def _add_outliers(attention: Any, keys: str) -> None:
    for channel, size in OUTLIERS.items():
        if keys == "offset":
            attention.k_proj.bias[channel::HEAD_DIM] = size
        elif keys == "scaled":
            for half in (channel % (HEAD_DIM // 2), channel % (HEAD_DIM // 2) + HEAD_DIM // 2):  # turned as a pair
                attention.k_proj.weight[half::HEAD_DIM] *= size
                attention.q_proj.weight[half::HEAD_DIM] /= size


def prefill(model: Any, prompts: torch.Tensor) -> torch.Tensor:
    """KV of prompts `[B, T]` as `float32 [layers, 2, B * T / 16, 16, heads, D]`."""
    cache = model(prompts, use_cache=True, logits_to_keep=1).past_key_values
    halves = [torch.stack((layer.keys, layer.values)) for layer in cache.layers]  # [2, B, H, T, D]
    return torch.stack(halves).transpose(3, 4).unflatten(3, (-1, BLOCK_SIZE)).flatten(2, 3).contiguous()


def decode(model: Any, kv: torch.Tensor, tokens: torch.Tensor, **options: bool) -> tuple[Decoded, Any]:
    """Positions `tokens [B, P]` behind the prompts whose KV is `kv`, and all that the model returns."""
    cache = DynamicCache(config=model.config)
    for number, halves in enumerate(kv.to(model.dtype).unflatten(2, (len(tokens), -1)).flatten(3, 4).transpose(3, 4)):
        cache.update(halves[0], halves[1], number)
    seen: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for layer in model.model.layers
    ]
    out = model(tokens, **{cache_argument(model): cache}, **options)
    for hook in hooks:
        hook.remove()
    return Decoded(out.logits, tuple(seen)), out


def round_trip(kv: torch.Tensor, codec: str) -> tuple[torch.Tensor, NDArray[np.float32]]:
    """KV packed into a pool, wiped and unpacked by the kernels, and the blocks' errors (0 where nothing is packed)."""
    pages = kv.clone()
    layout = KVLayout.from_tensors({f"layers.{i}": layer for i, layer in enumerate(pages)}, BLOCK_SIZE, block_dim=1)
    packing = packing_for(layout, codec)
    nbytes = packing.block_nbytes if packing else layout.block_nbytes
    ids = np.arange(layout.num_blocks, dtype=np.int32)
    offsets = ids.astype(np.int64) * nbytes
    pool = np.zeros(layout.num_blocks * nbytes, dtype=np.uint8)
    errors = np.zeros(ids.size, dtype=np.float32)
    kernels: HostKernels | HostPackKernels
    if packing is None:
        kernels = HostKernels(layout, pool)
        digests = kernels.gather(ids, offsets)
    else:
        kernels = HostPackKernels(layout, packing, pool)
        digests, errors = kernels.gather(ids, offsets)
    pages.fill_(float("nan"))
    if not np.array_equal(kernels.scatter(ids, offsets), digests):
        raise RuntimeError("what was unpacked is not what was packed")
    return pages, errors


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2."""
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm())


def divergence(want: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """KL(want || got) of every position's next token, in nats."""
    p, q = want.double().log_softmax(-1), got.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).flatten()


def agreement(want: torch.Tensor, got: torch.Tensor) -> float:
    return float((want.argmax(-1) == got.argmax(-1)).double().mean())


def measure_codec(model: Any, keys: str, codec: str, exact: torch.Tensor, tokens: torch.Tensor) -> Quality:
    """`exact`: the KV in the cache's dtype."""
    back, errors = round_trip(exact, codec)
    want, _ = decode(model, exact, tokens)
    got, _ = decode(model, back, tokens)
    alone = []
    for number in range(len(exact)):
        mixed = exact.clone()
        mixed[number] = back[number]
        only, _ = decode(model, mixed, tokens)
        alone.append(relative_error(only.attention[number], want.attention[number]))
    kl = divergence(want.logits, got.logits)
    return Quality(
        keys=keys,
        codec=codec,
        dtype=str(exact.dtype).removeprefix("torch."),
        k_error=relative_error(back[:, 0], exact[:, 0]),
        v_error=relative_error(back[:, 1], exact[:, 1]),
        attention_alone=tuple(alone),
        attention=tuple(map(relative_error, got.attention, want.attention)),
        attention_overall=relative_error(torch.stack(got.attention), torch.stack(want.attention)),
        agreement=agreement(want.logits, got.logits),
        kl_mean=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        block_error_median=float(np.median(errors)),
        block_error_max=float(errors.max()),
        kept_as_is={str(bound): float(np.mean(too_lossy(errors, bound))) for bound in BOUNDS},
    )


def in_bfloat16(model: Any) -> Any:
    """A copy that computes in bfloat16, but for the angles of positions, as servers do."""
    twin = copy.deepcopy(model).bfloat16()
    twin.model.rotary_emb = model.model.rotary_emb
    return twin


def measure_context(model: Any, keys: str, kv: torch.Tensor, tokens: torch.Tensor) -> Context:
    want, out = decode(model, kv, tokens, output_attentions=True)
    other, _ = decode(model, kv.unflatten(2, (len(tokens), -1)).roll(1, dims=2).flatten(2, 3), tokens)
    fine, _ = decode(model, kv.bfloat16(), tokens)
    coarse, _ = decode(in_bfloat16(model), kv.bfloat16(), tokens)
    p = want.logits.log_softmax(-1)
    return Context(
        keys=keys,
        attention_entropy=tuple(float(torch.special.entr(weights).sum(-1).mean()) for weights in out.attentions),
        uniform_entropy=math.log(kv.shape[2] // len(tokens) * BLOCK_SIZE + tokens.shape[1] / 2),
        token_entropy=float(-(p.exp() * p).sum(-1).mean()),
        other_agreement=agreement(want.logits, other.logits),
        other_kl=float(divergence(want.logits, other.logits).mean()),
        bfloat16_agreement=agreement(fine.logits, coarse.logits),
        bfloat16_kl=float(divergence(fine.logits, coarse.logits).mean()),
    )


def round_in_groups(kv: torch.Tensor, group: str, scale: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Bfloat16 KV after fp8 with such groups and scales, before and after it is rounded to bfloat16 again."""
    by_head = group == "block, segment, head"
    ordered = (kv.transpose(-3, -2) if by_head else kv).float()
    grouped = ordered.reshape(-1, GROUPS[group])
    scales = grouped.abs().amax(1, keepdim=True) / 448
    if scale == "power of two":
        mantissas, exponents = scales.frexp()
        scales = torch.ones_like(scales).ldexp(exponents - (mantissas == 0.5).int())
    scales[grouped.abs().amax(1) == 0] = 1.0
    codes = (grouped / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    values = (codes.float() * scales).reshape(ordered.shape)
    values = values.transpose(-3, -2) if by_head else values
    return values, values.to(torch.bfloat16)


def measure_groupings(model: Any, content: str, kv: torch.Tensor, tokens: torch.Tensor) -> list[Grouping]:
    """`kv`: bfloat16, as `prefill` gives it."""
    want, _ = decode(model, kv, tokens)
    return [
        _measure_grouping(model, content, kv, want, tokens, group, scale) for group in GROUPS for scale in SCALE_BYTES
    ]


def _measure_grouping(
    model: Any, content: str, kv: torch.Tensor, want: Decoded, tokens: torch.Tensor, group: str, scale: str
) -> Grouping:
    values, first = round_in_groups(kv, group, scale)
    _, second = round_in_groups(first, group, scale)
    got, _ = decode(model, first, tokens)
    lost, there = (first.double() - kv.double()).norm(dim=-1), kv.double().norm(dim=-1)
    return Grouping(
        content=content,
        group=group,
        scale=scale,
        overhead=SCALE_BYTES[scale] / GROUPS[group],
        k_error=relative_error(first[:, 0], kv[:, 0]),
        v_error=relative_error(first[:, 1], kv[:, 1]),
        worst_vector=float((lost / there).max()),
        rounded_again=float((values != first.float()).double().mean()),
        changed_by_second=float((first != second).double().mean()),
        attention_overall=relative_error(torch.stack(got.attention), torch.stack(want.attention)),
    )


def with_small_tokens(kv: torch.Tensor) -> torch.Tensor:
    """The first token of every block SMALL_TOKEN times as large."""
    small = kv.clone()
    small[:, :, :, 0] *= SMALL_TOKEN
    return small


@torch.inference_mode()
def measure(options: argparse.Namespace, step: Callable[[str], object]) -> dict[str, list[Any]]:
    """All rows; `step` is told what begins."""
    quality, contexts, groupings = [], [], []
    generator = torch.Generator().manual_seed(1)
    length = options.prompt_tokens + options.positions
    ids = torch.randint(0, options.vocab, (options.prompts, length), generator=generator)
    prompts, tokens = ids.split((options.prompt_tokens, options.positions), dim=1)
    for keys in KEYS:
        step(f"{keys}: prefill")
        model = make_model(keys, options.layers, options.hidden, options.heads, options.kv_heads, options.vocab)
        kv = prefill(model, prompts)
        contexts.append(measure_context(model, keys, kv, tokens))
        for codec, dtype in KINDS:
            step(f"{keys}: {codec} of {str(dtype).removeprefix('torch.')}")
            quality.append(measure_codec(model, keys, codec, kv.to(dtype), tokens))
        step(f"{keys}: groups")
        groupings += measure_groupings(model, keys, kv.bfloat16(), tokens)
        if keys == "scaled":
            groupings += measure_groupings(model, "scaled, small tokens", with_small_tokens(kv.bfloat16()), tokens)
    return {"quality": quality, "context": contexts, "grouping": groupings}


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], object]]:
    """Gives a function that names the next step; on stderr, so that JSON stays clean."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, description=text, advance=1)


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown CPU"


def print_table(columns: dict[str, Callable[[Any], str]], rows: Sequence[Any]) -> None:
    """A row of Markdown for each of `rows`, a column for each heading."""
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(cell(row) for cell in columns.values()) + " |")


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def print_tables(results: dict[str, list[Any]]) -> None:
    quality: dict[str, Callable[[Any], str]] = {
        "keys": lambda r: r.keys,
        "codec": lambda r: f"{r.codec} of {r.dtype}",
        "K": lambda r: percent(r.k_error),
        "V": lambda r: percent(r.v_error),
        "attention": lambda r: percent(r.attention_overall),
        "same next token": lambda r: percent(r.agreement),
        "KL mean": lambda r: f"{r.kl_mean:.2g}",
        "KL p99": lambda r: f"{r.kl_p99:.2g}",
        "block error, median / max": lambda r: f"{r.block_error_median:.4f} / {r.block_error_max:.4f}",
        f"kept as it is at {' / '.join(map(str, BOUNDS))}": lambda r: " / ".join(
            f"{100 * share:.0f} %" for share in r.kept_as_is.values()
        ),
    }
    print_table(quality, results["quality"])
    fp8 = {r.keys: r for r in results["quality"] if (r.codec, r.dtype) == ("fp8", "bfloat16")}
    layers: dict[str, Callable[[Any], str]] = {
        "keys": lambda at: at[0].keys,
        "layer": lambda at: str(at[1]),
        "attention entropy / uniform": lambda at: f"{at[0].attention_entropy[at[1]]:.2f} / {at[0].uniform_entropy:.2f}",
        "this layer packed": lambda at: percent(fp8[at[0].keys].attention_alone[at[1]]),
        "all layers packed": lambda at: percent(fp8[at[0].keys].attention[at[1]]),
    }
    print_table(layers, [(c, number) for c in results["context"] for number in range(len(c.attention_entropy))])
    context: dict[str, Callable[[Any], str]] = {
        "keys": lambda c: c.keys,
        "entropy of the next token": lambda c: f"{c.token_entropy:.2f}",
        "another prompt's KV: same next token": lambda c: percent(c.other_agreement),
        "KL mean": lambda c: f"{c.other_kl:.2g}",
        "bfloat16 arithmetic: same next token": lambda c: percent(c.bfloat16_agreement),
        "its KL mean": lambda c: f"{c.bfloat16_kl:.2g}",
    }
    print_table(context, results["context"])
    groupings: dict[str, Callable[[Any], str]] = {
        "content": lambda g: g.content,
        "a scale per": lambda g: g.group,
        "scale": lambda g: g.scale,
        "scale bytes": lambda g: percent(g.overhead),
        "K": lambda g: percent(g.k_error),
        "V": lambda g: percent(g.v_error),
        "worst vector": lambda g: percent(g.worst_vector),
        "attention": lambda g: percent(g.attention_overall),
        "rounded again": lambda g: percent(g.rounded_again),
        "changed by packing again": lambda g: f"{100 * g.changed_by_second:.2g} %",
    }
    print_table(groupings, results["grouping"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="of each prompt; a multiple of 16")
    parser.add_argument("--positions", type=int, default=256, help="compared behind each prompt")
    for name, size in {"layers": 4, "hidden": 512, "heads": 8, "kv-heads": 2, "vocab": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=size, help="of the model")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args(arguments)
    if options.prompt_tokens % BLOCK_SIZE or options.prompts < 2:
        parser.error(f"--prompt-tokens must be a multiple of {BLOCK_SIZE}, --prompts at least 2")

    with progress_bar(len(KEYS) * (len(KINDS) + 2)) as step:
        results = measure(options, step)
    versions = {"python": platform.python_version()}
    versions |= {module.__name__: module.__version__ for module in (torch, transformers, numba, np)}
    if options.json:
        rows = {name: [asdict(row) for row in rows] for name, rows in results.items()}
        print(json.dumps({"cpu": cpu_model(), "versions": versions, "options": vars(options), **rows}))
        return
    print(f"{cpu_model()} | " + " | ".join(f"{name} {version}" for name, version in versions.items()))
    print(
        f"Llama with random weights: {options.layers} layers, {options.heads} heads, {options.kv_heads} KV heads of "
        f"{HEAD_DIM}; {options.prompts} prompts of {options.prompt_tokens} tokens, {options.positions} positions "
        "behind each. Errors are relative L2, entropies and KL in nats."
    )
    print_tables(results)


if __name__ == "__main__":
    main()
