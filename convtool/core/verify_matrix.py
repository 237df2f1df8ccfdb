"""Whether a matrix is a layer's, or another matrix: entry by entry, in blocks of rows, so that it need not fit memory.

Every stored entry is held against the one that it should be: within half a unit in its last place, and where several
taps are summed into it, what summing them can do (`convtool.core.bound`). That settles it for all inputs. For a layer
the entries come from its tap tables; so that these aren't their own witness, the matrix is multiplied with a few inputs
as well, and the products are held against what torch's convolution gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from convtool.core.bound import U64, fusing_terms, gamma
from convtool.core.conv import Conv
from convtool.core.expression import Expression, depth, exact_type, in_channels, run, window
from convtool.core.kernels import Order
from convtool.core.moves import Selection
from convtool.core.rounding import dtype_name, exact_dtype
from convtool.core.rows import CsrBlock, RowMatrix
from convtool.core.stored import half_digit, half_ulp, stored_within
from convtool.core.tally import Index, Region, Worst, check_trials, dense_inputs
from convtool.core.toeplitz import ToeplitzMatrix, toeplitz
from convtool.core.tree import map_leaves

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
class MatrixForm:
    """Which of the matrices of layers one is.

    Attributes:
        transpose, affine, order: as in `convtool.core.toeplitz.toeplitz`.
        rows, columns: the ranges A:B of it that are there; all of them where None.
    """

    transpose: bool = False
    affine: bool = False
    order: Order = "CHW"
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    def of(self, layers: Expression, input_size: Sequence[int]) -> ToeplitzMatrix:
        """Return the whole matrix of layers."""
        return toeplitz(layers, input_size, transpose=self.transpose, affine=self.affine, order=self.order)


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
    layers: Expression,
    input_size: Sequence[int],
    matrix: Rows,
    form: MatrixForm = MatrixForm(),
    *,
    bias: Tensor | None = None,
    stores_bias: bool = True,
    trials: int = 2,
    seed: int = 0,
    computed_in: torch.dtype = torch.float64,
    digits: int | None = None,
) -> MatrixReport:
    """Hold a matrix against the layers that it was made of.

    Args:
        layers, matrix: a layer, or chains and sums of them, their numbers taken as exact; and what was exported.
        form: which of the layers' matrices it is.
        bias: the vector stored with it, or None.
        stores_bias: whether there is room for one where it is stored; else a missing one is no difference.
        trials, seed, computed_in: as in `convtool.core.verify.verify`.
        digits: decimal ones that the matrix's numbers were rounded to; None where they are as they were stored.
    """
    check_trials(trials, seed)
    layer = _Layer(map_leaves(Conv.exact, layers), tuple(input_size), form, computed_in)
    report = MatrixReport(layer.shape, dtype=dtype_name(matrix.dtype), seed=seed)
    if tuple(matrix.shape) != layer.shape:
        return replace(report, mismatch=f"the layer's matrix is {_by(layer.shape)}, this one is {_by(matrix.shape)}")
    numbers = layer.whole.outputs + in_channels(layers) * math.prod(input_size)  # of an input and its output
    products = _Products(layer, trials, seed, _least(matrix.dtype)) if numbers <= MOST_NUMBERS else None
    entries = _compare_rows(matrix, layer.shape[1], layer.block, products, digits)
    report = replace(report, entries=entries, products=products.region() if products else Region())
    if form.affine:
        return report
    wanted, slack, size = layer.bias
    missing = bias is None and wanted is not None and not stores_bias
    region = Region() if missing else _compare_bias(wanted, bias, size, slack)
    return replace(report, bias=region, bias_missing=missing)


def verify_matrices(
    before: Rows, after: Rows, *, bias_before: Tensor | None = None, bias_after: Tensor | None = None
) -> MatrixReport:
    """Hold a matrix against another one, of which it is a copy that was rounded once, or the same."""
    report = MatrixReport((before.shape[0], before.shape[1]), dtype=dtype_name(after.dtype))
    if tuple(after.shape) != report.shape:
        shapes = f"{_by(report.shape)} before, {_by(after.shape)} after"
        return replace(report, mismatch=f"the matrices differ in shape: {shapes}")
    entries = _compare_rows(after, report.shape[1], lambda first, last: (before.rows(first, last), None))
    size = max(0 if bias is None else len(bias) for bias in (bias_before, bias_after))
    return replace(report, entries=entries, bias=_compare_bias(bias_before, bias_after, size))


def _by(shape: Sequence[int]) -> str:
    return f"{shape[0]} x {shape[1]}"


@dataclass(frozen=True)
class _Layer:
    """Layers and how their matrix is to be; see `verify_matrix`."""

    tree: Expression
    input_size: tuple[int, ...]
    form: MatrixForm
    computed_in: torch.dtype

    @cached_property
    def whole(self) -> ToeplitzMatrix:
        """All of its matrix."""
        return self.form.of(self.tree, self.input_size)

    @cached_property
    def absolute(self) -> ToeplitzMatrix:
        """The matrix of the absolute values."""
        return self.form.of(map_leaves(Conv.absolute, self.tree), self.input_size)

    @cached_property
    def counts(self) -> ToeplitzMatrix:
        """How many products each entry is added up of."""
        return self.form.of(map_leaves(_ones, self.tree), self.input_size)

    @cached_property
    def terms(self) -> int:
        """The most that are added up on the way to a number."""
        return depth(self.tree, window)

    @cached_property
    def adding(self) -> float:
        """What a sum on the way to a number may be off, relative to its absolute values: theirs and ours."""
        if isinstance(self.tree, Conv):
            steps = math.prod(self.tree.geometry.kernel_size)
        else:
            steps = 4 * self.terms + fusing_terms(self.tree)
        return gamma(steps, torch.finfo(self.computed_in).eps / 2) + gamma(steps, U64)

    @property
    def spans(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Which rows and which columns are asked about."""
        rows, columns = self.whole.shape
        return self.form.rows or (0, rows), self.form.columns or (0, columns)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of what is asked about."""
        (top, bottom), (left, right) = self.spans
        return bottom - top, right - left

    @property
    def bias(self) -> tuple[Tensor | None, Tensor | None, int]:
        """The bias that should be stored with the rows asked about, what it may be off, and how long a vector it is."""
        part = self.spans[self.form.transpose]
        if not self.whole.has_bias:
            return None, None, part[1] - part[0]
        # One layer's bias is stored as it is; what is carried through several has been rounded on the way.
        sums = None if isinstance(self.tree, Conv) else self.absolute.bias_part(*part) * self.adding
        return self.whole.bias_part(*part), sums, part[1] - part[0]

    def block(self, first: int, last: int) -> tuple[CsrBlock, Tensor | None]:
        """Return rows first:last of those asked about, and what their values may be off before they are stored."""
        top, columns = self.spans[0][0], self.form.columns

        def cut(matrix: RowMatrix) -> tuple[RowMatrix, int, int]:
            whole = matrix if columns is None else matrix.columns(*columns, self.form.rows)
            return whole, top + first, top + last

        block = RowMatrix.rows(*cut(self.whole))
        if not isinstance(self.tree, Conv):  # sums of products have been rounded on the way
            return block, RowMatrix.values(*cut(self.absolute)) * self.adding
        if self.tree.geometry.padding_mode == "zeros":  # one tap to an entry is stored as it is
            return block, None
        several = RowMatrix.values(*cut(self.counts)) > 1
        return block, torch.where(several, RowMatrix.values(*cut(self.absolute)) * self.adding, 0.0)


def _ones(conv: Conv) -> Conv:
    """Return the layer all of whose numbers are 1."""
    return conv if isinstance(conv, Selection) else conv.changed(lambda numbers: torch.ones_like(numbers.abs()))


def _compare_rows(
    matrix: Rows,
    columns: int,
    expect: Callable[[int, int], tuple[CsrBlock, Tensor | None]],
    products: _Products | None = None,
    digits: int | None = None,
) -> Region:
    """Compare all entries of a matrix, block by block, with those that `expect` gives for a range of its rows."""
    worst = Worst("entry")
    for first, last in matrix.blocks(BLOCK_ENTRIES):
        key, found = _canonical(matrix.rows(first, last), columns)
        half = half_ulp(found.values, matrix.dtype)
        half = half if digits is None else half + half_digit(found.values, digits)
        block, slack = expect(first, last)
        own, block = _canonical(block, columns)
        wanted, have, most = block.values.to(exact_dtype(block.values.dtype)), found.values, half
        slack = torch.zeros(len(own), dtype=torch.float64) if slack is None else slack
        if not torch.equal(own, key):
            places = torch.cat([own, key]).unique()
            wanted, slack = _spread(places, own, wanted), _spread(places, own, slack)
            # What isn't stored is a zero, which half of the smallest subnormal is rounded to as well.
            have, most = _spread(places, key, have), _spread(places, key, half, _least(have.dtype))
            key = places
        most = stored_within(wanted, have, most, have.dtype) + slack

        def place(at: Index, start: int = first, key: Tensor = key) -> Index:
            row, column = divmod(int(key[at]), columns)
            return start + row, column

        worst.hold(wanted, have, most, place)
        if products is not None:
            products.add(first, found, half)
    return worst.region


def _canonical(block: CsrBlock, columns: int) -> tuple[Tensor, CsrBlock]:
    """Sort the entries by their places, and add up those at the same one, as every program reads them.

    Returns:
        (entries,) one ascending number for each place in the block, and the block.
    """
    row = torch.repeat_interleave(torch.arange(len(block.counts)), block.counts)
    key = row * columns + block.indices.long()
    if bool((key.diff() > 0).all()):
        return key, block
    places, inverse = key.unique(return_inverse=True)
    values = torch.zeros(len(places), dtype=block.values.dtype).index_add_(0, inverse, block.values)
    counts = torch.bincount(places // columns, minlength=len(block.counts))
    return places, CsrBlock(counts, places % columns, values)


def _spread(places: Tensor, at: Tensor, values: Tensor, otherwise: float = 0.0) -> Tensor:
    out = torch.full((len(places),), otherwise, dtype=values.dtype)
    return out.index_copy_(0, torch.searchsorted(places, at), values)


def _least(dtype: torch.dtype) -> float:
    """Return the most that is rounded to zero."""
    return float(half_ulp(torch.zeros(1, dtype=dtype), dtype))


class _Products:
    """The matrix times some inputs, block by block, against torch's convolution of them."""

    def __init__(self, layer: _Layer, trials: int, seed: int, least: float) -> None:
        tree, form, size = layer.tree, layer.form, layer.input_size
        self.form = form
        # Of a part of the matrix: what isn't multiplied is zero, and what isn't made isn't compared.
        (start, stop), self.outputs = layer.spans[:: 1 if form.transpose else -1]
        elements = in_channels(tree) * math.prod(size)
        inputs = dense_inputs(in_channels(tree), size, trials, seed, elements)
        x = torch.cat([x for _, x in inputs]).to(exact_type(tree))  # (n, C_in, *input_size)
        one = torch.ones(len(x), 1 if form.affine else 0, dtype=x.dtype)  # the final 1 that the bias stands at
        whole = torch.cat([self._moved(x).flatten(1), one], dim=1)
        flat = torch.zeros_like(whole)
        flat[:, start:stop] = whole[:, start:stop]
        self.x = flat[:, :elements].reshape(self._moved(x).shape)
        self.x = self.x.movedim(-1, 1) if form.order == "HWC" else self.x
        self.tree = tree if bool(flat[:, elements:].any()) else map_leaves(Conv.without_bias, tree)
        self.flat = flat.T[start:stop].contiguous()  # (columns of T, n)
        shape = self.outputs[1] - self.outputs[0], len(x)
        self.found, self.size = torch.zeros(shape, dtype=x.dtype), torch.zeros(shape, dtype=torch.float64)
        self.lost = self.size + least * self.flat.abs().sum(0)  # of entries that were rounded to zero and left out
        self.running = gamma((2 if isinstance(tree, Conv) else 8) * layer.terms + 8, U64)
        self.computing = gamma(fusing_terms(tree) + layer.terms, torch.finfo(layer.computed_in).eps / 2)

    def _moved(self, x: Tensor) -> Tensor:
        """Return (n, C, *size) in the matrix's order."""
        return x.movedim(1, -1) if self.form.order == "HWC" else x

    def add(self, start: int, block: CsrBlock, half: Tensor) -> None:
        """Multiply rows from `start` on, as far as they are this part's."""
        stop, size = start + len(block.counts), self.flat.abs()
        numbers = (
            (self.found, block.values, self.flat),
            (self.size, block.values.abs(), size),
            (self.lost, half, size),
        )
        for total, values, x in numbers:
            if self.form.transpose:
                row = torch.repeat_interleave(torch.arange(start, stop), block.counts)
                total.index_add_(0, block.indices.long(), values.to(total.dtype)[:, None] * x[row])
            else:
                total[start:stop] += block._replace(values=values).to_torch(len(x), total.dtype) @ x

    def region(self) -> Region:
        """Hold the products against the convolutions."""

        def made(tree: Expression, x: Tensor) -> Tensor:
            return self._moved(run(tree, x)).flatten(1).T[slice(*self.outputs)]  # (outputs, n)

        expected, most = made(self.tree, self.x), made(map_leaves(Conv.absolute, self.tree), self.x.abs())
        bound = self.lost + self.computing * most + self.running * (most + self.size) + 2.0**-1022
        worst = Worst("product")
        worst.hold(expected, self.found, bound, lambda at: at[:1])
        return worst.region


def _compare_bias(expected: Tensor | None, found: Tensor | None, size: int, slack: Tensor | None = None) -> Region:
    """Compare bias vectors of that size; a missing one is zero."""
    if expected is None and found is None:
        return Region()
    wanted, have = (torch.zeros(size, dtype=torch.float64) if one is None else one for one in (expected, found))
    if have.shape != wanted.shape:
        return Region(elements=1, ratio=math.inf, error=math.inf, kind="bias", differing=1, positions=1)
    half = torch.zeros(size, dtype=torch.float64) if found is None else half_ulp(found, found.dtype)
    worst, wanted = Worst("bias"), wanted.to(exact_dtype(wanted.dtype))
    most = stored_within(wanted, have, half, have.dtype)
    worst.hold(wanted, have, most if slack is None else most + slack)
    return worst.region
