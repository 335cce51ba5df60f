"""What a message may hold."""

import pytest

from tl_jax.errors import is_text, printable


def test_what_steers_a_terminal_is_escaped():
    assert printable("a\x1b[31mb\n\x9b\u2028\u202e\ud800") == r"a\x1b[31mb\n\x9b\u2028\u202e\ud800"
    plain = "Zoë Käfer 猫 🐱 a\u00a0b می\u200cخواهم"
    assert printable(plain) == plain


@pytest.mark.parametrize(("name", "expected"), [("Zoë", True), ("a\udcff", False)])
def test_names_of_other_bytes_than_utf8(name, expected):
    assert is_text(name) is expected
