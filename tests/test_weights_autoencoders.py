"""Another autoencoder for a model, tiny ones, and previews made with them."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderTiny as TheirTiny
from safetensors.torch import load_file, save_file

from safelight import cli
from safelight.engine import preview
from safelight.engine.job import prepare
from safelight.families import colours, sd
from safelight.fast import accelerate
from safelight.nets.tiny import AutoencoderTiny, TinyConfig
from safelight.nets.vae import AutoencoderKL, VAEConfig
from safelight.picture import to_tensor
from safelight.recipe import read_recipe
from safelight.request import Request
from safelight.weights import inspect, load_model
from safelight.weights.names import vae_names
from test_weights_load import single_file
from weights_tiny import FAMILY, VAE, change, pixel_folder, refused, text_folder, weights, write

SMALL = {"seed": 1, "steps": 2, "sampler": "euler", "width": 64, "height": 64}
TINY = {
    "_class_name": "AutoencoderTiny",
    "encoder_block_out_channels": [16, 16],
    "decoder_block_out_channels": [16, 16],
    "num_encoder_blocks": [1, 2],
    "num_decoder_blocks": [2, 1],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return text_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def other():
    """Return other weights for an autoencoder of the model's shape."""
    found = weights(AutoencoderKL, VAEConfig.from_dict(VAE))
    return {name: tensor.flip(0).contiguous() for name, tensor in found.items()}


def tiny_vae(path, config=TINY):
    """A tiny autoencoder in diffusers' layout."""
    write(path / "config.json", config)
    tensors = weights(AutoencoderTiny, TinyConfig.from_dict(config))
    save_file(tensors, path / "diffusion_pytorch_model.safetensors")
    return path


def original(tensors):
    """Return the same weights by the names of the original code."""
    table = {ours: theirs for theirs, ours in vae_names(VAE).items()}
    found = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if ".attentions." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        found[f"{table[module]}.{leaf}"] = tensor.contiguous()
    return found


def drawn(folder, dtype="float32", **how) -> bytes:
    model = load_model(folder, device="cpu", dtype=dtype, **how)
    return model.generate("a", **SMALL).images[0].tobytes()


# --- another of the same kind --------------------------------------------------------------------


LAYOUTS = {
    "diffusers": lambda tensors: tensors,
    "original": original,
    "first_stage_model": lambda t: {f"first_stage_model.{k}": v for k, v in original(t).items()},
    "vae": lambda t: {f"vae.{k}": v for k, v in t.items()},
    "with a loss": lambda t: {**original(t), "loss.logvar": torch.zeros(())},
    "in a whole checkpoint": lambda t: {
        **{f"first_stage_model.{k}": v for k, v in original(t).items()},
        "model.diffusion_model.out.0.weight": torch.zeros(4),
    },
}


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_of_a_file_draws_the_same(folder, other, tmp_path, layout, ending):
    tensors = LAYOUTS[layout](other)
    path = tmp_path / f"other.{ending}"
    if ending == "pt":
        torch.save({"state_dict": tensors}, path)
    else:
        save_file(tensors, path)
    model = load_model(folder, device="cpu", dtype="float32", vae=path, plain=True)
    for name, tensor in model.vae.state_dict().items():
        assert torch.equal(tensor, other[name])
    assert model.other_vae["name"] == "other"


def test_a_file_without_one_needs_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sd, "VARIANTS", (FAMILY,))
    whole = load_file(single_file(tmp_path / "whole.safetensors", FAMILY))
    bare = {k: t for k, t in whole.items() if not k.startswith("first_stage_model.")}
    save_file(bare, tmp_path / "bare.safetensors")
    refused(lambda: load_model(tmp_path / "bare.safetensors"), "no vae", "give one with --vae")
    given = {"vae": tmp_path / "whole.safetensors"}
    assert drawn(tmp_path / "bare.safetensors", **given) == drawn(tmp_path / "whole.safetensors")
    told = inspect(tmp_path / "bare.safetensors")
    assert set(told["components"]) == {"unet", "text_encoder"}
    assert "no vae" in told["warnings"][-1]


