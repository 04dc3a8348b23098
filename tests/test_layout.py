"""Layouts against the tensors' own indexing; payloads are read from raw addresses."""

import ctypes
import json
import math
import pickle
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvortex.errors import LayoutError
from kvortex.layout import KVLayout, TensorView

NB, BS, H, D, L = 6, 16, 3, 8, 5


def unique(*shape, dtype=torch.int32):
    return torch.arange(math.prod(shape), dtype=torch.int64).to(dtype).reshape(shape)


def permuted(logical_shape, memory_order, dtype=torch.int32):
    """A dense tensor of `logical_shape` whose dimensions lie in memory in `memory_order`, outermost first."""
    dense = unique(*(logical_shape[d] for d in memory_order), dtype=dtype)
    return dense.permute([memory_order.index(d) for d in range(len(logical_shape))])


def raw_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read_segment(segment, block):
    return ctypes.string_at(segment.address + block * segment.block_stride, segment.nbytes)


def read_payload(layout, block):
    return b"".join(read_segment(segment, block) for segment in layout.segments)


def assert_serves(layout, tensor, block_dim):
    """Every block's payload is the block as the tensor's own indexing sees it, nested in `payload_order`."""
    assert layout.num_blocks == tensor.shape[block_dim]
    (fmt,) = layout.formats
    for b in range(layout.num_blocks):
        block = tensor.select(block_dim, b).squeeze()
        assert tuple(block.shape) == fmt.block_shape
        assert read_payload(layout, b) == raw_bytes(block.permute(fmt.payload_order))


def intervals(layout):
    return sorted((s.address + b * s.block_stride, s.nbytes) for s in layout.segments for b in range(layout.num_blocks))


def assert_partitions(layout, address, nbytes):
    """The segments of all blocks cover exactly `[address, address + nbytes)`, each byte once."""
    position = address
    for start, length in intervals(layout):
        assert start == position
        position += length
    assert position == address + nbytes


CONTIGUOUS = [
    pytest.param((NB, BS, 36), 0, 1, id="nb-bs-x"),
    pytest.param((NB, H, BS, 2 * D), 0, 1, id="nb-h-bs-2d"),
    pytest.param((NB, BS, H, D), 0, 1, id="nb-bs-h-d"),
    pytest.param((NB, 1, BS, 36), 0, 1, id="mla"),
    pytest.param((2, NB, BS, H, D), 1, 2, id="2-nb"),
    pytest.param((2, NB, H, BS, D), 1, 2, id="2-nb-hnd"),
    pytest.param((NB, 2, BS, H, D), 0, 1, id="nb-2"),
    pytest.param((2, L, NB, BS, H, D), 2, 2 * L, id="2-l-nb"),
    pytest.param((NB, L, 2, BS, H, D), 0, 1, id="nb-l-2"),
    pytest.param((NB, 2, L, BS, H, D), 0, 1, id="nb-2-l"),
    pytest.param((1, BS, 36), 0, 1, id="one-block"),
    pytest.param((2, 1, BS, H, D), 1, 1, id="2-one-block"),
]


@pytest.mark.parametrize(("shape", "block_dim", "num_segments"), CONTIGUOUS)
def test_known_shapes(shape, block_dim, num_segments):
    tensor = unique(*shape)
    layout = KVLayout.from_tensors({"layers.0": tensor}, BS)
    assert layout.num_segments == num_segments
    assert layout.block_nbytes * layout.num_blocks == tensor.nbytes
    assert_serves(layout, tensor, block_dim)
    assert_partitions(layout, tensor.data_ptr(), tensor.nbytes)


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32, torch.int64],
)
def test_dtypes(dtype):
    tensor = torch.randint(0, 256, (2, NB, BS, H, 16 * dtype.itemsize), dtype=torch.uint8).view(dtype)
    layout = KVLayout.from_tensors({"kv": tensor}, BS)
    assert layout.dtypes == (str(dtype).removeprefix("torch."),)
    for b in range(NB):
        expected = b"".join(raw_bytes(tensor.view(torch.uint8)[kv, b]) for kv in (0, 1))
        assert read_payload(layout, b) == expected


