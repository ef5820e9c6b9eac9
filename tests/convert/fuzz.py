"""Files damaged at random, and such as try to run something."""

from hypothesis import strategies as st


class Call:
    """Pickles as the call `function(*arguments)`, as a hostile file does, with a state if given."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def altered(data: st.DataObject, content: bytes, first: int | None = None) -> bytes:
    """`content` with 1 to 4 bytes changed, of the `first` ones if given, and perhaps cut."""
    changed = bytearray(content)
    end = min(first or len(content), len(content)) - 1
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, end))] = data.draw(st.integers(0, 255))
    return bytes(changed[: data.draw(st.sampled_from([len(content), len(content) // 2, 20]))])