def test_a_folder_and_a_models_folder_give_the_same(folder, other, tmp_path):
    write(tmp_path / "vae/config.json", {"_class_name": "AutoencoderKL", **VAE})
    save_file(other, tmp_path / "vae/diffusion_pytorch_model.safetensors")
    save_file(other, tmp_path / "other.safetensors")
    whole = text_folder(tmp_path / "whole")
    change(whole / "vae/config.json", "_class_name", "AutoencoderKL")
    save_file(other, whole / "vae/diffusion_pytorch_model.safetensors")
    snapshot = tmp_path / "hub/snapshots/0123"  # a whole model's, as links into the blobs
    (snapshot / "vae").mkdir(parents=True)
    (tmp_path / "hub/blobs").mkdir()
    for file in (whole / "model_index.json", *(whole / "vae").iterdir()):
        blob = shutil.copy(file, tmp_path / "hub/blobs")
        (snapshot / file.relative_to(whole)).symlink_to(blob)
    wanted = drawn(folder, vae=tmp_path / "other.safetensors")
    assert wanted != drawn(folder)
    for vae in (tmp_path / "vae", str(tmp_path / "vae"), whole, snapshot, snapshot / "vae"):
        assert drawn(folder, vae=vae) == wanted


def test_the_recipe_names_it_and_verify_finds_it(folder, other, tmp_path, monkeypatch, capsys):
    models = tmp_path / "models"
    (models / "vae").mkdir(parents=True)
    save_file(other, models / "vae/blue.safetensors")
    monkeypatch.chdir(tmp_path)
    small = ["-W", "64", "-H", "64", "--steps", "1", "--sampler", "euler", "-m", str(folder)]
    monkeypatch.setenv("SAFELIGHT_MODELS", str(models))
    assert cli.run(["generate", "a", *small, "--vae", "Blue", "--out", "a.png"]) == 0
    recipe = read_recipe("a.png")
    assert recipe["vae"]["name"] == "blue"
    assert len(recipe["vae"]["sha256"]) == 64
    assert recipe["model"]["sha256"] == load_model(folder, device="cpu").sha256
    verify = ["verify", "a.png", "--model", str(folder)]
    assert cli.run(verify) == 0
    (models / "vae/blue.safetensors").rename(models / "vae/renamed.safetensors")
    assert cli.run(verify) == 0
    save_file(load_file(models / "vae/renamed.safetensors"), "elsewhere.safetensors")
    monkeypatch.delenv("SAFELIGHT_MODELS")
    assert cli.run(verify) == 2
    assert "--vae" in capsys.readouterr().err
    assert cli.run([*verify, "--vae", "elsewhere.safetensors"]) == 0
    torch.save({name: tensor * 0.5 for name, tensor in other.items()}, "wrong.pt")
    assert cli.run([*verify, "--vae", "wrong.pt"]) == 2
    assert "vae must be blue" in capsys.readouterr().err


def test_means_and_deviations_of_latents(folder, tmp_path):
    """As in diffusers, latents·std/scale + mean is decoded, and encoding is the inverse."""
    config = VAEConfig.from_dict(
        {**VAE, "scaling_factor": 0.5, "latents_mean": [1, 2, 3, 4.5], "latents_std": [8, 6, 7, 5]}
    )
    latents = torch.randn(1, 4, 2, 2)
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in ([1, 2, 3, 4.5], [8.0, 6, 7, 5]))
    assert torch.allclose(config.unscale(latents), latents * std / 0.5 + mean)
    assert torch.allclose(config.scale(config.unscale(latents)), latents, atol=1e-5)
    write(tmp_path / "vae/config.json", {"_class_name": "AutoencoderKL", **VAE})
    for key, value in (("latents_mean", [1.0, 1.0, 1.0, 1.0]), ("latents_std", [2.0] * 4)):
        change(tmp_path / "vae/config.json", key, value)
    tensors = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    save_file(tensors, tmp_path / "vae/diffusion_pytorch_model.safetensors")
    assert drawn(folder, vae=tmp_path / "vae") != drawn(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"latents_mean": [0.0] * 4},
        {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3},
        {"latents_mean": [0.0] * 4, "latents_std": [0.0] * 4},
        {"latents_mean": "0", "latents_std": [1.0] * 4},
        {"latents_mean": [float("1e9")] * 4, "latents_std": [1.0] * 4},
    ],
)
def test_impossible_means_are_refused(config):
    refused(lambda: VAEConfig.from_dict({**VAE, **config}), "VAE: latents_")


