"""What tensor-parallel ranks exchange inside a layer, and which cut that allows."""

import os
from collections.abc import Sequence
from enum import Enum

from pgsvd_vllm.errors import InputError

# Bytes that a rank must save for one more collective. A small all-gather takes 5 to 10 microseconds over NVLink, in
# which an H100 reads 17 to 33 MB, and 20 over PCIe, in which an L4 reads 6 MB; and what is saved is room for requests.
COLLECTIVE_BYTES = 8 * 2**20
VARIABLE = "PGSVD_COLLECTIVE_BYTES"


class Cut(Enum):
    """What the ranks exchange inside a layer, and what that allows to cut."""

    REPLICATED = "nothing; V (outputs cut) or U (inputs cut) lies whole on every rank"
    ALL_GATHER_Z = "outputs cut: V is cut by rank rows, z gathered"
    ALL_REDUCE_Z = "inputs cut: z is summed in place of the outputs, U whole"
    ALL_REDUCE_Z_GATHER_Y = "inputs cut: z is summed, U cut by outputs, these are gathered"


def collective_bytes() -> int:
    """The bytes that one more collective must save.

    Raises:
        InputError: the environment variable is no number of bytes.
    """
    given = os.environ.get(VARIABLE, str(COLLECTIVE_BYTES))
    if not given.isdecimal():
        raise InputError(f"{VARIABLE}={given}: must be a number of bytes, 0 or more (0: the least memory on a rank)")
    return int(given)


class CommPlan:
    """Chooses the cuts of a model's layers in their order: the least memory for no more traffic than dense.

    Summing z where a dense layer sums its outputs sends less; what that spares is spent on gathering z where
    nothing was sent, which spares the most memory a number sent, and then on gathering outputs.

    CommPlan is counted in numbers a token: of a sum over w ranks each sends 2 (w - 1) / w times what is summed, of
    a gathering (w - 1) / w times what comes together. The common factor is left out.

    Args:
        least: bytes that a rank must save for one more collective.

    Attributes:
        dense: what the layers seen so far would send if they were dense.
        sent: what they send.
    """

    def __init__(self, least: int) -> None:
        self.least = least
        self.dense = self.sent = 0
        # The most that gathering z of one layer costs.
        self._gathering = 0

    def by_outputs(self, ranks: Sequence[int], columns: int, workers: int, itemsize: int) -> Cut:
        """The cut of a layer whose outputs are cut.

        Args:
            ranks: of its low-rank shards.
            columns: its inputs.
            workers: ranks of tensor parallelism.
            itemsize: bytes of a number.
        """
        here = sum(-(-rank // workers) for rank in ranks)
        self._gathering = max(self._gathering, here * workers)
        saved = (sum(ranks) - here) * columns * itemsize
        if not 0 < saved >= self.least or self.sent + here * workers > self.dense:
            return Cut.REPLICATED
        self.sent += here * workers
        return Cut.ALL_GATHER_Z

    def by_inputs(self, rank: int, rows: int, out: int, workers: int, itemsize: int) -> Cut:
        """The cut of a layer whose inputs are cut and whose outputs are summed.

        Args:
            rank: of its matrix.
            rows: of its up factor: outputs less pivots.
            out: its outputs.
            workers, itemsize: as of `by_outputs`.
        """
        if rank >= out:
            self.summed(out)
            return Cut.REPLICATED
        self.dense += 2 * out
        self.sent += 2 * rank
        saved = (rows - rows // workers) * rank * itemsize
        # The layers of the next block must find something left.
        if out % workers or not 0 < saved >= self.least or self.sent + out + 2 * self._gathering > self.dense:
            return Cut.ALL_REDUCE_Z
        self.sent += out
        return Cut.ALL_REDUCE_Z_GATHER_Y

    def summed(self, out: int) -> None:
        """Count a layer whose outputs are summed as they would be if it were dense."""
        self.dense += 2 * out
        self.sent += 2 * out
