"""The lines of an event stream: the same in whatever portions they arrive, and none longer than the limit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkserve.server.remote_stream import EventLines
from thinkserve.server.remote_wire import Malformed


@given(st.data())
def test_lines_are_the_same_however_they_are_cut(data: st.DataObject) -> None:
    """Portions of any size and both line ends; comments and other fields give nothing."""
    ends = data.draw(st.sampled_from([b"\n", b"\r\n"]))
    content = b': hi\n\ndata: {"a": 1}\n\nevent: x\ndata:{}\n\ndata: [DONE]\n\n'.replace(b"\n", ends)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)))))
    lines, found = EventLines(100), list[bytes]()
    for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
        found += lines.push(content[start:end])

    assert [b'{"a": 1}', b"{}", b"[DONE]"] == found


def test_a_line_that_does_not_end_is_not_kept() -> None:
    """The limit holds for what is still growing."""
    lines = EventLines(100)
    lines.push(b"data: " + b"x" * 90)
    with pytest.raises(Malformed):
        lines.push(b"x" * 10)