# --- what does not fit ---------------------------------------------------------------------------


def misfits(root, other):
    def kl(name, **changes):
        config = {"_class_name": "AutoencoderKL", **VAE, **changes}
        write(root / name / "config.json", config)
        tensors = weights(AutoencoderKL, VAEConfig.from_dict(config))
        save_file(tensors, root / name / "diffusion_pytorch_model.safetensors")
        return root / name

    def file(name, tensors):
        save_file(tensors, root / name)
        return root / name

    half = {name: tensor for name, tensor in other.items() if name.startswith("encoder.")}
    nan = {**other, "decoder.conv_in.bias": torch.full((32,), torch.nan)}
    empty = root / "empty"
    empty.mkdir()
    return {
        "channels": (kl("channels", latent_channels=16), "16 channels", "latents have 4"),
        "factor": (
            kl("factor", block_out_channels=[16, 16, 32]),
            "4 pixels a latent",
            "model's are 2 wide",
        ),
        "grey": (kl("grey", in_channels=1, out_channels=1), "pictures"),
        "half": (file("half.safetensors", half), "weights of vae are missing"),
        "more": (file("more.safetensors", {**other, "x.y": torch.ones(1)}), "belong to nothing"),
        "odd": (file("odd.safetensors", {**original(other), "x": torch.ones(1)}), "do not know"),
        "shapes": (
            file("shapes.safetensors", {k: torch.cat([v, v]) for k, v in other.items()}),
            "in the file",
        ),
        "nan": (file("nan.safetensors", nan), "NaN"),
        "lora": (
            file("lora.safetensors", {"lora_unet_x.alpha": torch.ones(())}),
            "no autoencoder",
        ),
        "whole folder": (pixel_folder(root / "pixels"), "no config.json"),
        "empty": (empty, "no config.json"),
        "absent": (root / "absent.safetensors", "no vae"),
        "class": (tiny_vae(root / "class", {**TINY, "_class_name": "AutoencoderDC"}), "known are"),
        "code": (tiny_vae(root / "code", {**TINY, "_class_name": ["os", "system"]}), "known are"),
        "activation": (tiny_vae(root / "act", {**TINY, "act_fn": "relu"}), None),
        "layers": (
            change_and(tiny_vae(root / "layers"), "num_decoder_blocks", [60, 60]),
            "layers",
        ),
        "levels": (change_and(tiny_vae(root / "levels"), "num_decoder_blocks", [1]), "levels"),
        "widths": (
            change_and(tiny_vae(root / "widths"), "decoder_block_out_channels", [16, 32]),
            "widths",
        ),
        "upsampling": (change_and(tiny_vae(root / "up"), "upsample_fn", "bilinear"), "upsample_fn"),
        "text": (not_a_file(root), "safetensors"),
        "taesd alone": (file("taesd_encoder.safetensors", {"0.weight": torch.ones(1)}), "half"),
        "numbers": (file("x_decoder.safetensors", {"1.weight": torch.ones(1)}), "not the decoder"),
    }


def change_and(path, key, value):
    change(path / "config.json", key, value)
    return path


def not_a_file(root):
    (root / "text.safetensors").write_text("not one")
    return root / "text.safetensors"


@pytest.fixture(scope="module")
def bad(tmp_path_factory, other):
    return misfits(tmp_path_factory.mktemp("misfits"), other)


MISFITS = [
    "channels", "factor", "grey", "half", "more", "odd", "shapes", "nan", "lora", "whole folder",
    "empty", "absent", "class", "code", "layers", "levels", "widths", "upsampling", "text",
    "taesd alone", "numbers",
]  # fmt: skip


@pytest.mark.parametrize("use", ["vae", "preview_vae"])
@pytest.mark.parametrize("which", MISFITS)
def test_what_does_not_fit_is_one_line(folder, bad, which, use):
    vae, *words = bad[which]
    words = [use if word == "weights of vae are missing" else word for word in words]
    refused(lambda: load_model(folder, device="cpu", **{use: vae}), *words)


