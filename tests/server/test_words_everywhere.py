"""A long prompt, weights, LoRAs and an embedding: by command line and by the web UI's API."""

import json
import os

import pytest
import torch
import webuiapi
from PIL import ImageChops
from safetensors.torch import save_file
from sd_parsers import ParserManager
from serving import Serving

import safelight
from safelight import cli
from safelight.recipe import read_recipe
from weights_tiny import TEXT, UNET, text_folder

WORDS = "an apple, an ale, a red house by the lake, "
PROMPT = f"(ale:1.3), (inkx:0.8) {WORDS * 8} [apple] ((ale:1.2)) <lora:moss:0.5:0.8>"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A models folder with a model, two LoRAs in kohya's layout and an embedding."""
    root = tmp_path_factory.mktemp("models")
    config = text_folder(root / "Stable-diffusion" / "tiny") / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 32}))
    generator = torch.Generator().manual_seed(2)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    width, text, context = UNET["block_out_channels"][0], TEXT["hidden_size"], 24
    for name in ("Lora", "embeddings"):
        (root / name).mkdir()
    unet = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    encoder = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    for name, module, shape in (("moss", unet, (width, context)), ("ink", encoder, (text, text))):
        weights = {
            f"{module}.lora_down.weight": random(2, shape[1]),
            f"{module}.lora_up.weight": random(shape[0], 2),
            f"{module}.alpha": torch.tensor(2.0),
        }
        save_file(weights, root / "Lora" / f"{name}.safetensors")
    save_file({"emb_params": random(2, text)}, root / "embeddings" / "inkx.safetensors")
    return root


def check(path, tokens):
    """The recipe says everything, sd-parsers reads it, and the picture is made again."""
    recipe = read_recipe(path)
    assert [one["name"] for one in recipe["embeddings"]] == ["inkx"]
    loras = {one["name"]: (one["text_weight"], one["weight"]) for one in recipe["loras"]}
    assert loras == {"ink": (1.0, 1.0), "moss": (0.5, 0.8)}
    assert recipe["settings"]["prompt_syntax"] == "a1111"
    assert tokens >= 230
    parsed = ParserManager().parse(path)
    assert parsed.full_prompt.startswith("(ale:1.3), (inkx:0.8)")
    assert "<lora:moss:0.5:0.8>" in parsed.full_prompt
    assert parsed.samplers[0].parameters["seed"] in (5, "5")
    assert cli.run(["verify", str(path)]) == 0


def test_the_same_words_everywhere(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SAFELIGHT_MODELS", str(models))
    alone = tmp_path / "alone.png"
    asked = {"steps": "2", "sampler": "euler", "seed": "5", "guidance-scale": "7", "clip-skip": "2"}
    options = [part for name, value in asked.items() for part in (f"--{name}", value)]
    code = cli.run(
        [
            *("generate", PROMPT, "--negative", "(inkx:0.5)", "--prompt-syntax", "a1111"),
            *("--lora", "ink", "--model", "tiny", "--dtype", "float32", "--out", str(alone)),
            *options,
        ]
    )
    assert (code, capsys.readouterr().err) == (0, "")
    assert cli.run(["tokens", PROMPT, "--syntax", "a1111", "--model", "tiny", "--json"]) == 0
    [part] = json.loads(capsys.readouterr().out)["parts"]
    chunks = part["stages"][0]["texts"][0]["chunks"]
    tokens = [token for chunk in chunks for token in chunk["tokens"]]
    assert len({token["weight"] for token in tokens}) >= 4
    assert sum("inkx" in token["token"] for token in tokens) == 2
    check(alone, len(tokens))
    with Serving(tmp_path, "--model", "tiny", "--dtype", "float32", "--exact") as server:
        server.ready()
        api = webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1")
        made = api.txt2img(
            prompt=f"{PROMPT} <lora:ink:1>",
            negative_prompt="(inkx:0.5)",
            steps=2,
            sampler_name="Euler",
            seed=5,
            cfg_scale=7,
            width=64,
            height=64,
            override_settings={"CLIP_stop_at_last_layers": 2},
        )
        assert {one["name"] for one in api.get_loras()} == {"ink", "moss"}
        assert list(api.get_embeddings()["loaded"]) == ["inkx"]
        api.session.close()
        job = server.client.get("/api/jobs").json()[0]
        data = server.client.get(f"/api/pictures/{job['pictures'][0]['id']}").content
    there = tmp_path / "there.png"
    there.write_bytes(data)
    assert made.info["clip_skip"] == 2
    check(there, len(tokens))
    with (
        safelight.picture.opened(data, "there") as one,
        safelight.picture.opened(alone.read_bytes(), "alone") as other,
    ):
        assert ImageChops.difference(one, other).getbbox() is None
    assert os.environ["SAFELIGHT_MODELS"] == str(models)
