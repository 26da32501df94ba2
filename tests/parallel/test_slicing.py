"""Factors sharded over tensor-parallel ranks: the pieces of all ranks make up the whole."""

import pytest
import torch

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.parallel.slicing import by_kind, copy_checked, input_columns, output_rows, pivot_rows, take_rows

WORLDS = (1, 2, 4, 8)


@pytest.mark.parametrize("world", WORLDS)
def test_row_parallel_columns_reassemble(world: int) -> None:
    weight = torch.arange(5 * 48.0).view(5, 48)
    parts = [weight[:, input_columns(48, 48 // world, rank)] for rank in range(world)]
    assert torch.equal(torch.cat(parts, dim=1), weight)


@pytest.mark.parametrize("rank", range(4))
def test_only_row_parallel_layers_shard_columns(rank: int) -> None:
    assert input_columns(48, 48, rank) == slice(0, 48)


@pytest.mark.parametrize("world", WORLDS)
def test_column_parallel_rows_reassemble(world: int) -> None:
    weight = torch.arange(64 * 3.0).view(64, 3)
    parts = [take_rows(weight, output_rows(64, [64 // world], rank, world, 1)) for rank in range(world)]
    assert torch.equal(torch.cat(parts), weight)


@pytest.mark.parametrize(("world", "heads"), [(2, 1), (4, 1), (4, 2), (8, 1), (8, 2), (8, 4)])
def test_replicated_heads_are_equal_and_complete(world: int, heads: int) -> None:
    """Fewer key/value heads than ranks: neighbouring ranks hold one head together."""
    head_size, replicas = 4, world // heads
    weight = torch.arange(heads * head_size * 2.0).view(heads * head_size, 2)
    parts = [
        take_rows(weight, output_rows(heads * head_size, [head_size], rank, world, replicas)) for rank in range(world)
    ]
    for rank, part in enumerate(parts):
        assert torch.equal(part, parts[rank // replicas * replicas]), rank
    assert torch.equal(torch.cat(parts[::replicas]), weight)


@pytest.mark.parametrize("world", WORLDS)
def test_fused_partitions_reassemble(world: int) -> None:
    """A matrix fused in the checkpoint (gate over up) gives each rank a piece of every partition."""
    sizes = (32, 16, 40)
    blocks = [torch.randn(size, 3, generator=torch.Generator().manual_seed(size)) for size in sizes]
    weight = torch.cat(blocks)
    pieces = [
        take_rows(weight, output_rows(sum(sizes), [size // world for size in sizes], rank, world, 1)).split(
            [size // world for size in sizes]
        )
        for rank in range(world)
    ]
    for index, block in enumerate(blocks):
        assert torch.equal(torch.cat([piece[index] for piece in pieces]), block), index


def test_rows_already_cut_are_taken_whole() -> None:
    """A checkpoint saved per rank brings exactly the rows of its rank."""
    weight = torch.randn(8, 3)
    assert torch.equal(take_rows(weight, output_rows(8, [5, 3], 1, 4, 1)), weight)


@pytest.mark.parametrize(
    ("rows", "partitions", "world", "replicas"), [(65, [32], 2, 1), (64, [16], 2, 1), (64, [32], 8, 2), (1, [4], 4, 2)]
)
def test_rows_that_do_not_divide_are_refused(rows: int, partitions: list[int], world: int, replicas: int) -> None:
    with pytest.raises(ValueError, match=rf"^{rows} rows cannot be cut into {world // replicas} shares"):
        output_rows(rows, partitions, 0, world, replicas)


def test_a_single_piece_is_not_copied() -> None:
    weight = torch.randn(8, 3)
    piece = take_rows(weight, [slice(2, 6)])
    assert piece.data_ptr() == weight[2].data_ptr()


@pytest.mark.parametrize(("groups", "each", "head"), [(2, 3, 4), (1, 4, 2), (4, 1, 3)])
def test_interleaved_rows_are_sorted_by_kind(groups: int, each: int, head: int) -> None:
    """As Falcon's loader in vLLM does with dense weights, written there for tensors of any dimension."""
    weight = torch.randn(groups * (each + 2) * head, 5)
    parts = weight.view(groups, each + 2, head, 5)
    queries, keys, values = parts[:, :each], parts[:, each], parts[:, each + 1]
    expected = torch.cat([part.reshape(-1, 5) for part in (queries, keys, values)])
    assert torch.equal(weight[by_kind(groups, each, head)], expected)


def test_pivots_follow_another_order() -> None:
    pivots, c, z = torch.tensor([1, 4, 5]), torch.randn(5, 3), torch.randn(3)
    whole = torch.empty(8)
    whole[[1, 4, 5]], whole[[0, 2, 3, 6, 7]] = z, c @ z
    order = torch.tensor([7, 0, 3, 4, 1, 2, 6, 5])
    for cut in (slice(0, 4), slice(4, 8)):
        own, places = pivot_rows(pivots, c, [cut], order)
        rest = own @ z
        found = torch.stack([z[-1 - int(place)] if place < 0 else rest[place] for place in places])
        torch.testing.assert_close(found, whole[order][cut])


def test_copy_checked_names_the_tensor_and_both_shapes() -> None:
    with pytest.raises(CheckpointError, match=r"tensor a\.b\.weight_v: .*\(2, 3\).*\(3, 2\)"):
        copy_checked(torch.zeros(2, 3), torch.ones(3, 2), "a.b.weight_v")
    # One row would broadcast: also refused.
    with pytest.raises(CheckpointError):
        copy_checked(torch.zeros(2, 3), torch.ones(1, 3), "a.b.weight_v")
    target = torch.zeros(2, 3, dtype=torch.bfloat16)
    copy_checked(target, torch.ones(2, 3), "a.b.weight_v")
    assert torch.equal(target, torch.ones(2, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("rank", [1, 13, 39])
def test_pivot_rows_reassemble(world: int, rank: int) -> None:
    """Each rank computes its rows of the two fused partitions from the whole z and its own rows of C."""
    generator = torch.Generator().manual_seed(rank)
    sizes = (24, 16)
    pivots = torch.randperm(sum(sizes), generator=generator)[:rank].sort().values
    c, z = torch.randn(sum(sizes) - rank, rank, generator=generator), torch.randn(rank, generator=generator)
    whole = torch.empty(sum(sizes))
    whole[pivots] = z
    whole[[i for i in range(sum(sizes)) if i not in pivots]] = c @ z
    pieces, rows_of_c = [], 0
    for tp_rank in range(world):
        cuts = output_rows(sum(sizes), [size // world for size in sizes], tp_rank, world, 1)
        own, places = pivot_rows(pivots.int(), c, cuts)
        rows_of_c += len(own)
        rest = own @ z
        y = torch.stack([z[-1 - int(place)] if place < 0 else rest[place] for place in places])
        pieces.append(y.split([size // world for size in sizes]))
    found = torch.cat([torch.cat([piece[i] for piece in pieces]) for i in range(2)])
    torch.testing.assert_close(found, whole)
    assert rows_of_c == len(c), "a row of C is on no rank, or on two"
