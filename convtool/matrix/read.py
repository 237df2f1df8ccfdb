"""Reading matrix files: mapped where the format allows, so that a matrix larger than memory can be gone through.

`open_matrix` reads what the formats of this package write, and what scipy, numpy and torch write in the same formats.
What was read from a file is checked when it is handed out: an index that is out of range would make the libraries that
it is handed to read memory that isn't theirs.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from convtool.core.toeplitz import BLOCK_ENTRIES, CsrBlock
from convtool.errors import InputError, RefusedError, UsageError
from convtool.matrix import FORMATS
from convtool.matrix.contents import RECORD_NAME, Layout
from convtool.matrix.reading import ARRAYS

if TYPE_CHECKING:
    import scipy.sparse

Kind: TypeAlias = Literal["torch", "scipy"]

INDEX_SUFFIX = ".safetensors.index.json"  # of a matrix in shards

_SEARCHED = 1 << 20  # row numbers of a coo file looked at together


@dataclass(frozen=True, slots=True, eq=False)
class MatrixFile:
    """A matrix in a file, read as far as it is asked for.

    Attributes:
        path: the file.
        layout: csr, coo or dense.
        shape: (rows, columns).
        arrays: the file's arrays by their names in `ARRAYS`, mapped into memory where the format allows. Not checked:
            `rows` and what is built on it hand out what is.
        bias: (outputs,) the vector stored beside the matrix, or None.
        record: what convtool noted when it wrote the file, or None.
    """

    path: Path
    layout: Layout
    shape: tuple[int, int]
    arrays: Mapping[str, Tensor]
    bias: Tensor | None
    record: dict[str, Any] | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.arrays[ARRAYS[self.layout][-1]].dtype

    @property
    def nnz(self) -> int:
        """Stored entries; all of them where dense."""
        return self.arrays[ARRAYS[self.layout][-1]].numel()

    def blocks(self, entries: int = BLOCK_ENTRIES) -> Iterator[tuple[int, int]]:
        """Ranges of rows that cover the matrix in order, each of about `entries` entries (one row at least)."""
        rows, columns = self.shape
        if self.layout == "csr":
            # As many rows as hold that many entries on average, fewer where they turn out to hold more.
            step = max(1, entries * rows // max(1, self.nnz))
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                yield from _split(self._starts(start, stop), start, entries)
            return
        width = columns if self.layout == "dense" else max(1, self.nnz // max(1, rows))
        step = max(1, entries // max(1, width))
        yield from ((start, min(start + step, rows)) for start in range(0, rows, step))

    def rows(self, start: int, stop: int) -> CsrBlock:
        """Rows start:stop in CSR form, checked. Columns stand as in the file: sorted and unique where it is convtool's.

        Raises:
            UsageError: rows that the matrix doesn't have.
            InputError: the file is damaged.
        """
        if not 0 <= start <= stop <= self.shape[0]:
            raise UsageError(f"rows: expected 0 <= A <= B <= {self.shape[0]}, got {start}:{stop}")
        if self.layout == "dense":
            return self._dense_rows(start, stop)
        if self.layout == "coo":
            counts, part = self._coo_rows(start, stop)
            columns = self.arrays["col"][part]
        else:
            starts = self._starts(start, stop)
            counts, part = starts[1:] - starts[:-1], slice(int(starts[0]), int(starts[-1]))
            columns = self.arrays["indices"][part]
        if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < self.shape[1]:
            raise self._damaged(f"rows {start}:{stop} name columns that the matrix doesn't have")
        return CsrBlock(counts, columns, self.arrays["data"][part])

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Rows start:stop as a dense (stop - start, columns) tensor; entries at the same place are summed."""
        if self.layout == "dense":
            block = self.arrays["weight"][start:stop]
            return block.clone()
        counts, columns, values = self.rows(start, stop)
        out = torch.zeros(stop - start, self.shape[1], dtype=self.dtype)
        row = torch.repeat_interleave(torch.arange(stop - start), counts)
        out.index_put_((row, columns.long()), values, accumulate=True)
        return out

    def product(self, x: Tensor, *, absolute: bool = False) -> Tensor:
        """The matrix times x, (columns, n), in x's dtype and block by block.

        Args:
            absolute: of the magnitudes of the values instead, for bounds on rounding errors.

        Returns:
            (rows, n)
        """
        if x.dim() != 2 or x.shape[0] != self.shape[1]:
            raise UsageError(f"expected x of shape ({self.shape[1]}, n), got {tuple(x.shape)}")
        out = torch.empty(self.shape[0], x.shape[1], dtype=x.dtype)
        for start, stop in self.blocks():
            if self.layout == "dense":
                block = self.arrays["weight"][start:stop].to(x.dtype)
                out[start:stop] = (block.abs() if absolute else block) @ x
                continue
            counts, columns, values = self.rows(start, stop)
            starts = torch.zeros(len(counts) + 1, dtype=torch.int64)
            torch.cumsum(counts, 0, out=starts[1:])
            values = values.to(x.dtype)
            out[start:stop] = _csr_times(starts, columns, values.abs() if absolute else values, x)
        return out

    def to_torch(self) -> Tensor:
        """The matrix as torch has it: sparse CSR, sparse COO or dense, as in the file, over its mapped arrays.

        Raises:
            InputError: the file is damaged.
        """
        if self.layout == "dense":
            return self.arrays["weight"]
        self._check()
        if self.layout == "coo":
            indices = torch.stack([self.arrays["row"].long(), self.arrays["col"].long()])
            return torch.sparse_coo_tensor(indices, self.arrays["data"], self.shape, check_invariants=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                self.arrays["indptr"], self.arrays["indices"], self.arrays["data"], self.shape, check_invariants=False
            )

    def to_scipy(self) -> scipy.sparse.csr_array[Any] | scipy.sparse.coo_array[Any]:
        """The matrix as a scipy csr_array or coo_array over its mapped arrays; a dense one becomes a csr_array.

        Raises:
            UsageError: scipy isn't installed.
            RefusedError: a dtype that scipy doesn't have.
            InputError: the file is damaged.
        """
        try:
            import scipy.sparse
        except ImportError:
            raise UsageError("a scipy matrix needs scipy: pip install 'convtool[scipy]'") from None
        if self.dtype.is_floating_point and self.dtype.itemsize < 4:
            name = str(self.dtype).removeprefix("torch.")
            raise RefusedError(f"{self.path}: scipy has no sparse matrices of {name}; load it as torch's")
        if self.layout == "dense":
            return scipy.sparse.csr_array(self.arrays["weight"].numpy())
        self._check()
        arrays = [self.arrays[name].numpy() for name in ARRAYS[self.layout]]
        if self.layout == "coo":
            return scipy.sparse.coo_array((arrays[2], (arrays[0], arrays[1])), shape=self.shape)
        return scipy.sparse.csr_array((arrays[2], arrays[1], arrays[0]), shape=self.shape)

    def _check(self) -> None:
        for start, stop in self.blocks():
            self.rows(start, stop)

    def _starts(self, start: int, stop: int) -> Tensor:
        """(stop - start + 1,) int64: where the rows begin, and where the last one ends."""
        starts = self.arrays["indptr"][start : stop + 1].long()
        ends = (start == 0 and int(starts[0]) != 0) or (stop == self.shape[0] and int(starts[-1]) != self.nnz)
        if ends or int(starts[0]) < 0 or int(starts[-1]) > self.nnz or bool((starts[1:] < starts[:-1]).any()):
            raise self._damaged(f"the starts of rows {start}:{stop} don't ascend from 0 to the number of entries")
        return starts

    def _coo_rows(self, start: int, stop: int) -> tuple[Tensor, slice]:
        """The entries in each of the rows, and where they stand."""
        row = self.arrays["row"]
        bounds = torch.tensor([start, stop], dtype=row.dtype)
        first, last = torch.searchsorted(row, bounds).tolist()
        part = row[first:last].long() - start
        if part.numel() and not 0 <= int(part.min()) <= int(part.max()) < stop - start:
            raise self._damaged("the entries don't stand in the order of their rows")
        return torch.bincount(part, minlength=stop - start), slice(first, last)

    def _dense_rows(self, start: int, stop: int) -> CsrBlock:
        block = self.arrays["weight"][start:stop]
        row, column = block.nonzero(as_tuple=True)
        return CsrBlock(torch.bincount(row, minlength=stop - start), column, block[row, column])

    def _damaged(self, how: str) -> InputError:
        return InputError(f"{self.path}: the matrix is damaged: {how}")


