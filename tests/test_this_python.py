"""What this Python has to have, and says where it hasn't: the readers rest on private names of the library."""

from __future__ import annotations

import pickle

import pytest

NEEDED = {
    "_Unpickler": ("dispatch", "load", "pop_mark", "find_class", "persistent_load", "_instantiate", "_decode_string"),
    "_Pickler": ("dispatch", "dump", "save", "memoize", "get"),
}


@pytest.mark.parametrize("name", NEEDED)
def test_the_pickle_machine_in_python_is_there(name: str) -> None:
    machine = getattr(pickle, name, None)
    assert machine is not None, f"this Python's pickle module has no {name}, of which convtool's own is a kind"
    lacking = [part for part in NEEDED[name] if not hasattr(machine, part)]
    assert not lacking, f"this Python's pickle.{name} lacks {', '.join(lacking)}, which convtool's own takes over"
    assert isinstance(machine.dispatch, dict), f"this Python's pickle.{name} finds what to do in another way"
