"""The record beside a torch file, which has no room for one: OUT.convtool.json, with a mark of the file it is of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from convtool.checkpoint.record import Record, loads
from convtool.errors import ConvtoolError, InputError, OutputError
from convtool.formats.atomic import check_target, discard, replacing
from convtool.formats.source import Source
from convtool.formats.torch_zip import Contents, read_contents

RECORD_SUFFIX = ".convtool.json"


def record_path(path: Path) -> Path:
    """Where the record of a torch file stands."""
    return path.with_name(path.name + RECORD_SUFFIX)


def record_and_mark(path: Path) -> tuple[str, Record] | None:
    """The mark of the torch file at `path` and its record, where it has one that can be read."""
    try:
        mark = mark_of_contents(read_contents(Source(path)))
        beside = record_path(path)
        return mark, record_of(beside.read_text(encoding="utf-8"), mark, beside, path)
    except (ConvtoolError, OSError, UnicodeDecodeError):
        return None


def mark_of(path: Path) -> str | None:
    """The mark of the torch file at `path`, where there is one that can be read."""
    try:
        return mark_of_contents(read_contents(Source(path)))
    except ConvtoolError:
        return None


def mark_of_contents(contents: Contents) -> str:
    """A hash of a torch file's table of contents, checksums included."""
    return hashlib.sha256(contents.mark).hexdigest()


def record_size(record: Record | None) -> int:
    """The bytes that the file of a record takes; 0 without one."""
    any_mark = "0" * hashlib.sha256().digest_size * 2
    return 0 if record is None else len(record_text({any_mark: record}))


def record_text(records: Mapping[str, Record]) -> bytes:
    """Records of files by their marks, as the file beside a torch file holds them, indented for people.

    There are two while the file that the record stands beside is replaced, and one before and after.
    """
    files = [{"mark": mark, **json.loads(record.dumps())} for mark, record in records.items()]
    document = files[0] if len(files) == 1 else {"files": files}
    return (json.dumps(document, indent=2) + "\n").encode()


def record_of(text: str, mark: str, path: Path, checkpoint: Path) -> Record:
    """The record of the file of that mark.

    Raises:
        InputError: it is damaged, or of another file.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its convtool record is damaged ({type(error).__name__}: {error})") from None
    files = document.get("files", [document]) if isinstance(document, dict) else [document]
    for one in files if isinstance(files, list) else []:
        if isinstance(one, dict) and one.get("mark", mark) == mark:
            return loads(json.dumps(one), str(path))
    if isinstance(document, dict) and all(isinstance(one, dict) for one in files):
        raise InputError(
            f"{path}: is the record of another file than {checkpoint.name}, which was written anew since; delete it, or"
            " restore the file"
        )
    raise InputError(f"{path}: its convtool record is damaged (expected a table)")


class RecordBeside:
    """The record beside a torch file, replaced so that the file that is there always has its own.

    The new record is there before the file takes its name, together with that of the file that is replaced; that one
    goes once the file has.
    """

    def __init__(self, path: Path, record: Record | None) -> None:
        self.checkpoint = path
        self.path = record_path(path)
        self.record = record
        try:
            self.old = self.path.read_bytes() if check_target(self.path, force=True).exists() else None
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        self.before = record_and_mark(path) if self.old is not None else None
        self.mark = ""
        self.prepared = False

    def prepare(self, mark: str) -> None:
        self.mark = mark
        if self.record is None:
            return
        records = {mark: self.record}
        if self.before is not None:
            records.setdefault(*self.before)
        self.prepared = True
        self._write(record_text(records))

    def undo(self) -> None:
        """Put back what was there; where the file has taken its name already, the new record is its own and stays."""
        if not self.prepared:
            return
        if mark_of(self.checkpoint) == self.mark:
            self.finish()
        elif self.old is None:
            discard(self.path)
        else:
            self._write(self.old)

    def finish(self) -> None:
        if self.record is None:
            discard(self.path)
        elif self.before is not None:
            self._write(record_text({self.mark: self.record}))

    def _write(self, text: bytes) -> None:
        with replacing(self.path, force=True) as file:
            file.write(text)