@dataclass(frozen=True, slots=True, eq=False)
class ShardedMatrix(MatrixFile):
    """A matrix whose rows are in several files; see `convtool.matrix.shards`."""

    shards: tuple[MatrixFile, ...] = ()
    ends: tuple[int, ...] = ()  # behind the last row of each shard

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.shards[0].dtype

    @property
    def nnz(self) -> int:
        """Stored entries of all shards."""
        return sum(shard.nnz for shard in self.shards)

    def blocks(self, entries: int = BLOCK_ENTRIES) -> Iterator[tuple[int, int]]:
        """Ranges of rows that cover the matrix in order; none reaches over the end of a shard."""
        for shard, end in zip(self.shards, self.ends, strict=True):
            first = end - shard.shape[0]
            yield from ((first + start, first + stop) for start, stop in shard.blocks(entries))

    def rows(self, start: int, stop: int) -> CsrBlock:
        """Rows start:stop in CSR form, checked."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise UsageError(f"rows: expected 0 <= A <= B <= {self.shape[0]}, got {start}:{stop}")
        parts = [shard.rows(a, b) for shard, a, b in self._parts(start, stop)]
        return parts[0] if len(parts) == 1 else CsrBlock(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Rows start:stop as a dense tensor."""
        return torch.cat([shard.dense_rows(a, b) for shard, a, b in self._parts(start, stop)])

    def product(self, x: Tensor, *, absolute: bool = False) -> Tensor:
        """The matrix times x, shard by shard."""
        return torch.cat([shard.product(x, absolute=absolute) for shard in self.shards])

    def to_torch(self) -> Tensor:
        """The matrix in memory: the shards don't lie beside one another, so nothing is mapped."""
        return self._whole().to_torch()

    def to_scipy(self) -> scipy.sparse.csr_array[Any] | scipy.sparse.coo_array[Any]:
        """The matrix in memory, as scipy has it."""
        return self._whole().to_scipy()

    def _whole(self) -> MatrixFile:
        if self.layout == "dense":
            arrays = {"weight": self.dense_rows(0, self.shape[0])}
        else:
            counts, columns, values = self.rows(0, self.shape[0])
            starts = torch.zeros(len(counts) + 1, dtype=columns.dtype if len(columns) < 2**31 else torch.int64)
            torch.cumsum(counts, 0, out=starts[1:])
            arrays = {"indptr": starts, "indices": columns.to(starts.dtype), "data": values}
        layout: Layout = "dense" if self.layout == "dense" else "csr"
        return MatrixFile(self.path, layout, self.shape, arrays, self.bias, self.record)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[MatrixFile, int, int]]:
        """The shards that rows start:stop are in, and which of their rows these are; one at least."""
        for shard, end in zip(self.shards, self.ends, strict=True):
            first = end - shard.shape[0]
            if max(start, first) < min(stop, end):
                yield shard, max(start, first) - first, min(stop, end) - first
        if start == stop:
            yield self.shards[0], 0, 0


