"""Embeddings, styles and wildcards from the command line and in Python, and what recipes say."""

import json
import shutil

import pytest
import torch
from PIL import ImageChops
from safetensors.torch import save_file

import safelight
from safelight import cli
from safelight.adapters.embeddings import EmbeddingFinder, naming
from safelight.adapters.reader import PromptReader
from safelight.errors import SafelightError
from safelight.prompt import chunks
from safelight.recipe import read_recipe, recipe_text
from safelight.request import Request
from safelight.weights.digest import digest_file
from safelight.weights.find import find
from safelight.weights.library import Library
from safelight.weights.plan import read_plan
from weights_tiny import TEXT, text_folder

FAST = ["--steps", "2", "--sampler", "ddim", "--seed", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A models folder with a model, two embeddings that fit and one that does not."""
    root = tmp_path_factory.mktemp("models")
    config = text_folder(root / "Stable-diffusion" / "tiny") / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 32}))
    width = TEXT["hidden_size"]
    (root / "embeddings" / "old").mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    for name, shape in {"inkx": (2, width), "old/mossy": (1, width), "wide": (1, 99)}.items():
        vectors = torch.randn(shape, generator=generator) * 3
        save_file({"emb_params": vectors}, root / "embeddings" / f"{name}.safetensors")
    return root


@pytest.fixture(scope="module")
def model(folder):
    return safelight.load("tiny", models_dir=folder, device="cpu", dtype="float32")


@pytest.fixture
def run(folder, capsys, tmp_path, monkeypatch):
    """Run the command line in its own folder; return exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAFELIGHT_MODELS", str(folder))

    def run(*arguments):
        code = cli.run([str(one) for one in arguments])
        said = capsys.readouterr()
        return code, said.out.strip(), said.err.strip()

    return run


def draw(model, prompt, **settings):
    settings = {"steps": 4, "sampler": "ddim", "seed": 3, **settings}
    return model.generate(prompt, **settings)


def same(a, b):
    return ImageChops.difference(a.images[0], b.images[0]).getbbox() is None


@pytest.fixture
def twins(tmp_path):
    """A models folder with two files of one name that fit, and two of which one fits."""
    width = TEXT["hidden_size"]
    (tmp_path / "embeddings" / "xl").mkdir(parents=True)
    for name, shape in {"ink": (2, width), "moss": (1, width), "xl/moss": (1, 99)}.items():
        save_file({"emb_params": torch.ones(shape)}, tmp_path / f"embeddings/{name}.safetensors")
    table = {"string_to_param": {"*": torch.ones(2, width)}, "name": "ink"}
    torch.save(table, tmp_path / "embeddings" / "ink.pt")
    return tmp_path


def test_of_two_files_of_one_name_one_is_used(model, twins):
    """As the web UI, which many people downloaded such pairs for."""
    finder = EmbeddingFinder(Library(twins))
    widths = {"text_encoder": TEXT["hidden_size"]}

    def choose(prompt, *named, known=()):
        asked = Request(prompt=prompt, prompt_syntax="a1111", embeddings=named)
        said: list[str] = []
        found = finder.choose(asked, model.tokenizer, widths, known=known, warnings=said)
        return [one.path.relative_to(twins / "embeddings").as_posix() for one in found], said

    found, [said] = choose("an ale, ink")
    assert found == ["ink.safetensors"]
    assert said == (
        "two embeddings are called 'ink': embeddings/ink.safetensors is used; the setting "
        "embeddings may name embeddings/ink.pt"
    )
    assert choose("an ale, ink", "ink.pt") == (["ink.pt"], [])
    assert choose("an ale, ink", known=["ink"]) == ([], [])  # a LoRA brings it
    assert choose("an ale, moss") == (["moss.safetensors"], [])


@pytest.mark.parametrize("layout", ["", "models/embeddings", "embeddings/old/sd1"])
def test_the_warning_names_the_other_file_as_the_setting_takes_it(layout, model, twins, tmp_path):
    folder = tmp_path / "other" / layout
    folder.mkdir(parents=True)
    for file in ("ink.safetensors", "ink.pt"):
        shutil.copy(twins / "embeddings" / file, folder)
    finder, said = EmbeddingFinder(Library(tmp_path / "other")), list[str]()
    asked = Request(prompt="an ale, ink", prompt_syntax="a1111")
    finder.choose(asked, model.tokenizer, {"text_encoder": TEXT["hidden_size"]}, warnings=said)
    [told] = said
    assert finder.located(told.rpartition(" ")[2]).path == folder / "ink.pt"


@pytest.mark.parametrize(
    ("syntax", "prompt", "used"),
    [
        ("a1111", "ale <lora:ink:1>", False),
        ("a1111", "a pinkish ale", False),
        ("a1111", "ale, (Ink:1.2)", True),
        ("comfy", "ale, ink", False),
        ("comfy", "ale, embedding:ink", True),
        ("plain", "ale, Ink", True),
        ("plain", "ale", False),
    ],
)
def test_a_prompt_uses_a_name_by_its_syntax(syntax, prompt, used, model):
    """A LoRA often has the name of the embedding in it, and its tag is no word of the prompt."""
    asked = Request(prompt=prompt, prompt_syntax=syntax)
    assert naming(asked, model.tokenizer)("ink") is used


def test_a_prompt_names_embeddings_of_the_models_folder(model):
    without = draw(model, "ale")
    for syntax, prompt in (("a1111", "ale inkx"), ("comfy", "ale embedding:inkx")):
        result = draw(model, prompt, prompt_syntax=syntax)
        assert result.warnings == []
        [told] = result.recipe()["embeddings"]
        assert told["name"] == "inkx"
        assert result.recipe()["settings"]["embeddings"] == ["inkx"]
        assert same(result, draw(model, "ale inkx", embeddings=["inkx"]))
        assert f'TI hashes: "inkx: {told["sha256"][:12]}"' in recipe_text(result.recipe())
    plain = draw(model, "ale inkx")
    assert "embeddings" not in plain.recipe()
    assert not same(plain, result)
    assert same(draw(model, "ale"), without)  # as before


def test_what_a1111_finds_and_does_not_fit_is_text(model):
    result = draw(model, "a wide ale", prompt_syntax="a1111")
    assert same(result, draw(model, "a wide ale"))
    [said] = result.warnings
    assert said.startswith("embedding wide: vectors of 99 numbers; this model reads 24")
    assert said.endswith("its name in the prompt is read as text")
    [said] = draw(model, "a,embedding:inkx", prompt_syntax="comfy").warnings
    assert "after something else than a blank: read as text" in said


def test_a_lora_brings_its_embeddings_along(model, folder):
    width = TEXT["hidden_size"]
    layer = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {
        f"{layer}.lora_down.weight": torch.zeros(1, width),
        f"{layer}.lora_up.weight": torch.zeros(width, 1),
        "bundle_emb.foxglove.string_to_param.*": torch.ones(2, width) * 3,
    }
    (folder / "Lora").mkdir()
    save_file(tensors, folder / "Lora" / "garden.safetensors")
    asked = {"prompt_syntax": "a1111", "loras": ["garden"]}
    alone = draw(model, "ale", **asked)
    assert alone.warnings == []
    assert same(alone, draw(model, "ale"))
    result = draw(model, "ale foxglove", **asked)
    assert not same(result, draw(model, "ale foxglove"))
    recipe = result.recipe()
    assert "embeddings" not in recipe  # the LoRA stands for them
    assert [one["name"] for one in recipe["loras"]] == ["garden"]
    assert same(draw(model, "ale foxglove <lora:garden:1>", prompt_syntax="a1111"), result)
    comfy = {"prompt_syntax": "comfy", "loras": ["garden"]}
    assert same(draw(model, "ale embedding:foxglove", **comfy), result)
    # What a server sees before it takes a request in, without weights.
    plan = read_plan(find("tiny", models_dir=folder))
    reader = PromptReader(plan, EmbeddingFinder(Library(folder)))
    reader.check(Request(prompt="ale embedding:foxglove", **comfy))
    with pytest.raises(SafelightError, match="no embedding 'foxglove'"):
        reader.check(Request(prompt="ale embedding:foxglove", prompt_syntax="comfy"))


def test_many_chunks_are_refused_before_they_are_made(folder, monkeypatch):
    made = []
    make = chunks.chunks_of
    monkeypatch.setattr(chunks, "chunks_of", lambda *how: made.append(how) or make(*how))
    plan = read_plan(find("tiny", models_dir=folder))
    reader = PromptReader(plan, EmbeddingFinder())
    asked = {"prompt_syntax": "a1111", "steps": 1000}
    turns = "[" + "|".join("abcdefg") + "]" + "[" + "|".join("hijklmnopqr") + "]"
    reader.check(Request(prompt=f"a {turns}", **asked))
    assert len(made) == 77 + 1  # not of each step; and the empty negative prompt
    long = " ".join(f"{turns} {letter}" for letter in "abcdefghijklmnopqrstuvwxyz" * 2)
    for call in (reader.check, reader.describe):
        made.clear()
        with pytest.raises(SafelightError, match="more than 512 chunks"):
            call(Request(prompt=long, **asked))
        assert len(made) < 100
    with pytest.raises(SafelightError, match="at most 4096 are shown"):
        reader.describe(Request(prompt=f"[a|b] {'ale ' * 40}", **asked))


def test_the_negative_prompt_names_them_too(model):
    result = draw(model, "ale", negative_prompt="(mossy:1.2)", prompt_syntax="a1111")
    assert [one["name"] for one in result.recipe()["embeddings"]] == ["mossy"]


def test_an_embedding_that_no_prompt_names_is_said(model):
    [said] = draw(model, "ale", embeddings=["inkx"]).warnings
    assert said == "embedding inkx is in no prompt: write inkx where it is meant"
    [said] = draw(model, "inkx", embeddings=["inkx"], prompt_syntax="comfy").warnings
    assert said.endswith("write embedding:inkx where it is meant")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"embeddings": ["ink"]}, "no embedding 'ink' in the models folder; did you mean 'inkx'"),
        ({"embeddings": ["wide"]}, "embedding wide: vectors of 99 numbers; this model reads 24"),
        (
            {"prompt": "embedding:ink", "prompt_syntax": "comfy"},
            "no embedding 'ink' in the models folder; did you mean 'inkx'",
        ),
        ({"embeddings": [""]}, "embeddings must be"),
        ({"styles": ["old"]}, "there is no style 'old': no file of styles was given"),
    ],
)
def test_what_is_not_there_is_told_in_a_line(model, settings, said):
    with pytest.raises(SafelightError, match=said) as caught:
        draw(model, settings.pop("prompt", "ale"), **settings)
    assert len(str(caught.value).splitlines()) == 1


