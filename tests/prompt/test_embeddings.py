"""Textual inversions in prompts, by each tool's rule, and the files that they come from."""

import copy
import json
import pickle
from base64 import b64encode
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from safelight.adapters.embedding import EmbeddingFile, Vectors, bundled, look_at
from safelight.adapters.embeddings import EmbeddingFinder
from safelight.adapters.learned import with_embeddings
from safelight.errors import SafelightError
from safelight.prompt.chunks import chunks_of
from safelight.prompt.dialects import read
from safelight.prompt.reading import Piece
from safelight.prompt.states import States
from safelight.request import Request
from safelight.weights.check import read_header
from safelight.weights.library import open_library
from tests.prompt import reference
from tests.prompt.reference import prompts

TEXT = (("tokenizer", "text_encoder"),)
SIZES = {"inkx": 1, "inkx-wash": 3, "bad-hands": 12, "moss stone": 8}
VECTORS = {
    name: torch.randn(size, 32, generator=torch.Generator().manual_seed(size)) * 0.3
    for name, size in SIZES.items()
}


def embedding(name, token, vectors):
    described = Vectors("", *vectors.shape)
    numbers = tuple(map(tuple, vectors.tolist()))
    return EmbeddingFile(name, token, (described,), Path(name), numbers=numbers)


@pytest.fixture(scope="module")
def learned(clip):
    """Our encoder and transformers' with the same embeddings, and the ids of each."""
    import transformers
    from diffusers.loaders import TextualInversionLoaderMixin

    embeddings = [embedding(name, None, vectors) for name, vectors in VECTORS.items()]
    parts = {"tokenizer": clip.tokenizer, "text_encoder": clip.encoder}
    ours = with_embeddings(parts, TEXT, embeddings)

    pipe: Any = type(
        "Pipe", (TextualInversionLoaderMixin,), {"components": {}, "hf_device_map": None}
    )()
    pipe.tokenizer = copy.deepcopy(clip.hf_tokenizer)
    pipe.text_encoder = transformers.CLIPTextModel(copy.deepcopy(clip.hf_encoder.config)).eval()
    pipe.text_encoder.load_state_dict(clip.hf_encoder.state_dict())
    for name, vectors in VECTORS.items():
        pipe.load_textual_inversion(vectors, token=name)
    return SimpleNamespace(
        tokenizer=ours["tokenizer"],
        encoder=ours["text_encoder"],
        named={one.name: list(one.ids) for one in ours["tokenizer"].learned},
        pipe=pipe,
    )


def states(learned, text, syntax):
    found = States(learned.tokenizer, lambda ids, seen: learned.encoder(ids, 0, seen), syntax)
    with torch.no_grad():
        [part] = read(text, syntax, steps=10).parts
        [states] = found.of_part(part)
    return states


def close(found, wanted):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max().item() <= 1e-5 * max(1.0, wanted.abs().max().item())


AROUND = ["({})", "({}:1.3)", "({}:0.6)", "{}"]


