"""What a verdict on two checkpoints rests on and covers, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from convtool.core.geometry import format_sizes
from convtool.core.names import grouped
from convtool.core.tree import leaves
from convtool.core.verify import EquivalenceReport
from convtool.fusing.compare import Pairing

Results = Sequence[tuple[Pairing, EquivalenceReport]]


def assumed(pairings: Sequence[Pairing]) -> tuple[str, ...]:
    """Return what the layers rest on that nobody stated."""
    layers = [leaf for pairing in pairings for leaf in leaves(pairing.before)]
    # A recorded layer rests on what is said of those that it is made of.
    layers += [leaf for pairing in pairings if not pairing.path for leaf in leaves(pairing.after)]
    return tuple(grouped(one for leaf in layers for one in leaf.assumptions()))


def statement(results: Results, exhaustive: bool, sizes: bool, only: bool) -> str:
    """Return what was shown, apart from the verdict.

    Args:
        sizes: input sizes were given.
        only: nothing but the named layers was compared.
    """
    reports = [report for _, report in results]
    shown = _shown(exhaustive) if reports else ""
    shown += _unread(reports) + ("" if sizes else _narrowed(results)) + _allowed(results)
    return f"{shown}; of the layers named alone" if only else shown


def _shown(exhaustive: bool) -> str:
    run = "every basis vector run: this holds for all inputs of these sizes"
    return run if exhaustive else "each number compared, and random inputs run"


def _unread(reports: list[EquivalenceReport]) -> str:
    """Return what is said of taps that no output reads at the sizes that were run."""
    taps = [report.taps for report in reports]
    read, of = sum(read for read, _ in taps), sum(of for _, of in taps)
    return "" if read == of else f"; {read} of {of} taps are read at these sizes, and nothing is said of the others"


def _allowed(results: Results) -> str:
    """Return the roundings in between that the record claims, and that the bound makes room for."""
    counts = Counter(dtype for pairing, _ in results for dtype in pairing.dtypes)
    said = [f"{count} to {dtype}" for dtype, count in sorted(counts.items()) if dtype != "float64"]
    return f"; allowing for roundings in between, as AFTER records: {', '.join(said)}" if said else ""


def claims(results: Results) -> tuple[str, ...]:
    """Return what AFTER's record says of BEFORE's layers that BEFORE's tensors don't."""
    return tuple(grouped(claim for pairing, _ in results for claim in pairing.claims))


def _narrowed(results: Results) -> str:
    """Return what is said of one input size only, since the record knows of no other."""
    said = {pairing.name: size for pairing, _ in results if (size := pairing.input_size()) is not None}
    if not said:
        return ""
    which = "" if len(said) == len({pairing.name for pairing, _ in results}) else f"{', '.join(said)} "
    at = " or ".join(dict.fromkeys(map(format_sizes, said.values())))
    run = [report.input_size[1:] for pairing, report in results if pairing.name in said]
    smaller = dict.fromkeys(format_sizes(size) for size in run if size not in said.values())
    alike = f", run at {' or '.join(smaller)}, where the borders are the same" if smaller else ""
    return f"; {which}at input size {at} only, as the record says{alike}"


def hints(results: Results, sizes: bool, computed_in: bool) -> list[str]:
    """Return what the record knows of a layer that differs: that it was made for other sizes, or rounded in between.

    Args:
        sizes, computed_in: that these were given.
    """
    lines = []
    for pairing in {id(pairing): pairing for pairing, report in results if not report.equivalent}.values():
        said = " and ".join(dict.fromkeys(format_sizes(size) for _, size in pairing.sizes))
        if sizes and said:
            lines.append(f"{pairing.name}: by the record it was fused for input size {said} only")
        between = sorted(set(pairing.dtypes) - {"float64"})
        if between and not computed_in:
            lines.append(
                f"{pairing.name}: was fused in steps and stored in {' and '.join(between)} in between, for which one"
                " rounding each is allowed, and no underflow: verify each step by itself"
            )
    return lines
