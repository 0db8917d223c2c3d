from collections import Counter

import pytest

from safelight.errors import SafelightError
from safelight.prompt.dynamic import draw
from safelight.prompt.styles import apply_styles, read_styles


def drawn(text, seeds=400, **how):
    return Counter(draw([text], seed, **how)[0] for seed in range(seeds))


def test_choices_are_drawn_with_the_seed():
    assert draw(["{a|b|c} {d|e}"], 7) == draw(["{a|b|c} {d|e}"], 7)
    assert set(drawn("a {red|blue|} cat")) == {"a red cat", "a blue cat", "a  cat"}
    assert set(drawn("{a|{b|c}}")) == {"a", "b", "c"}
    heavy = drawn("{9::a|1::b}")
    assert heavy["a"] > 6 * heavy["b"] > 0


def test_counts_and_separators():
    two = drawn("{2$$a|b|c}")
    assert set(two) == {f"{x}, {y}" for x in "abc" for y in "abc" if x != y}
    assert set(drawn("{1-2$$ and $$a|b}")) == {"a", "b", "a and b", "b and a"}
    assert draw(["{5$$a}"], 0) == ["a"]


@pytest.mark.parametrize("text", ["{a", "a}", "a|b", "plain", "a_b __ c", "", "{a|b {"])
def test_what_has_no_partner_is_text(text):
    assert draw([text], 1) == [text]


def test_escaped_braces_are_text():
    assert draw([r"\{a\|b\}"], 1) == ["{a|b}"]


def test_wildcards(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "animal.txt").write_text("# animals\ncat\n\n{big|small} dog\n")
    (tmp_path / "sub/of.txt").write_text("a __animal__\n")
    (tmp_path / "loop.txt").write_text("__loop__ __loop__\n")
    (tmp_path / "empty.txt").write_text("# none\n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    (tmp_path.parent / "outside.txt").write_text("secret")
    assert set(drawn("__animal__", wildcards=tmp_path)) == {"cat", "big dog", "small dog"}
    assert "a cat" in drawn("__sub/of__", wildcards=tmp_path)
    for text, said in (
        ("__bird__", "there are: animal"),
        ("__loop__", "20 deep"),
        ("__empty__", "no lines"),
        ("__latin__", "wildcard latin.txt is not UTF-8: save it as UTF-8"),
    ):
        with pytest.raises(SafelightError, match=said):
            draw([text], 1, tmp_path)
    with pytest.raises(SafelightError, match="--wildcards"):
        draw(["__animal__"], 1)
    # No name leads out of the folder: it is no wildcard, or its file is not in there.
    assert draw(["__../outside__"], 1, tmp_path) == ["__../outside__"]
    (tmp_path / "link.txt").symlink_to(tmp_path.parent / "outside.txt")
    with pytest.raises(SafelightError, match="no wildcard"):
        draw(["__link__"], 1, tmp_path)


def test_nesting_and_growth_are_bounded(tmp_path):
    with pytest.raises(SafelightError, match="20 deep"):
        draw(["{" * 5000 + "a" + "}" * 5000], 1)
    (tmp_path / "long.txt").write_text("a" * 9000)
    with pytest.raises(SafelightError, match="16 KiB"):
        draw(["__long__ __long__"], 1, tmp_path)


def test_styles(tmp_path):
    file = tmp_path / "styles.csv"
    file.write_text(
        'name,prompt,negative_prompt\nphoto,"photo of {prompt}, 35mm",blurry\ninky,ink,\n',
        encoding="utf-8-sig",
    )
    styles = read_styles(file)
    assert apply_styles(styles, ["photo", "inky"], "a cat", "") == (
        "photo of a cat, 35mm, ink",
        "blurry",
    )
    with pytest.raises(SafelightError, match="did you mean 'photo'"):
        apply_styles(styles, ["foto"], "a", "")
    with pytest.raises(SafelightError, match="cannot be read"):
        read_styles(tmp_path / "none.csv")
    file.write_text("a,b\n1,2\n")
    with pytest.raises(SafelightError, match="name,prompt,negative_prompt"):
        read_styles(file)
