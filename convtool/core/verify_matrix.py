"""Whether a matrix is a layer's, or another matrix: entry by entry, in blocks of rows, so that it need not fit memory.

Every stored entry is held against the one that it should be: within half a unit in its last place, and where several
taps are summed into it, what summing them can do (`convtool.core.bound`). That settles it for all inputs. For a layer
the entries come from its tap tables; so that these aren't their own witness, the matrix is multiplied with a few inputs
as well, and the products are held against what torch's convolution gives.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from convtool.core.bound import U64, fusing_terms, gamma, half_ulp, less_inwards
from convtool.core.conv import Conv
from convtool.core.forward import forward
from convtool.core.inputs import dense_inputs
from convtool.core.order import Order, matrix_in_order
from convtool.core.rows import CsrBlock
from convtool.core.tally import Region, ratios
from convtool.core.toeplitz import ToeplitzMatrix
from convtool.errors import UsageError

BLOCK_ENTRIES = 1 << 17  # entries of a matrix in flight
MOST_NUMBERS = 1 << 27  # of an input and its output: 1 GiB; larger layers aren't run, only their entries compared


class Rows(Protocol):
    """A matrix that gives its rows piece by piece."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)"""

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""

    def blocks(self, entries: int = ..., /) -> Iterator[tuple[int, int]]:
        """Ranges of rows that cover the matrix in order, each of about that many entries."""

    def rows(self, start: int, stop: int, /) -> CsrBlock:
        """Rows start:stop."""


@dataclass(frozen=True, slots=True)
class MatrixReport:
    """The result of `verify_matrix` or `verify_matrices`.

    Attributes:
        shape: (rows, columns) of what was compared.
        mismatch: why the two cannot be compared number by number; else ''.
        entries: the comparison of matrix entries; `where` is (row, column), and `positions` and `differing` count
            entries. Entries that are stored on neither side are zero on both.
        products: that of the matrix's products with inputs, held against torch's convolution; empty for two matrices,
            and for a layer whose input and output are more than `MOST_NUMBERS`.
        bias: that of the bias vectors; `where` is (output,).
        bias_missing: the layer has a bias, and the file has no room for one: the rest was compared.
        dtype: of the matrix that was compared.
        seed: of the inputs that it was multiplied with.
    """

    shape: tuple[int, int]
    mismatch: str = ""
    entries: Region = field(default_factory=Region)
    products: Region = field(default_factory=Region)
    bias: Region = field(default_factory=Region)
    bias_missing: bool = False
    dtype: str = "float64"
    seed: int = 0

    @property
    def equivalent(self) -> bool:
        """All of it within its bound, and something was compared."""
        regions = [region for region in (self.entries, self.products, self.bias) if region.positions]
        return not self.mismatch and self.shape[0] > 0 and all(region.ratio <= 1 for region in regions)

    @property
    def ratio(self) -> float:
        """The largest error / bound of all; inf where nothing could be compared."""
        return math.inf if self.mismatch else max(self.entries.ratio, self.products.ratio, self.bias.ratio)