def open_matrix(path: str | Path) -> MatrixFile:
    """Open a matrix file: .npz, .npy, .mtx, .safetensors or .pt, or the index of one in shards.

    .safetensors, .npy, .pt and what isn't deflated in .npz is mapped into memory; .mtx is read whole.
    The checksums of .npz and .pt are checked, which reads the file once.

    Raises:
        InputError: the file is missing, damaged, or holds no matrix.
        UsageError: a suffix of none of these.
    """
    path = Path(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _open_index(path)
    if path.suffix not in FORMATS:
        raise UsageError(f"{path}: expected a matrix file, a name that ends in {', '.join(FORMATS)}")
    try:
        if not path.is_file():
            raise InputError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
        return _checked(path, *FORMATS[path.suffix].read(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def is_matrix_file(path: str | Path) -> bool:
    """Whether the file is a matrix and not a checkpoint, as far as its suffix, its record or its arrays' names tell.

    A dense matrix in .safetensors or .pt is a checkpoint as well, of one linear layer; the record makes the difference.
    False where the file cannot be read: what is wrong with it is for its reader to say.
    """
    path = Path(path)
    if path.suffix in (".npz", ".npy", ".mtx"):
        return True
    try:
        if path.name.endswith(INDEX_SUFFIX):
            return "shards" in json.loads(path.read_bytes())
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="np") as opened:
                names = set(opened.keys())
                return RECORD_NAME in (opened.metadata() or {}) or set(ARRAYS["csr"]) <= names
        if path.suffix == ".pt" and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith(f"/extra/{RECORD_NAME}.json") for name in archive.namelist())
    except Exception:  # a damaged file may raise anything
        return False
    return False


def load_matrix(path: str | Path, kind: Kind = "torch") -> Any:
    """The matrix in a file, as torch or scipy has it; see `open_matrix` for its bias, its record, and parts of it.

    Args:
        path: a .npz, .npy, .mtx, .safetensors or .pt file.
        kind: "torch" for a sparse CSR, sparse COO or dense tensor, as the file has it; "scipy" for a csr_array or
            coo_array. Both stand on the mapped file where the format allows (.safetensors always).

    Raises:
        InputError: the file is missing, damaged, or holds no matrix.
        UsageError: another kind of file, or scipy is needed and not installed.
        RefusedError: scipy doesn't have that dtype.
    """
    if kind not in ("torch", "scipy"):
        raise UsageError(f"kind: expected 'torch' or 'scipy', got {kind!r}")
    opened = open_matrix(path)
    return opened.to_scipy() if kind == "scipy" else opened.to_torch()


def _open_index(path: Path) -> ShardedMatrix:
    try:
        index = json.loads(path.read_bytes())
        shape = (int(index["shape"][0]), int(index["shape"][1]))
        named = [(str(one["file"]), int(one["rows"][0]), int(one["rows"][1])) for one in index["shards"]]
        record = index.get(RECORD_NAME)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; without its index a matrix in shards isn't whole") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, AttributeError):
        raise InputError(f"{path}: isn't the index of a matrix in shards, or is damaged") from None
    shards = []
    end = 0
    for name, first, last in named:
        if Path(name).name != name:
            raise InputError(f"{path}: names {name!r}, which isn't a file beside it")
        shard = open_matrix(path.with_name(name))
        if (first, last) != (end, end + shard.shape[0]) or shard.shape[1] != shape[1]:
            raise InputError(f"{path}: {name} isn't rows {first}:{last} of a matrix of shape {shape}")
        end = last
        shards.append(shard)
    if end != shape[0] or len({(shard.layout, shard.dtype) for shard in shards}) != 1:
        raise InputError(f"{path}: the shards it names aren't the whole of a matrix of shape {shape}")
    noted = record if isinstance(record, dict) else None
    biases = [shard.bias for shard in shards if shard.bias is not None]
    bias = (
        biases[0] if biases and noted is not None and noted.get("transpose") else torch.cat(biases) if biases else None
    )
    ends = tuple(last for _, _, last in named)
    return ShardedMatrix(path, shards[0].layout, shape, {}, bias, noted, tuple(shards), ends)


def _checked(path: Path, arrays: dict[str, Tensor], record: str | None) -> MatrixFile:
    """What a reader found as a matrix, as far as that can be said without going through it."""
    layout = next((layout for layout, names in ARRAYS.items() if set(names) <= set(arrays)), None)
    if layout is None:
        wanted = "; or ".join(f"{', '.join(names)} ({layout})" for layout, names in ARRAYS.items())
        found = ", ".join(sorted(arrays)) or "none"
        raise InputError(f"{path}: holds no matrix: expected arrays {wanted}; got {found}")
    parts = {name: arrays[name] for name in ARRAYS[layout]}
    values = parts[ARRAYS[layout][-1]]
    if layout == "dense":
        if values.dim() != 2:
            raise InputError(f"{path}: holds no matrix: expected an array of 2 axes, got shape {tuple(values.shape)}")
        shape = (values.shape[0], values.shape[1])
    else:
        shape = _shape(path, arrays.get("shape"))
        lengths = [len(part) if part.dim() == 1 else -1 for part in parts.values()]
        wanted_lengths = [shape[0] + 1 if layout == "csr" else len(values), len(values), len(values)]
        if values.dim() != 1 or lengths != wanted_lengths:
            raise InputError(
                f"{path}: the matrix is damaged: {', '.join(parts)} of lengths {lengths} don't make"
                f" a {layout} matrix of shape {shape}"
            )
        for name in ARRAYS[layout][:2]:
            if parts[name].dtype not in (torch.int32, torch.int64):
                raise InputError(f"{path}: {name}: expected int32 or int64, got {parts[name].dtype}")
    if layout == "coo":
        parts = _in_order(parts)
        row = parts["row"]
        if len(row) and not 0 <= int(row[0]) <= int(row[-1]) < shape[0]:
            raise InputError(f"{path}: the matrix is damaged: entries name rows that it doesn't have")
    try:
        noted = None if record is None else json.loads(record)
    except (ValueError, RecursionError):
        raise InputError(f"{path}: the record of what was done is not JSON") from None
    return MatrixFile(path, layout, shape, parts, arrays.get("bias"), noted if isinstance(noted, dict) else None)


def _shape(path: Path, stored: Tensor | None) -> tuple[int, int]:
    if stored is None or stored.shape != (2,) or int(stored.min()) < 0:
        raise InputError(f"{path}: holds no sparse matrix: expected a shape of 2 numbers")
    return int(stored[0]), int(stored[1])


def _in_order(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """A coo matrix's arrays in the order of its rows, as convtool writes them; others are brought into it."""
    row = parts["row"]
    steps = range(0, len(row), _SEARCHED)
    if all(bool((row[at : at + _SEARCHED + 1].diff() >= 0).all()) for at in steps):
        return parts
    order = torch.argsort(row, stable=True)
    return {name: part[order] for name, part in parts.items()}


def _split(starts: Tensor, first: int, entries: int) -> Iterator[tuple[int, int]]:
    """Rows first:first + len(starts) - 1 cut so that none but a single row has more than `entries` entries."""
    begin, rows = 0, len(starts) - 1
    while begin < rows:
        end = int(torch.searchsorted(starts, int(starts[begin]) + entries, right=True)) - 1
        end = min(max(end, begin + 1), rows)
        yield first + begin, first + end
        begin = end


def _csr_times(starts: Tensor, columns: Tensor, values: Tensor, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        block = torch.sparse_csr_tensor(
            starts, columns.long(), values, (len(starts) - 1, x.shape[0]), check_invariants=False
        )
        return block @ x
