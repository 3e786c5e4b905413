"""An event with a hole in it gives the bytes of the event written out."""

import json

from hypothesis import given
from hypothesis import strategies as st

from moesaic.serve.http import sse


@given(text=st.text(), name=st.text())
def test_a_template_is_the_event(text: str, name: str) -> None:
    def event(words: str) -> dict[str, object]:
        return {"id": "x", "model": name, "choices": [{"index": 3, "text": words, "logprobs": None}]}

    found = sse.Template(event(sse.Template.hole)).of(text)
    assert found == sse.data(event(text))
    assert json.loads(found.removeprefix(b"data: ")) == event(text)
