"""A stretch of a file, read as if it were a file by itself."""

from __future__ import annotations

from convtool.formats.source import Source


class Part(Source):
    """Bytes of a file by position in a part of it.

    Attributes:
        start: of the part in the file.
    """

    def __init__(self, whole: Source, start: int, size: int) -> None:
        self.whole, self.start, self.size = whole, start, size
        self.path, self.seen = whole.path, whole.seen

    def read_into(self, buffer: memoryview, start: int) -> None:
        self.whole.read_into(buffer, self.start + start)

    def mapped(self, start: int, stop: int) -> memoryview:
        return self.whole.mapped(self.start + start, self.start + stop)