def test_every_misfit_is_tried(bad):
    assert set(bad) - {"activation"} == set(MISFITS)


def test_a_model_of_pixels_takes_none(bad, tmp_path):
    pixels = pixel_folder(tmp_path / "pixels")
    refused(lambda: load_model(pixels, vae=bad["grey"][0]), "draws pixels")


def test_a_name_that_is_nowhere_is_one_line(folder):
    refused(lambda: load_model(folder, vae="nowhere"), "no vae 'nowhere'", "SAFELIGHT_MODELS")
    refused(lambda: load_model(folder, vae="org/none", download=False), "safelight download")


def test_another_familys_scale_is_warned_of(folder, other, tmp_path):
    write(tmp_path / "xl/config.json", {"_class_name": "AutoencoderKL", **VAE})
    change(tmp_path / "xl/config.json", "scaling_factor", 0.13025)
    save_file(other, tmp_path / "xl/diffusion_pytorch_model.safetensors")
    model = load_model(folder, device="cpu", vae=tmp_path / "xl")
    assert any("another family" in line for line in model.warnings)


# --- tiny autoencoders ---------------------------------------------------------------------------

CONFIGS = [
    {},
    {k: v for k, v in TINY.items() if k != "_class_name"},
    {"latent_channels": 16, "scaling_factor": 0.5},
]