def verify_matrix(
    conv: Conv,
    input_size: Sequence[int],
    matrix: Rows,
    *,
    bias: Tensor | None = None,
    stores_bias: bool = True,
    transpose: bool = False,
    affine: bool = False,
    order: Order = "CHW",
    rows: tuple[int, int] | None = None,
    trials: int = 2,
    seed: int = 0,
    computed_in: torch.dtype = torch.float64,
) -> MatrixReport:
    """Hold a matrix against the layer that it was made of.

    Args:
        conv: the layer; its numbers are taken as exact.
        input_size: spatial sizes of its input.
        matrix: what was exported.
        bias: the vector stored with it, or None.
        stores_bias: whether there is room for one where it is stored; else a missing one is no difference.
        transpose, affine, order: as in `convtool.core.order.matrix_in_order`.
        rows: the range A:B that `matrix` holds; all of them where None.
        trials: random inputs to multiply it with.
        seed: of these.
        computed_in: the precision in which another program added up taps that share a column.
    """
    if trials < 1:
        raise UsageError(f"trials: expected at least 1, got {trials}; no comparison is no proof")
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed: expected an integer from 0 to 2**63 - 1, got {seed}")
    exact = conv.exact()
    whole = matrix_in_order(order, exact, input_size, transpose=transpose, affine=affine)
    start, stop = (0, whole.shape[0]) if rows is None else rows
    shape = (stop - start, whole.shape[1])
    name = str(matrix.dtype).removeprefix("torch.")
    if tuple(matrix.shape) != shape:
        one, other = (f"{a} x {b}" for a, b in (shape, matrix.shape))
        return MatrixReport(shape, f"the layer's matrix is {one}, and this one is {other}", dtype=name)
    merging = conv.geometry.padding_mode != "zeros"
    magnitude, count = (
        matrix_in_order(order, alike(exact), input_size, transpose=transpose, affine=affine) if merging else whole
        for alike in (_absolute, _ones)
    )
    taps = math.prod(conv.geometry.kernel_size)
    adding = gamma(taps, torch.finfo(computed_in).eps / 2) + gamma(taps, U64)

    def expect(first: int, last: int) -> tuple[CsrBlock, Tensor]:
        part = start + first, start + last
        block = whole.rows(*part)
        # One tap to an entry is stored as it is; sums of several have been rounded on the way.
        if not merging:
            return block, torch.zeros(len(block.values), dtype=torch.float64)
        return block, torch.where(count.values(*part) > 1, magnitude.values(*part) * adding, 0.0)

    inputs, outputs = (math.prod(size) for size in (whole.input_size, whole.output_size))
    products = None
    if conv.in_channels * inputs + conv.out_channels * outputs <= MOST_NUMBERS:
        products = _Products(exact, whole, order, (start, stop), trials, seed, computed_in, _least(matrix.dtype))
    entries = _Worst()
    for first, last in matrix.blocks(BLOCK_ENTRIES):
        found = _canonical(matrix.rows(first, last), whole.shape[1])
        half = half_ulp(found.values, matrix.dtype)
        _compare_entries(entries, first, *expect(first, last), found, half, whole.shape[1])
        if products is not None:
            products.add(first, found, half)
    vector, missing = Region(), False
    if not affine:
        part = (start, stop) if rows is not None and not transpose else (0, conv.out_channels * outputs)
        expected = None if conv.bias is None else whole.bias_part(*part)
        vector, missing = _compare_bias(expected, bias, part[1] - part[0], stores_bias)
    return MatrixReport(
        shape,
        entries=entries.region("entry"),
        products=Region() if products is None else products.region(),
        bias=vector,
        bias_missing=missing,
        dtype=name,
        seed=seed,
    )


def verify_matrices(
    before: Rows, after: Rows, *, bias_before: Tensor | None = None, bias_after: Tensor | None = None
) -> MatrixReport:
    """Hold a matrix against another one, of which it is a copy that was rounded once, or the same."""
    shape = (before.shape[0], before.shape[1])
    name = str(after.dtype).removeprefix("torch.")
    if tuple(after.shape) != shape:
        one, other = (f"{a} x {b}" for a, b in (shape, after.shape))
        return MatrixReport(shape, f"the matrices differ in shape: {one} before, {other} after", dtype=name)
    entries = _Worst()
    for start, stop in after.blocks(BLOCK_ENTRIES):
        expected, found = (_canonical(one.rows(start, stop), shape[1]) for one in (before, after))
        exact = CsrBlock(expected.counts, expected.indices, _widened(expected.values))
        slack, half = torch.zeros_like(exact.values.abs()), half_ulp(found.values, after.dtype)
        _compare_entries(entries, start, exact, slack, found, half, shape[1])
    size = max(0 if bias is None else len(bias) for bias in (bias_before, bias_after))
    vector, _ = _compare_bias(bias_before, bias_after, size, True)
    return MatrixReport(shape, entries=entries.region("entry"), bias=vector, dtype=name)


def _absolute(conv: Conv) -> Conv:
    return Conv(conv.weight.abs(), None if conv.bias is None else conv.bias.abs(), conv.geometry)


def _ones(conv: Conv) -> Conv:
    """The layer whose matrix has the number of taps in each place."""
    bias = None if conv.bias is None else torch.ones(conv.bias.shape, dtype=torch.float64)
    return Conv(torch.ones(conv.weight.shape, dtype=torch.float64), bias, conv.geometry)


