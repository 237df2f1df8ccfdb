"""The record beside a torch file, which has no room for one: OUT.convtool.json, with a mark of the file it is of."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from convtool.errors import ConvtoolError, InputError, OutputError
from convtool.formats.atomic import check_target, discard, replacing
from convtool.formats.source import Source
from convtool.formats.torch_contents import Contents, read_contents

RECORD_SUFFIX = ".convtool.json"


def record_path(path: Path) -> Path:
    """Return where the record of a torch file stands."""
    return path.with_name(path.name + RECORD_SUFFIX)


def mark_of(contents: Contents) -> str:
    """Return a hash of a torch file's table of contents, checksums included."""
    return hashlib.sha256(contents.mark).hexdigest()


def record_size(record: str) -> int:
    """Return the bytes that the file of a record takes."""
    any_mark = "0" * hashlib.sha256().digest_size * 2
    return len(_text({any_mark: record}))


def _text(records: Mapping[str, str]) -> bytes:
    """Return records of files by their marks, as they stand in the file, indented for people.

    There are two while the file that the record stands beside is replaced, and one before and after.
    """
    files = [{"mark": mark, **json.loads(record)} for mark, record in records.items()]
    document = files[0] if len(files) == 1 else {"files": files}
    return (json.dumps(document, indent=2) + "\n").encode()


def read_record(checkpoint: Path, contents: Contents) -> str | None:
    """Return the record beside a torch file, as JSON; None where nothing stands there.

    Raises:
        InputError: it is damaged, or of another file.
    """
    path, mark = record_path(checkpoint), mark_of(contents)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its convtool record is damaged ({type(error).__name__}: {error})") from None
    files = document.get("files", [document]) if isinstance(document, dict) else [document]
    for one in files if isinstance(files, list) else []:
        if isinstance(one, dict) and one.get("mark", mark) == mark:
            return json.dumps(one)
    if isinstance(document, dict) and all(isinstance(one, dict) for one in files):
        raise InputError(
            f"{path}: is the record of another file than {checkpoint.name}, which was written anew since; delete it, or"
            " restore the file"
        )
    raise InputError(f"{path}: its convtool record is damaged (expected a table)")


@contextlib.contextmanager
def record_beside(checkpoint: Path, record: str | None) -> Iterator[Callable[[Contents], None]]:
    """Replace the record beside a torch file so that the file that is there always has its own.

    The new record is there before the file takes its name, together with that of the file that is replaced; that one
    goes once the file has.

    Yields:
        what is to be called with the new file's contents before it takes its name.
    """
    path = record_path(checkpoint)
    old, mark = _bytes_at(path), ""
    before = {} if old is None else _known(checkpoint)

    def prepare(contents: Contents) -> None:
        nonlocal mark
        mark = mark_of(contents)
        if record is not None:
            _write(path, _text({mark: record} | {other: text for other, text in before.items() if other != mark}))

    try:
        yield prepare
    except BaseException:
        if record is not None and mark:
            # Where the file has its name already, the new record is its own.
            _restore(path, _text({mark: record}) if _mark_at(checkpoint) == mark else old)
        raise
    if record is None:
        discard(path)
    elif before:  # else it stands there alone already
        _write(path, _text({mark: record}))


def _bytes_at(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if check_target(path, force=True).exists() else None
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _known(checkpoint: Path) -> dict[str, str]:
    """Return the record of the torch file that is there by its mark, where it has one that can be read."""
    try:
        contents = read_contents(Source(checkpoint))
        record = read_record(checkpoint, contents)
    except ConvtoolError:
        return {}
    return {} if record is None else {mark_of(contents): record}


def _mark_at(checkpoint: Path) -> str | None:
    """Return the mark of the torch file that is there, where there is one that can be read."""
    try:
        return mark_of(read_contents(Source(checkpoint)))
    except ConvtoolError:
        return None


def _restore(path: Path, text: bytes | None) -> None:
    if text is None:
        discard(path)
    else:
        _write(path, text)


def _write(path: Path, text: bytes) -> None:
    with replacing(path, force=True) as file:
        file.write(text)