@pytest.mark.parametrize("dtype", ["plain", "float32"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_tiny_autoencoder_equals_diffusers(config, dtype):
    torch.manual_seed(0)
    theirs = TheirTiny(**config).eval()
    ours = AutoencoderTiny(TinyConfig.from_dict(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    if dtype != "plain":
        accelerate(ours.eval().requires_grad_(False), torch.float32)
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    latents = torch.randn(2, ours.config.latent_channels, 4, 6) * 2
    with torch.inference_mode():
        mean, std = ours.encode(pixels)
        assert torch.allclose(mean, theirs.encode(pixels).latents, atol=1e-5)
        assert not std.any()
        assert torch.allclose(ours.decode(latents), theirs.decode(latents).sample, atol=1e-5)


def taesd(root, folder):
    """The same weights in the two files of TAESD, which numbers a clamp before the decoder."""
    halves = {"encoder": {}, "decoder": {}}
    for name, tensor in load_file(folder / "diffusion_pytorch_model.safetensors").items():
        half, _, number, rest = name.split(".", 3)
        first = 1 if half == "decoder" else 0
        halves[half][f"{int(number) + first}.{rest}"] = tensor
    for half, tensors in halves.items():
        save_file(tensors, root / f"taesd_{half}.safetensors")
        torch.save(tensors, root / f"taesd_{half}.pth")
    return root


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny autoencoder of TAESD's own size, and a model with its factor of 8."""
    root = tmp_path_factory.mktemp("taesd")
    full = tiny_vae(root / "taesd", {"_class_name": "AutoencoderTiny"})
    model = text_folder(root / "model")
    change(model / "vae/config.json", "block_out_channels", [8, 8, 8, 8])
    for key, kind in (("down_block_types", "Down"), ("up_block_types", "Up")):
        half = "Encoder" if kind == "Down" else "Decoder"
        change(model / "vae/config.json", key, [f"{kind}{half}Block2D"] * 4)
    config = VAEConfig.from_dict(json.loads((model / "vae/config.json").read_text()))
    file = model / "vae/diffusion_pytorch_model.safetensors"
    save_file(weights(AutoencoderKL, config), file)
    return model, full, taesd(root, full)


def test_taesds_files_draw_as_diffusers_folder(tiny):
    model, full, root = tiny
    wanted = drawn(model, vae=full)
    assert wanted != drawn(model)
    for name in ("taesd_decoder.safetensors", "taesd_encoder.safetensors", "taesd_decoder.pth"):
        assert drawn(model, vae=root / name) == wanted
    save_file(load_file(full / "diffusion_pytorch_model.safetensors"), root / "tiny.safetensors")
    assert drawn(model, vae=root / "tiny.safetensors") == wanted


def test_a_decoder_alone_draws_and_says_that_it_cannot_encode(tiny, tmp_path):
    model, full, root = tiny
    alone = tmp_path / "taesd_decoder.safetensors"
    alone.write_bytes((root / alone.name).read_bytes())
    assert drawn(model, vae=alone) == drawn(model, vae=full)
    loaded = load_model(model, device="cpu", vae=alone)
    picture = loaded.generate("a", **SMALL).images[0]
    refused(
        lambda: loaded.generate("a", seed=1, steps=4, image=picture), "has no encoder", "beside it"
    )


def test_pictures_start_from_a_tiny_encoder_as_in_diffusers(tiny):
    """Its latents are not sampled: the first noise drawn is the picture's own."""
    model, full, _ = tiny
    loaded = load_model(model, device="cpu", dtype="float32", vae=full)
    picture = loaded.generate("a", **SMALL).images[0]
    asked = Request(prompt="a", steps=4, sampler="euler", strength=0.5, image=picture)
    table = loaded.family.table(loaded, asked)
    with torch.inference_mode():
        job = prepare(loaded, table, loaded.family.example(loaded), 3, (64, 64), image=picture)
        latents, _ = loaded.vae.encode(to_tensor(picture))
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        wanted = table.rows[0].level.mix(latents * loaded.vae.config.scaling_factor, noise)
    assert torch.allclose(job.state, wanted, atol=1e-6)


# --- previews ------------------------------------------------------------------------------------


def test_previews_are_decoded_by_the_tiny_one_and_pictures_are_not(tiny):
    model, full, _ = tiny
    loaded = load_model(model, device="cpu", dtype="float32", preview_vae=full)
    assert loaded.other_vae is None
    run = loaded.stream("a", **SMALL)
    previews = [step.preview() for step in run]
    assert run.result.images[0].tobytes() == drawn(model)
    only = load_model(model, device="cpu", dtype="float32", vae=full)
    last = only.generate("a", **SMALL).images[0]
    assert previews[-1].tobytes() == last.tobytes()
    assert preview.preview(loaded, torch.zeros(1, 4, 96, 128)).size == (512, 384)


def test_a_folder_brings_its_own_and_another_takes_its_place(tiny, tmp_path):
    model, full, _ = tiny
    both = shutil.copytree(model, tmp_path / "both")
    own = tiny_vae(both / "preview_vae", {"_class_name": "AutoencoderTiny", "has_encoder": False})
    alone, given = (load_model(m, device="cpu", dtype="float32") for m in (model, both))
    assert alone.preview_vae is None
    assert given.preview_vae.encoder is None
    assert given.sha256 == alone.sha256
    assert drawn(both) == drawn(model)
    assert load_model(both, device="cpu", preview_vae=full).preview_vae.encoder is not None
    (own / "config.json").write_text('{"_class_name": "AutoencoderTiny", "latent_channels": 3}')
    refused(lambda: load_model(both, device="cpu"), "both/preview_vae")


def test_previews_from_the_table_of_colours(folder):
    model = load_model(folder, device="cpu", dtype="float32")
    assert model.family.latent_rgb is None  # a model of other latents has no known colours
    assert preview.preview(model, torch.zeros(1, 4, 8, 8)).size == (16, 16)
    # Latents that reach beyond the picture, by half of the last one.
    reach = 8 * model.family.factor(model)
    size = reach, reach - model.family.factor(model) // 2
    assert preview.preview(model, torch.zeros(1, 4, 8, 8), size).size == (16, 15)
    model = replace(model, family=replace(model.family, latent_rgb=colours.SDXL))
    latents = torch.randn(1, 4, 1, 1).expand(1, 4, 8, 8)
    picture = preview.preview(model, latents)
    colour = latents[0, :, 0, 0] @ torch.tensor(colours.SDXL[:4]) + torch.tensor(colours.SDXL[4])
    wanted = ((colour.clamp(-1, 1) + 1) / 2 * 255).round().int().tolist()
    assert picture.size == (32, 32)
    assert all(abs(a - b) <= 1 for a, b in zip(picture.getpixel((9, 9)), wanted, strict=True))


def test_the_published_families_have_colours():
    assert all(variant.latent_rgb == colours.SD for variant in sd.VARIANTS)
    assert all(len(table) == 5 for table in (colours.SD, colours.SDXL))
