"""Tables as aligned text, by tabulate."""

from tabulate import tabulate


def aligned(rows, header) -> str:
    """rows: lists of strings, the name of a row first; header: as many. Names on the left, cells to the right."""
    columns = ("left", *("right" for _ in header[1:]))
    return tabulate(rows, header, tablefmt="plain", disable_numparse=True, colalign=columns)


def text_table(frame) -> str:
    """`aligned` of a pandas frame of strings; its columns' name, if they have one, stands over the names of rows."""
    rows = [[name, *cells] for name, cells in zip(frame.index, frame.to_numpy().tolist(), strict=True)]
    return aligned(rows, [frame.columns.name or "", *frame.columns])
