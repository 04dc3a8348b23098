"""The grid covers every tile, whatever the shape of a batch, and no thread block is without one."""

from hypothesis import given
from hypothesis import strategies as st

from kvortex.kernels.tables import MAX_BATCH_BLOCKS
from kvortex.kernels.tiles import WARP_TILES, grid_size


@given(
    num_blocks=st.integers(1, MAX_BATCH_BLOCKS),
    num_tiles=st.integers(1, 5000),
    threads=st.sampled_from([32, 128, 512]),
)
def test_the_grid_covers_all_tiles_and_no_more(num_blocks: int, num_tiles: int, threads: int) -> None:
    tiles_a_thread_block = threads // 32 * WARP_TILES
    covered = grid_size(num_blocks, num_tiles, threads) * tiles_a_thread_block
    assert covered - tiles_a_thread_block < num_blocks * num_tiles <= covered
