"""Tables as text, by pandas."""


def text_table(frame) -> str:
    """A frame of strings as aligned text: names of rows on the left, cells to the right, two spaces between columns."""
    widths = {column: 1 + max(len(column), *frame[column].str.len()) for column in frame}
    return frame.to_string(col_space=widths)
