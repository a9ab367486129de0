"""Cutting sorted lengths into groups that are worth padding to one length."""

from collections.abc import Sequence


def group_by_length(lengths: Sequence[int], max_padding: float = 0.0) -> list[slice]:
    """Cut ascending ``lengths`` into runs in which padding takes at most a share of the cells.

    Args:
        lengths: In ascending order; padding a run brings each text to the run's last length.
        max_padding: Share of a run's cells that may be padding, 0 to 1; 0 gives equal lengths.
    """
    groups: list[slice] = []
    start = tokens = 0
    for index, length in enumerate(lengths):
        cells = (index + 1 - start) * length
        if index > start and cells - tokens - length > max_padding * cells:
            groups.append(slice(start, index))
            start, tokens = index, 0
        tokens += length
    if lengths:
        groups.append(slice(start, len(lengths)))
    return groups