def test_a1111_finds_the_tokens_of_a_name(learned, clip):
    around = [
        *AROUND,
        "[{}]",
        "{} BREAK {}",
        "inkx {}",
        "inkx-wash, {}",
        "bad-hands {}",
        "Moss Stone",
    ]
    longest = 0
    for text in prompts(100, around, seed=4):
        wanted = reference.a1111_states(
            clip.hf_tokenizer, learned.pipe.text_encoder, [text], named=learned.named
        )
        found = states(learned, text, "a1111")
        close(found, wanted[0])
        longest = max(longest, found.shape[1] // 77)
    assert longest >= 3


def test_comfy_finds_marked_names(learned, clip):
    around = [
        *AROUND,
        "x embedding:inkx {}",
        "embedding:bad-hands, {}",
        "\nembedding:inkx-wash\t{}",
    ]
    longest = 0
    for text in prompts(100, around, seed=5):
        wanted = reference.comfy_states(
            clip.hf_tokenizer, learned.pipe.text_encoder, text, named=learned.named
        )
        found = states(learned, text, "comfy")
        close(found, wanted)
        longest = max(longest, found.shape[1] // 77)
    assert longest >= 3


def test_compel_expands_as_diffusers(learned):
    from compel import Compel

    class Manager:
        """Does as compel's own, which goes through a text that transformers 5 writes otherwise."""

        def expand_textual_inversion_token_ids_if_necessary(self, ids):
            names = {i: name for name, some in learned.named.items() for i in some[:1]}
            return [i for one in ids for i in learned.named.get(names.get(one), [one])]

    compel = Compel(
        learned.pipe.tokenizer,
        learned.pipe.text_encoder,
        textual_inversion_manager=Manager(),
        truncate_long_prompts=False,
    )
    for text in ("a (bad-hands)1.3 man, inkx", "(a moss stone)0.6 on moss", "inkx-wash lake " * 20):
        close(states(learned, text, "compel"), compel(text))


def ids_of(learned, text, syntax):
    chunks = chunks_of(learned.tokenizer, ((Piece(text),),), syntax)
    return [list(chunk.ids[1 : chunk.count + 1]) for chunk in chunks]


def test_an_embedding_that_does_not_fit_begins_a_chunk(learned):
    for syntax in ("a1111", "comfy"):
        mark = "embedding:" if syntax == "comfy" else ""
        text = "apple " * 73 + f"{mark}inkx-wash"
        if syntax == "comfy":  # ComfyUI cuts a piece of 8 tokens or more anywhere
            assert [len(ids) for ids in ids_of(learned, text, syntax)] == [73, 3]
        else:
            assert ids_of(learned, text, syntax)[1] == learned.named["inkx-wash"]


def test_an_embedding_of_more_vectors_than_a_chunk_is_refused_by_a1111(clip):
    parts = {"tokenizer": clip.tokenizer, "text_encoder": clip.encoder}
    ink = embedding("inkx", None, torch.zeros(76, 32))
    many = with_embeddings(parts, TEXT, [ink])
    with pytest.raises(SafelightError, match="76 vectors; a chunk has room for 75"):
        chunks_of(many["tokenizer"], ((Piece("inkx"),),), "a1111")
    assert len(chunks_of(many["tokenizer"], ((Piece("embedding:inkx"),),), "comfy")) == 2
    assert many["tokenizer"].encode("inkx").cut is not None


def test_names_in_comfy(learned):
    named = learned.named
    assert ids_of(learned, "embedding:inkx", "comfy") == [named["inkx"]]
    for said in (
        "embedding:inkx.pt",
        "embedding:styles/inkx",
        "embedding:inkx,",
        "embedding: inkx",
    ):
        assert ids_of(learned, said, "comfy")[0][:1] == named["inkx"], said
    assert ids_of(learned, "a embedding:inkx b", "comfy")[0][1:2] == named["inkx"]
    assert not set(ids_of(learned, "(x,embedding:inkx", "comfy")[0]) & set(named["inkx"])
    with pytest.raises(SafelightError, match="embedding:inc, and no such embedding is there: inkx"):
        ids_of(learned, "a embedding:inc b", "comfy")


def test_a_word_of_the_models_own_is_no_name_in_plain(clip):
    parts = {"tokenizer": clip.tokenizer, "text_encoder": clip.encoder}

    def learn(name, token):
        one = embedding(name, token, VECTORS["inkx"])
        return with_embeddings(parts, TEXT, [one])["tokenizer"]

    with pytest.raises(SafelightError, match="word of the model's own: rename its file"):
        learn("Cat", None).encode("a cat")
    assert 49408 in learn("cat", "<cat>").encode("a <cat>").ids
    assert 49408 not in learn("cat", "<cat>").encode("a cat in catalogues").ids
    assert ids_of(SimpleNamespace(tokenizer=learn("cat", None)), "a cat", "a1111")[0][1] == 49408
    again = [embedding(name, "<cat>", VECTORS["inkx"]) for name in ("cat", "dog")]
    both = with_embeddings(parts, TEXT, again)["tokenizer"]
    with pytest.raises(SafelightError, match="two embeddings are called '<cat>'"):
        both.encode("a cat")


def test_nothing_is_changed(clip, learned):
    before = copy.deepcopy(clip.encoder.state_dict())
    ids = torch.tensor([clip.tokenizer.encode("a red inkx-wash").ids])
    with torch.no_grad():
        alone = clip.encoder(ids)
        assert torch.equal(learned.encoder(ids), alone)
        learned.encoder(torch.tensor([learned.tokenizer.encode("a red inkx-wash").ids]))
        assert torch.equal(clip.encoder(ids), alone)
    assert clip.tokenizer.learned == ()
    assert clip.tokenizer.encode("a red inkx-wash").ids == ids[0].tolist()
    assert all(torch.equal(t, before[name]) for name, t in clip.encoder.state_dict().items())
    shared = learned.encoder.text_model.embeddings.token_embedding.weight
    assert shared is clip.encoder.text_model.embeddings.token_embedding.weight


# --- files ----------------------------------------------------------------------------------------


def fitting(path, widths):
    """The vectors of each text encoder, read."""
    found = look_at(path)
    return {encoder: found.read(one) for encoder, one in found.fitting(widths).items()}


def test_vectors_for_two_text_encoders(tmp_path):
    small, large = torch.zeros(2, 32), torch.ones(2, 40)
    widths = {"text_encoder": 32, "text_encoder_2": 40}
    save_file({"clip_l": small, "clip_g": large}, tmp_path / "both.safetensors")
    found = fitting(tmp_path / "both.safetensors", widths)
    assert torch.equal(found["text_encoder"], small)
    assert torch.equal(found["text_encoder_2"], large)
    # Two encoders of one width are told apart by the names alone.
    save_file({"clip_l": small, "clip_g": small + 1}, tmp_path / "same.safetensors")
    found = fitting(tmp_path / "same.safetensors", dict.fromkeys(widths, 32))
    assert torch.equal(found["text_encoder_2"], small + 1)
    # As trainers of the cog format write it.
    names = "text_encoders_0", "text_encoders_1"
    save_file(dict(zip(names, (small, small + 1), strict=True)), tmp_path / "cog.safetensors")
    found = fitting(tmp_path / "cog.safetensors", dict.fromkeys(widths, 32))
    assert torch.equal(found["text_encoder"], small)
    assert torch.equal(found["text_encoder_2"], small + 1)
    save_file({"clip_l": small, "text_encoders_0": large}, tmp_path / "two.safetensors")
    with pytest.raises(SafelightError, match="one text encoder under two names"):
        look_at(tmp_path / "two.safetensors")
    torch.save([{"x": large[:1]}, {"x": small}, {"x": large[1:]}], tmp_path / "list.pt")
    found = fitting(tmp_path / "list.pt", widths)
    assert torch.equal(found["text_encoder"], small)
    assert torch.equal(found["text_encoder_2"], large)
    save_file({"clip_l": small, "clip_g": large[:1]}, tmp_path / "odd.safetensors")
    with pytest.raises(SafelightError, match="2 and 1 vectors for two text encoders"):
        fitting(tmp_path / "odd.safetensors", widths)


def test_an_embedding_in_a_lora(tmp_path):
    vectors = torch.ones(2, 32)
    path = tmp_path / "lora.safetensors"
    save_file(
        {
            "lora_unet_x.alpha": torch.zeros(()),
            "bundle_emb.ink.string_to_param.*": vectors,
            "bundle_emb.moss.clip_l": vectors.clone(),
            "bundle_emb.moss.clip_g": vectors * 2,
        },
        path,
    )
    ink, moss = bundled(read_header(path), "".__eq__, None)
    assert (ink.name, moss.name) == ("ink", "moss")
    assert torch.equal(ink.read(ink.vectors[0]), vectors)
    assert [one.place for one in moss.vectors] == ["clip_l", "clip_g"]
    assert torch.equal(moss.read(moss.vectors[1]), vectors * 2)


@pytest.mark.parametrize("keys", [["clip_l", "clip_l_out"], ["clip_l_out"]])
def test_an_embedding_of_a_text_encoders_output_in_a_lora(keys, tmp_path):
    """OneTrainer trains such vectors, too. Drawing with the others alone would be another word."""
    path = tmp_path / "lora.safetensors"
    tensors = {f"bundle_emb.<me>.{key}": torch.ones(2, 32) for key in keys}
    save_file({**tensors, "bundle_emb.moss.clip_l": torch.ones(2, 32)}, path)
    said: list[str] = []
    [moss] = bundled(read_header(path), "ink".__eq__, said)
    assert moss.name == "moss"
    assert said == [
        "embedding lora.safetensors: <me> has clip_l_out, vectors for the text encoder's output; "
        "it is left out"
    ]
    with pytest.raises(SafelightError, match=r"<me> has clip_l_out, .*: they are not supported"):
        bundled(read_header(path), "<me>".__eq__, None)


def picture_of(path, damage=lambda data: data):
    content = {"string_to_param": {"*": {"TORCHTENSOR": [[0.5] * 32]}}}
    info = PngImagePlugin.PngInfo()
    info.add_text("sd-ti-embedding", b64encode(json.dumps(content).encode()).decode())
    Image.effect_noise((64, 64), 90).save(path, pnginfo=info)
    path.write_bytes(damage(path.read_bytes()))


def test_a_bad_embedding_named_by_its_path_says_what_is_wrong(tmp_path):
    finder = EmbeddingFinder(takes_paths=True)
    (tmp_path / "bad.pt").write_bytes(b"hello")
    with pytest.raises(SafelightError, match=r"embedding bad\.pt: only 5 bytes"):
        finder.located(str(tmp_path / "bad.pt"))
    with pytest.raises(SafelightError, match="no file here"):
        finder.located("x" * 5000)


def test_an_embedding_on_the_hub(tmp_path, monkeypatch):
    picture_of(tmp_path / "zork.png")
    got = []
    monkeypatch.setattr(
        "safelight.weights.find.from_hub", lambda name: got.append(name) or tmp_path / "zork.png"
    )
    name = "org/zorks@v1/zork.pt"
    assert EmbeddingFinder(takes_paths=True).located(name).name == "zork"
    assert list(map(str, got)) == [name]
    with pytest.raises(SafelightError, match="no embedding"):
        EmbeddingFinder().located(name)


def test_a_cut_off_picture_in_a1111_is_a_warning(clip, tmp_path):
    folder = tmp_path / "embeddings"
    folder.mkdir()
    picture_of(folder / "zork.png", lambda data: data[: len(data) // 2])
    finder = EmbeddingFinder(open_library(tmp_path))
    widths, warnings = {"text_encoder": 32}, []
    request = Request(prompt="a zork", prompt_syntax="a1111")
    assert finder.choose(request, clip.tokenizer, widths, warnings=warnings) == ()
    assert len(warnings) == 1
    assert "damaged or cut off" in warnings[0]
    assert "its name in the prompt is read as text" in warnings[0]
    picture_of(folder / "zork.png")
    [found] = finder.choose(request, clip.tokenizer, widths)
    assert found.read(found.vectors[0]).tolist() == [[0.5] * 32]


class Hostile:
    def __reduce__(self):
        return print, ("it ran",)


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("x.pt", lambda p: torch.save({"x": Hostile()}, p), "holds code"),
        ("x.bin", lambda p: p.write_bytes(pickle.dumps(Hostile())), "a pickle"),
        ("x.pt", lambda p: p.write_bytes(b"PK\3\4 not a zip"), "x.pt: "),
        ("x.pt", lambda p: p.write_bytes(b"\x80\x02"), "x.pt: "),
        ("x.pt", lambda p: torch.save({"x": "ink"}, p), "no tensors in it"),
        ("x.pt", lambda p: torch.save([1, 2], p), "no tensors in it"),
        ("x.pt", lambda p: torch.save({"string_to_param": {}}, p), "no tensors in it"),
        ("x.pt", lambda p: torch.save({"x": torch.zeros(1).expand(10**9, 32)}, p), "larger than"),
        ("x.pt", lambda p: torch.save({"x": torch.zeros(513, 3)}, p), "at most 512"),
        ("x.pt", lambda p: torch.save({"x": torch.zeros(2, 3, 4)}, p), r"shape \(2, 3, 4\)"),
        ("x.pt", lambda p: torch.save({"x": torch.zeros(())}, p), r"shape \(\)"),
        ("x.pt", lambda p: torch.save({"x": torch.zeros(2, 3).int()}, p), "vectors are floats"),
        ("x.pt", lambda p: torch.save({"x": torch.full((1, 32), torch.nan)}, p), "NaN or Inf"),
        ("x.png", lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n"), "it is not"),
        ("x.png", lambda p: Image.new("RGB", (8, 8)).save(p), "a picture without an embedding"),
        ("x.png", lambda p: picture_of(p, lambda data: data[:-100]), "damaged or cut off"),
        ("x.safetensors", lambda p: p.write_bytes(b"hello"), "safetensors"),
        (
            "x.safetensors",
            lambda p: save_file({"a": torch.zeros(1, 3), "b": torch.zeros(1, 3)}, p),
            r"2 tensors in it \(a, b\)",
        ),
    ],
)
def test_what_is_no_embedding_is_refused_in_one_line(tmp_path, name, write, said, capfd):
    write(tmp_path / name)
    with pytest.raises(SafelightError, match=said) as caught:
        fitting(tmp_path / name, {"text_encoder": 32})
    assert str(caught.value).startswith("embedding x.")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 220
    assert caught.value.field == "embeddings"
    assert "it ran" not in capfd.readouterr().out


def test_another_width_names_what_would_fit(tmp_path):
    save_file({"<ink>": torch.zeros(1, 768)}, tmp_path / "ink.safetensors")
    with pytest.raises(SafelightError) as caught:
        look_at(tmp_path / "ink.safetensors").fitting({"text_encoder": 768, "text_encoder_2": 1280})
    assert str(caught.value) == (
        "embedding ink: vectors of 768 numbers (Stable Diffusion 1); "
        "this model reads 768 and 1280 (SDXL)"
    )
    assert caught.value.field == "embeddings"


def test_half_of_an_embedding_for_two_text_encoders_is_refused(tmp_path):
    vectors = {"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)}
    save_file(vectors, tmp_path / "ink.safetensors")
    torch.save([{"x": one[:1]} for one in vectors.values()], tmp_path / "list.pt")
    for name in ("ink.safetensors", "list.pt"):
        found = look_at(tmp_path / name)
        with pytest.raises(
            SafelightError, match=r"768 and 1280 numbers \(SDXL\); this model reads"
        ):
            found.fitting({"text_encoder": 768})
        assert found.fitting({"text_encoder_2": 1280})["text_encoder_2"].width == 1280  # a refiner