def _widened(values: Tensor) -> Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def _canonical(block: CsrBlock, columns: int) -> CsrBlock:
    """The rows with their columns ascending, and entries at the same place added up, as every program reads them."""
    row = torch.repeat_interleave(torch.arange(len(block.counts)), block.counts)
    key = row * columns + block.indices.long()
    if bool((key.diff() > 0).all()):
        return block
    places, inverse = key.unique(return_inverse=True)
    values = torch.zeros(len(places), dtype=block.values.dtype).index_add_(0, inverse, block.values)
    return CsrBlock(torch.bincount(places // columns, minlength=len(block.counts)), places % columns, values)


class _Worst:
    """Numbers against those that they should be, the largest ratio kept while they come in."""

    def __init__(self) -> None:
        self.count = self.differing = 0
        self.ratio = self.error = self.bound = self.largest = self.size = 0.0
        self.where: tuple[int, ...] | None = None

    def add(self, expected: Tensor, found: Tensor, bound: Tensor, where: Callable[[int], tuple[int, ...]]) -> None:
        """Compare vectors; `where` says what stands at an index."""
        if not len(found):
            return
        given = found.to(expected.dtype) if expected.is_complex() else _widened(found)
        error, ratio = ratios(expected, given, bound * (1 + 8 * U64))
        size = expected.abs()
        self.count += len(found)
        self.differing += int((ratio > 1).sum())
        self.largest = max(self.largest, float(torch.where(error.isnan(), math.inf, error).max()))
        self.size = max(self.size, float(torch.where(size.isfinite(), size, 0.0).max()))
        at = int(ratio.argmax())
        if self.where is None or float(ratio[at]) > self.ratio:
            self.ratio, self.error, self.bound = float(ratio[at]), float(error[at]), float(bound[at])
            self.where = where(at)

    def region(self, kind: str) -> Region:
        """What was found."""
        return Region(
            elements=self.count,
            ratio=self.ratio,
            error=self.error,
            bound=self.bound,
            where=self.where,
            kind=kind,
            largest_error=self.largest,
            relative_error=self.largest / self.size if self.size else (0.0 if not self.largest else math.inf),
            differing=self.differing,
            positions=self.count,
        )


def _compare_entries(
    worst: _Worst, start: int, expected: CsrBlock, slack: Tensor, found: CsrBlock, half: Tensor, columns: int
) -> None:
    """Entries of the rows from `start` on, at every place where either side has one.

    Args:
        slack: what the expected values may be off before they are stored.
        half: what storing may have moved the found ones by.
    """
    key, wanted, have = _keys(found, columns), expected.values, found.values
    if not (torch.equal(expected.counts, found.counts) and torch.equal(_keys(expected, columns), key)):
        own = _keys(expected, columns)
        places = torch.cat([own, key]).unique()

        def spread(at: Tensor, values: Tensor, otherwise: float = 0.0) -> Tensor:
            out = torch.full((len(places),), otherwise, dtype=values.dtype)
            return out.index_copy_(0, torch.searchsorted(places, at), values)

        wanted, slack = spread(own, wanted), spread(own, slack)
        # What isn't stored is a zero, which half of the smallest subnormal is rounded to as well.
        have, half, key = spread(key, have), spread(key, half, _least(have.dtype)), places
    bound = _towards(wanted, have, half) + slack
    worst.add(wanted, have, bound, lambda at: (start + int(key[at]) // columns, int(key[at]) % columns))


def _towards(wanted: Tensor, have: Tensor, half: Tensor) -> Tensor:
    """What storing may have moved each number by, on the side that it is off to: to powers of two less inwards."""
    less = less_inwards(have, have.dtype)
    return half if less is None else half - torch.where(wanted.abs() < have.abs(), less, 0.0)


def _least(dtype: torch.dtype) -> float:
    """The most that is rounded to zero."""
    return float(half_ulp(torch.zeros(1, dtype=dtype), dtype))


def _keys(block: CsrBlock, columns: int) -> Tensor:
    """One number for each entry's place in the block."""
    return torch.repeat_interleave(torch.arange(len(block.counts)), block.counts) * columns + block.indices.long()


class _Products:
    """The matrix times some inputs, block by block, against torch's convolution of them."""

    def __init__(
        self,
        conv: Conv,
        whole: ToeplitzMatrix,
        order: Order,
        rows: tuple[int, int],
        trials: int,
        seed: int,
        computed_in: torch.dtype,
        least: float,
    ) -> None:
        self.transpose, self.order, self.rows = whole.transpose, order, rows
        elements = conv.in_channels * math.prod(whole.input_size)
        inputs = dense_inputs(conv.in_channels, whole.input_size, trials, seed, elements)
        x = torch.cat([x for _, x in inputs]).to(conv.weight.dtype)  # (n, C_in, *input_size)
        one = torch.ones(len(x), 1 if whole.affine else 0, dtype=x.dtype)  # the final 1 that the bias stands at
        flat = torch.cat([self._flat(x), one], dim=1)
        if whole.transpose:  # x @ B adds up rows: of a part of them, the inputs that stand at these
            kept = torch.zeros(flat.shape[1], dtype=torch.bool)
            kept[slice(*rows)] = True
            flat = torch.where(kept, flat, torch.zeros_like(flat))
        self.x = flat[:, :elements].reshape(self._moved(x).shape)
        self.x = self.x.movedim(-1, 1) if order == "HWC" else self.x
        self.layer = conv if whole.affine and bool(flat[:, elements:].any()) else _without_bias(conv)
        self.flat = flat.T.contiguous()  # (columns of T, n)
        outputs = whole.shape[1] if whole.transpose else rows[1] - rows[0]
        self.found = torch.zeros(outputs, len(x), dtype=x.dtype)
        self.size = torch.zeros(outputs, len(x), dtype=torch.float64)
        self.lost = self.size + least * self.flat.abs().sum(0)  # of entries that were rounded to zero and left out
        terms = conv.weight[0].numel() + 2
        self.running = gamma(2 * terms + 8, U64)
        self.computing = gamma(fusing_terms(conv) + terms, torch.finfo(computed_in).eps / 2)

    def _moved(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1) if self.order == "HWC" else x

    def _flat(self, x: Tensor) -> Tensor:
        """Each of (n, C, *size) as a vector in the matrix's order."""
        return self._moved(x).flatten(1)

    def add(self, start: int, block: CsrBlock, half: Tensor) -> None:
        """Multiply rows from `start` on, as far as they are this part's."""
        stop = start + len(block.counts)
        numbers = ((self.found, block.values), (self.size, block.values.abs()), (self.lost, half))
        for total, values in numbers:
            x = self.flat if total is self.found else self.flat.abs()
            if self.transpose:
                row = torch.repeat_interleave(torch.arange(start, stop), block.counts) + self.rows[0]
                total.index_add_(0, block.indices.long(), values.to(total.dtype)[:, None] * x[row])
            else:
                total[start:stop] += _times(block, values.to(total.dtype), x)

    def region(self) -> Region:
        """The products against the convolutions."""
        expected = self._flat(forward(self.layer, self.x)).T  # (outputs, n)
        most = self._flat(forward(_absolute(self.layer), self.x.abs())).T
        if not self.transpose:
            expected, most = expected[slice(*self.rows)], most[slice(*self.rows)]
        elif self.found.shape[0] != expected.shape[0]:
            raise AssertionError("a matrix for row vectors has a column for each output")
        bound = self.lost + self.computing * most + self.running * (most + self.size) + 2.0**-1022
        worst, each = _Worst(), self.found.shape[1]
        worst.add(expected.flatten(), self.found.flatten(), bound.flatten(), lambda at: divmod(at, each)[:1])
        return worst.region("product")


def _times(block: CsrBlock, values: Tensor, x: Tensor) -> Tensor:
    """Rows in CSR form times x, (columns, n)."""
    starts = torch.zeros(len(block.counts) + 1, dtype=torch.int64)
    torch.cumsum(block.counts, 0, out=starts[1:])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        matrix = torch.sparse_csr_tensor(
            starts, block.indices.long(), values, (len(block.counts), len(x)), check_invariants=False
        )
        product: Tensor = matrix @ x
    return product


def _without_bias(conv: Conv) -> Conv:
    return Conv(conv.weight, None, conv.geometry)


def _compare_bias(expected: Tensor | None, found: Tensor | None, size: int, stored: bool) -> tuple[Region, bool]:
    """The bias vectors, and whether one is missing that there was no room for."""
    if expected is None and found is None:
        return Region(), False
    if found is None and not stored:
        return Region(), True
    wanted = torch.zeros(size, dtype=torch.float64) if expected is None else _widened(expected)
    have = torch.zeros(size, dtype=torch.float64) if found is None else found
    if have.shape != wanted.shape:
        return Region(elements=1, ratio=math.inf, error=math.inf, kind="bias", differing=1, positions=1), False
    half = torch.zeros(size, dtype=torch.float64) if found is None else half_ulp(found, found.dtype)
    worst = _Worst()
    worst.add(wanted, have, _towards(wanted, have, half), lambda at: (at,))
    return worst.region("bias"), False