def test_k_and_v_are_segments_in_logical_order():
    tensor = unique(2, NB, BS, H, D)
    k, v = KVLayout.from_tensors({"kv": tensor}, BS).segments
    for b in range(NB):
        assert read_segment(k, b) == raw_bytes(tensor[0, b])
        assert read_segment(v, b) == raw_bytes(tensor[1, b])


def test_outer_dimensions_are_enumerated_row_major_over_the_shape():
    tensor = permuted((2, L, NB, BS, H, D), [1, 0, 2, 3, 4, 5])
    layout = KVLayout.from_tensors({"kv": tensor}, BS)
    segments = iter(layout.segments)
    for kv in range(2):
        for layer in range(L):
            assert read_segment(next(segments), 3) == raw_bytes(tensor[kv, layer, 3])


@pytest.mark.parametrize(
    ("shape", "memory_order", "block_dim", "num_segments"),
    [
        pytest.param((2, NB, BS, H, D), [0, 1, 3, 2, 4], 1, 2, id="hnd-2-nb"),
        pytest.param((NB, 2, BS, H, D), [0, 1, 3, 2, 4], 0, 1, id="hnd-nb-2"),
        pytest.param((NB, H, BS, 2 * D), [0, 2, 1, 3], 0, 1, id="nhd-under-hnd-shape"),
        pytest.param((2, NB, BS, H, D), [1, 0, 2, 3, 4], 1, 1, id="blocks-outermost"),
        pytest.param((NB, 2, BS, H, D), [1, 0, 2, 3, 4], 0, 2, id="kv-outermost"),
        pytest.param((NB, BS, H, D), [2, 0, 1, 3], 0, H, id="heads-outermost"),
    ],
)
def test_permuted_strides(shape, memory_order, block_dim, num_segments):
    tensor = permuted(shape, memory_order)
    layout = KVLayout.from_tensors({"kv": tensor}, BS)
    assert layout.num_segments == num_segments
    assert_serves(layout, tensor, block_dim)
    assert_partitions(layout, tensor.data_ptr(), tensor.nbytes)


@pytest.mark.parametrize("blocks_outermost", [False, True])
def test_layers_interleaved_in_one_allocation(blocks_outermost):
    """One int8 allocation, every layer a strided view of it."""
    raw = torch.randint(0, 256, (NB * L * H * BS * 2 * D,), dtype=torch.uint8)
    arena = raw.view(NB, L, H, BS, 2 * D) if blocks_outermost else raw.view(L, H, NB, BS, 2 * D)
    views = [arena[:, i] if blocks_outermost else arena[i].transpose(0, 1) for i in range(L)]
    layout = KVLayout.from_tensors({f"layers.{i}": view for i, view in enumerate(views)}, BS)
    assert layout.num_segments == (L if blocks_outermost else L * H)
    assert_partitions(layout, raw.data_ptr(), raw.nbytes)
    for b in range(NB):
        assert read_payload(layout, b) == b"".join(raw_bytes(view[b]) for view in views)


def test_padded_blocks():
    arena = unique(NB, BS + 4, 36)
    tensor = arena[:, :BS]
    assert_serves(KVLayout.from_tensors({"kv": tensor}, BS), tensor, 0)


def test_strides_of_size_one_dimensions_mean_nothing():
    dense = unique(NB, BS, 36)
    tensor = torch.as_strided(dense, (NB, 1, BS, 36), (BS * 36, 7, 36, 1))
    assert_serves(KVLayout.from_tensors({"kv": tensor}, BS), tensor, 0)
    single = torch.as_strided(dense, (1, 1, BS, 36), (0, 0, 36, 1))
    layout = KVLayout.from_tensors({"kv": single}, BS)
    assert_serves(layout, single, 0)
    assert layout.segments[0].block_stride == layout.block_nbytes


