from pipeline.measure.visible import all_visible, visible


def test_control_characters_become_their_escapes_and_all_else_stays() -> None:
    assert visible("Evil\x1b]0;owned\x07\x9b2J\n") == r"Evil\x1b]0;owned\x07\x9b2J\n"
    assert visible("a\u202eb\u2028c") == r"a\u202eb\u2028c"
    assert visible("model.layers.3 é 漢 – \\x1b") == "model.layers.3 é 漢 – \\x1b"


def test_every_text_of_a_value_is_made_visible_keys_among_them() -> None:
    assert all_visible({"\x1b": ["\x07", 1, None, {"a": "\x00"}]}) == {r"\x1b": [r"\x07", 1, None, {"a": r"\x00"}]}
    assert all_visible(("\x1b", 2.5)) == (r"\x1b", 2.5)