def test_a_picture_of_an_embedding_is_made_again(run, folder, tmp_path):
    code, out, err = run(
        *("generate", "a (inkx:1.3) ale", "--prompt-syntax", "a1111", "--model", "tiny"),
        *("--dtype", "float32", "--out", "ale.png", *FAST),
    )
    assert (code, out, err) == (0, "ale.png", "")
    assert run("verify", "ale.png")[:2] == (0, "0")
    # Renamed, or away from the folder, it is found by what it holds.
    other = tmp_path / "elsewhere.safetensors"
    shutil.copy(folder / "embeddings" / "inkx.safetensors", other)
    model = folder / "Stable-diffusion" / "tiny"
    (tmp_path / "empty").mkdir()
    bare = ("verify", "ale.png", "--model", model, "--models-dir", tmp_path / "empty")
    code, _, err = run(*bare)
    sha256 = digest_file(folder / "embeddings" / "inkx.safetensors").sha256
    assert code == 2
    assert f"embedding inkx of SHA-256 {sha256[:9]}" in err
    assert "--embedding" in err
    assert run(*bare, "--embedding", other)[:2] == (0, "0")
    for given in ("nowhere.pt", "inkx"):
        code, _, err = run(*bare, "--embedding", given)
        assert (code, len(err.splitlines())) == (2, 1)
        assert f"no file '{given}': --embedding takes the path of a file" in err
    other.rename(tmp_path / "empty" / "renamed.safetensors")
    assert run(*bare)[:2] == (0, "0")
    # A newer embedding has the name of a word of the prompt.
    (tmp_path / "empty" / "embeddings").mkdir()
    save_file({"emb_params": torch.ones(1, 24) * 9}, tmp_path / "empty/embeddings/ale.safetensors")
    assert run(*bare)[:2] == (0, "0")