def test_runs_adjacent_in_memory_and_payload_are_joined():
    flat = unique(NB * 64)
    tensor = torch.as_strided(flat, (NB, 2, 2, 4), (64, 12, 8, 1))
    layout = KVLayout.from_tensors({"kv": tensor}, BS, block_dim=0)
    assert [segment.nbytes for segment in layout.segments] == [16, 32, 16]
    assert_serves(layout, tensor, 0)


@pytest.mark.parametrize("shape", [(NB * 4, BS // 4, H, D), (2, NB * 4, BS // 4, H, D)])
def test_a_block_of_several_kernel_blocks(shape):
    tensor, dim = unique(*shape), shape.index(NB * 4)
    layout = KVLayout.from_tensors({"kv": tensor}, BS, num_blocks=NB)
    assert layout.num_blocks == NB
    assert_partitions(layout, tensor.data_ptr(), tensor.nbytes)
    for b in range(NB):
        assert read_payload(layout, b) == raw_bytes(tensor.narrow(dim, 4 * b, 4))


def test_kernel_blocks_of_different_sizes_agree_on_blocks():
    tensors = {"a": unique(7, BS, 9, D), "b": unique(14, BS // 2, 9, D)}
    layout = KVLayout.from_tensors(tensors, BS, num_blocks=7)
    assert read_payload(layout, 6) == raw_bytes(tensors["a"][6]) + raw_bytes(tensors["b"][12:14])


def test_opaque_byte_caches():
    state = torch.randint(0, 127, (7, 1, 1, 4096), dtype=torch.int8)
    for options in ({"num_blocks": 7}, {"block_dim": 0}, {"block_dim": -4}, {"block_dim": {"mamba": 0}}):
        assert_serves(KVLayout.from_tensors({"mamba": state}, BS, **options), state, 0)
    with pytest.raises(LayoutError, match=r"mamba.*num_blocks= or block_dim="):
        KVLayout.from_tensors({"mamba": state}, BS)


def test_block_dim_decides_where_the_shape_cannot():
    tensor = unique(2, 2, BS, H, D)
    for dim in (0, 1):
        assert_serves(KVLayout.from_tensors({"kv": tensor}, BS, block_dim=dim), tensor, dim)


def test_num_blocks_decides_where_the_shape_cannot():
    tensor = unique(7, 3, BS, 9, D)
    assert_serves(KVLayout.from_tensors({"kv": tensor}, BS, num_blocks=7), tensor, 0)
    # Several multiples of num_blocks: back to the shape table.
    tensor = unique(2, 4, BS, 4, D)
    assert_serves(KVLayout.from_tensors({"kv": tensor}, BS, num_blocks=4), tensor, 1)


def test_numpy_and_views_and_mixtures():
    array = np.arange(NB * BS * 36, dtype=np.float32).reshape(NB, BS, 36)
    tensor = unique(2, NB, BS, H, D)
    view = TensorView.from_torch("ignored", tensor)
    layout = KVLayout.from_tensors({"a": array, "b": view}, BS)
    assert [segment.tensor for segment in layout.segments] == ["a", "b", "b"]
    assert layout.dtypes == ("float32", "int32")
    for b in range(NB):
        assert read_payload(layout, b) == array[b].tobytes() + raw_bytes(tensor[:, b])


def test_views_are_plain_data():
    tensor = unique(4, 6)[1:, 2:]
    view = TensorView.from_torch("kv", tensor)
    assert view == TensorView("kv", tensor.data_ptr(), (3, 4), (6, 1), 4, "cpu", "int32")
    assert TensorView.from_numpy("kv", tensor.numpy()) == view
    assert pickle.loads(pickle.dumps(view)) == view


def test_figures_of_a_layout():
    layout = KVLayout.from_tensors({"l0": unique(2, NB, BS, H, D), "l1": unique(NB, BS, 36)}, BS)
    run = BS * H * D * 4
    assert layout.payload_offsets == (0, run, 2 * run)
    assert layout.block_nbytes == 2 * run + BS * 36 * 4
    assert layout.segment_of(0) == layout.segment_of(run - 1) == layout.segments[0]
    assert layout.segment_of(run) == layout.segments[1]
    assert layout.segment_of(layout.block_nbytes - 1).tensor == "l1"
    for outside in (-1, layout.block_nbytes):
        with pytest.raises(IndexError):
            layout.segment_of(outside)
    assert f"{layout.block_nbytes} bytes a block" in layout.describe()
    assert "\n" not in layout.describe()
    assert pickle.loads(pickle.dumps(layout)) == layout


def make_digest(shape=(2, NB, BS, H, D), name="l0", dtype=torch.int32, block_size=BS, order=None, **options):
    tensor = permuted(shape, order or list(range(len(shape))), dtype)
    return KVLayout.from_tensors({name: tensor}, block_size, **options).digest


def test_digest_ignores_addresses_and_the_number_of_blocks():
    assert len(make_digest()) == 32
    assert make_digest() == make_digest((2, NB + 3, BS, H, D))
    padded = torch.zeros(2, NB, BS + 1, H, 2 * D, dtype=torch.int32)[:, :, :BS].flatten(3)[..., : H * D]
    dense = torch.zeros(2, NB, BS, 1, 2 * H * D, dtype=torch.int32)[:, :, :, 0, : H * D]
    layouts = [KVLayout.from_tensors({"l0": t}, BS, block_dim=1) for t in (padded, dense)]
    assert layouts[0].segments[0].block_stride != layouts[1].segments[0].block_stride
    assert layouts[0].digest == layouts[1].digest


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"name": "l1"}, id="name"),
        pytest.param({"dtype": torch.float32}, id="dtype"),
        pytest.param({"shape": (2, NB, BS, H, 2 * D)}, id="bytes"),
        pytest.param({"shape": (NB, 2, BS, H, D)}, id="segments"),
        pytest.param({"block_size": BS // 2, "num_blocks": NB, "block_dim": 1}, id="block-size"),
        pytest.param({"shape": (2, NB, H, BS, D)}, id="hnd-shape"),
        # The same bytes per segment with another meaning must never be exchanged.
        pytest.param({"order": [0, 1, 3, 2, 4]}, id="hnd-strides"),
    ],
)
def test_digest_tells_payloads_apart(other):
    assert make_digest(**other) != make_digest()


def test_segment_table_is_the_same_in_another_process():
    code = (
        "import numpy as np; from kvortex.layout import KVLayout;"
        "a, b = np.zeros((2, 9, 16, 3, 8), 'f4'), np.zeros((9, 16, 36), 'f4');"
        "print(KVLayout.from_tensors({'a': a, 'é': b}, 16).segment_table().decode())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    tensors = {"a": np.zeros((2, 5, 16, 3, 8), "f4"), "é": np.zeros((5, 16, 36), "f4")}
    table = KVLayout.from_tensors(tensors, 16).segment_table()
    assert there.stdout.strip().encode() == table
    assert json.loads(table)["segments"] == [["a", 1536], ["a", 1536], ["é", 2304]]


@st.composite
def paged_tensors(draw):
    """A dense tensor with any memory order, block dimension anywhere but innermost, and that dimension."""
    itemsize, dtype = draw(st.sampled_from([(1, torch.uint8), (2, torch.int16), (4, torch.int32), (8, torch.int64)]))
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    order = draw(st.permutations(range(len(shape))))
    shape[order[-1]] = draw(st.integers(1, 3)) * 16 // itemsize
    block_dim = draw(st.sampled_from(sorted(order[:-1])))
    return permuted(tuple(shape), list(order), dtype), block_dim


@settings(max_examples=150, deadline=None)
@given(paged_tensors())
def test_any_dense_tensor_round_trips(case):
    tensor, block_dim = case
    layout = KVLayout.from_tensors({"kv": tensor}, BS, block_dim=block_dim)
    assert_serves(layout, tensor, block_dim)
    assert_partitions(layout, tensor.data_ptr(), tensor.nbytes)
    # Maximal: no two consecutive segments could have been one.
    for one, two in zip(layout.segments, layout.segments[1:], strict=False):
        assert one.address + one.nbytes != two.address


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 24), st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=4),
    st.integers(1, 5),
)
def test_overlaps_are_found_exactly(specs, num_blocks):
    """Views into one allocation, in 16-byte words: accepted exactly when no byte has two owners."""
    base = 1 << 20
    views, owned = {}, []
    for i, (start, stride, words) in enumerate(specs):
        views[str(i)] = TensorView(
            str(i), base + 16 * start, (num_blocks, 16 * words), (16 * stride, 1), 1, "cpu", "uint8"
        )
        owned += [start + b * stride + w for b in range(num_blocks) for w in range(words)]
    if len(owned) == len(set(owned)):
        assert KVLayout.from_tensors(views, BS, block_dim=0).num_segments == len(specs)
    else:
        with pytest.raises(LayoutError, match="overlap"):
            KVLayout.from_tensors(views, BS, block_dim=0)


@pytest.mark.parametrize("stride_of_last", [64 * 4096, 128 * 4096])
def test_overlap_check_is_quick(stride_of_last):
    """64 interleaved layers of 10,000 blocks; the last case has no common stride and takes the long way."""
    num_blocks, page = 10_000, 4096
    views = {
        str(i): TensorView(str(i), (1 << 30) + i * page, (num_blocks, page), (64 * page, 1), 1, "cuda:0", "uint8")
        for i in range(64)
    }
    views["63"] = replace(views["63"], strides=(stride_of_last, 1))
    started = time.perf_counter()
    KVLayout.from_tensors(views, BS, block_dim=0)
    assert time.perf_counter() - started < 1.0
    views["63"] = replace(views["63"], address=views["62"].address + page - 16)
    with pytest.raises(LayoutError, match="overlaps '62'"):
        KVLayout.from_tensors(views, BS, block_dim=0)


def good():
    return unique(NB, BS, 36)


def padded_head(gap_size):
    return torch.zeros(NB, BS, 4, gap_size + 4, dtype=torch.int32)


REFUSED = [
    pytest.param({}, {}, "no tensors", id="empty"),
    pytest.param({"kv": good()}, {"block_size": 0}, "block_size", id="block-size"),
    pytest.param({"kv": good()}, {"block_size": 15}, "'kv'.*block_size = 15", id="no-dim-is-block-size"),
    pytest.param({"kv": good()}, {"num_blocks": 0}, "num_blocks is 0", id="num-blocks-0"),
    pytest.param({"kv": torch.zeros(0, BS, 36)}, {}, "'kv'.*empty", id="no-blocks"),
    pytest.param({"kv": good()}, {"num_blocks": 5}, "'kv'.*num_blocks = 5", id="num-blocks-fits-nothing"),
    pytest.param({"kv": good()}, {"num_blocks": 4, "block_dim": 0}, "'kv'.*no\\s+multiple", id="not-a-multiple"),
    pytest.param({"kv": good()}, {"block_dim": 3}, "'kv'.*block_dim 3", id="block-dim-range"),
    pytest.param({"kv": good()}, {"block_dim": {"x": 0}}, "'x'", id="block-dim-unknown-name"),
    pytest.param({"kv": unique(2, 2, BS, H, D)}, {}, "'kv'.*block_dim=", id="both-two"),
    pytest.param({"kv": unique(3, 4, BS, H, D)}, {}, "'kv'.*block_dim=", id="no-pair"),
    pytest.param({"kv": unique(2, 2, NB, BS, H, D)}, {}, "'kv'.*block_dim=", id="six-dims-two-twos"),
    pytest.param({"kv": unique(NB, 36)}, {}, "'kv'.*block_dim=", id="two-dims"),
    pytest.param({"kv": unique(3, 3, BS, H, D)}, {"num_blocks": 3}, "'kv'.*block_dim=", id="ambiguous-count"),
    pytest.param({"a": good(), "b": unique(NB + 1, BS, 36)}, {}, "'b'.*7 blocks, 'a' has 6", id="disagree"),
    pytest.param({"a": good(), "b": torch.zeros(())}, {}, "'b'.*not a paged", id="scalar"),
    pytest.param({"kv": unique(1, BS, 36).expand(NB, BS, 36)}, {}, "'kv'.*expanded", id="expand-blocks"),
    pytest.param({"kv": unique(NB, 1, 36).expand(NB, BS, 36)}, {}, "'kv'.*expanded", id="expand-tokens"),
    pytest.param({"kv": np.zeros((NB, BS, 36), "f4")[::-1]}, {}, "'kv'.*flipped", id="negative-stride"),
    pytest.param({"kv": padded_head(4)[..., ::2]}, {}, "'kv'.*not dense", id="no-stride-one"),
    pytest.param({"kv": padded_head(4)[..., :3]}, {}, "'kv'.*not dense", id="short-runs"),
    pytest.param({"kv": unique(2, NB, BS, H, D)}, {"block_dim": 4}, "'kv'.*not dense", id="wrong-block-dim"),
    pytest.param({"kv": padded_head(4)[..., :5]}, {}, "'kv'.*nbytes is 20", id="odd-length"),
    pytest.param({"kv": torch.zeros(NB, BS, 5)[..., :4]}, {}, "'kv'.*segment's address", id="odd-inner-stride"),
    pytest.param({"kv": unique(NB, 577)[:, : BS * 36]}, {"block_dim": 0}, "'kv'.*block_stride", id="odd-stride"),
    pytest.param({"kv": unique(NB * BS * 36 + 4)[1:-3].view(NB, BS, 36)}, {}, "'kv'.*address", id="odd-address"),
    pytest.param(
        {"kv": torch.as_strided(good(), (NB, BS, 36), (BS * 18, 36, 1))},
        {},
        "'kv'.*blocks overlap",
        id="overlap",
    ),
    pytest.param(
        {"kv": torch.as_strided(good(), (NB, 2, BS * 8), (BS * 36, BS * 4, 1))},
        {"block_dim": 0},
        "'kv' overlaps itself",
        id="overlap-in-block",
    ),
    pytest.param({"kv": torch.zeros(NB, BS, 36, device="meta")}, {}, "'kv'.*no memory", id="meta"),
    pytest.param({"kv": torch.zeros(NB, BS, 36).to_sparse()}, {}, "'kv'.*strided", id="sparse"),
    pytest.param({"kv": np.broadcast_to(np.zeros((1, BS, 36)), (NB, BS, 36))}, {}, "'kv'.*read-only", id="ro"),
    pytest.param({"kv": [1, 2, 3]}, {}, "'kv' is a list", id="no-tensor"),
]


@pytest.mark.parametrize(("tensors", "options", "message"), REFUSED)
def test_refusals_name_the_tensor(tensors, options, message):
    with pytest.raises(LayoutError, match=message):
        KVLayout.from_tensors(tensors, options.pop("block_size", BS), **options)


def test_refuses_a_numpy_stride_that_splits_an_element():
    records = np.zeros((NB, BS), dtype=[("a", "u1"), ("b", "f4", (36,))])
    with pytest.raises(LayoutError, match=r"'kv'.*whole elements"):
        KVLayout.from_tensors({"kv": records["b"]}, BS)


def test_refuses_tensors_that_share_memory():
    tensor = unique(2, NB, BS, H, D)
    with pytest.raises(LayoutError, match="'b' overlaps 'a'"):
        KVLayout.from_tensors({"a": tensor, "b": tensor}, BS)
    flat = unique((NB + 1) * BS * 36)
    tensors = {"a": flat[: -BS * 36].view(NB, BS, 36), "b": flat[BS * 36 :].view(NB, BS, 36)}
    with pytest.raises(LayoutError, match="overlaps"):
        KVLayout.from_tensors(tensors, BS)


def test_refuses_mixed_devices():
    view = TensorView.from_torch("a", good())
    with pytest.raises(LayoutError, match="'b' is on cuda:0"):
        KVLayout.from_tensors({"a": view, "b": replace(view, address=1 << 40, device="cuda:0")}, BS)
