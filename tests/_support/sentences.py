"""What every error says: what was expected and what came; what to do."""

import pytest


def raises_one_sentence(case):
    """`case` is a call, the kind of its error, and a pattern of its message."""
    call, kind, text = case
    with pytest.raises(kind, match=text) as caught:
        call()
    message = str(caught.value)
    assert message[0].islower()
    assert message.endswith((".", "?"))
    assert "; " in message
    assert "\n" not in message