def test_embeddings_by_path_and_in_tokens(run, folder):
    path = folder / "embeddings" / "inkx.safetensors"
    code, out, _ = run(
        *("generate", "ale inkx", "--embedding", path, "--model", "tiny", "--out", "ale.png"),
        *FAST,
    )
    assert (code, out) == (0, "ale.png")
    assert read_recipe("ale.png")["settings"]["embeddings"] == ["inkx"]
    code, out, _ = run("tokens", "ale inkx", "--embedding", path, "--model", "tiny", "--json")
    tokens = json.loads(out)["parts"][0]["stages"][0]["texts"][0]["chunks"][0]["tokens"]
    assert [t["token"] for t in tokens[-2:]] == ["<inkx 1/2></w>", "<inkx 2/2></w>"]
    assert [t["id"] for t in tokens[-2:]] == [TEXT["vocab_size"], TEXT["vocab_size"] + 1]
    code, out, _ = run("tokens", "(inkx:1.2)", "--model", "tiny", "--syntax", "a1111")
    assert "<inkx 1/2>:1.2 <inkx 2/2>:1.2" in out


@pytest.fixture
def words(tmp_path):
    """Return the options for a file of styles and a folder of wildcards."""
    (tmp_path / "styles.csv").write_text("name,prompt,negative_prompt\nold,an old {prompt},new\n")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "drink.txt").write_text("ale\nwater\n")
    return ("--styles-file", tmp_path / "styles.csv", "--wildcards", tmp_path / "words")


def test_styles_and_wildcards_are_in_the_recipe_as_words(run, words):
    asked = ("--style", "old", "--model", "tiny", "--out", "ale.png", "--dtype", "float32")
    code, out, _ = run("generate", "__drink__", *asked, *words, *FAST)
    assert (code, out) == (0, "ale.png")
    recipe = read_recipe("ale.png")
    assert recipe["settings"]["prompt"] in ("an old ale", "an old water")
    assert recipe["settings"]["negative_prompt"] == "new"
    assert recipe["settings"]["styles"] == []
    assert recipe["template"] == {
        "prompt": "__drink__",
        "negative_prompt": "",
        "styles": ["old"],
    }
    assert run("verify", "ale.png")[:2] == (0, "0")
    code, _, err = run("generate", "ale", "--style", "odl", "--model", "tiny", *words)
    assert (code, err) == (2, "error: there is no style 'odl': did you mean 'old'?")


def test_compare_takes_styles_and_wildcards(run, words):
    code, out, _ = run(
        *("compare", "__drink__", "--x", "styles=none|old", "--model", "tiny", "--out", "g.png"),
        *words,
        *FAST,
    )
    assert (code, out) == (0, "g.png")
