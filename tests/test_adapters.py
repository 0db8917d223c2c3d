"""LoRAs: valid and invalid files, models that share unchanged layers, and requests with LoRAs."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import safelight
from safelight.adapters import select
from safelight.adapters.asked import AskedLora, asked_of
from safelight.adapters.names import layers_of, table
from safelight.compare import Axis, grid
from safelight.engine import Engine
from safelight.errors import SafelightError
from safelight.explain.watch import watch
from safelight.recipe import read_recipe
from safelight.request import Request
from safelight.weights.hub_names import HubName
from weights_tiny import raw_file, text_folder

ATTENTION = "down_blocks_0_attentions_0_transformer_blocks_0_"
LAYERS = {  # with the shape of each, and what its kind of fast layer packs
    f"{ATTENTION}attn1_to_q": (32, 32),
    f"{ATTENTION}attn2_to_k": (32, 24),
    f"{ATTENTION}ff_net_0_proj": (256, 32),
    f"{ATTENTION}ff_net_2": (32, 128),
    "down_blocks_0_attentions_0_proj_in": (32, 32, 1, 1),
    "down_blocks_0_resnets_0_conv1": (32, 32, 3, 3),
    "down_blocks_0_resnets_0_time_emb_proj": (32, 128),
    "up_blocks_0_upsamplers_0_conv": (64, 64, 3, 3),
}
PLAIN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_model_encoder_layers_0_self_attn_q_proj"
SETTINGS: dict[str, Any] = {"steps": 2, "seed": 3, "width": 64, "height": 64, "sampler": "ddim"}


def lora(path: Path, *, layers: Any = LAYERS, text: bool = True, by: float = 0.3) -> Path:
    torch.manual_seed(len(path.name))
    tensors = {}
    named = {f"lora_unet_{name}": shape for name, shape in layers.items()}
    if text:
        named[f"lora_te_{TEXT}"] = (24, 24)
    for name, (out, *inner) in named.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, *inner) * by
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, 2, *[1] * (len(inner) - 1)) * by
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    return text_folder(root / "tiny")


@pytest.fixture(scope="module")
def ink(root: Path) -> Path:
    return lora(root / "ink.safetensors")


@pytest.fixture(scope="module")
def film(root: Path) -> Path:
    return lora(root / "film-2.safetensors", text=False)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return safelight.load(folder, device="cpu", dtype="float32")


def load(folder: Path, **how: Any) -> Any:
    return safelight.load(folder, device="cpu", **how)


def answers(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the networks of a model compute for some input."""
    torch.manual_seed(0)
    ids = torch.randint(0, 500, (1, 16))
    x, text = torch.randn(1, 4, 8, 8).to(model.dtype), torch.randn(1, 16, 24).to(model.dtype)
    with torch.inference_mode():
        noise = model.unet(x, torch.tensor([500.0]), text)
        return noise.float(), model.text_encoder(ids).float()


def equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def refused(model: Any, path: Path, **how: Any) -> str:
    """Return the line that a file is refused with; check that the model answers as before."""
    before = answers(model)
    with pytest.raises(SafelightError) as caught:
        model.adapted([str(path)], **how)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) <= 400
    assert line.startswith((f"lora {path.name}: ", "no lora "))
    assert caught.value.field == "loras"
    assert equal(answers(model), before)
    return line


class TestAnotherModel:
    @pytest.mark.parametrize(
        "how",
        [
            {"dtype": "float32"},
            {"dtype": "bfloat16"},
            {"dtype": "float32", "low_memory": True},
            {"dtype": "float32", "plain": True},
            {"dtype": "float16"},
        ],
        ids=["fast", "bfloat16", "low memory", "plain", "float16"],
    )
    @pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
    def test_computes_with_the_new_weights(
        self, how: dict[str, Any], used: bool, folder: Path, ink: Path, film: Path
    ) -> None:
        """It computes as a model loaded with these weights; the base model answers as before."""
        base, plain = load(folder, **how), load(folder, dtype="float32", plain=True)
        before = answers(load(folder, **how))
        if used:  # so that its weights are packed, then released
            assert equal(answers(base), before)
        asked = [f"{ink}:0.7:-0.4", str(film)]
        adapted = base.adapted(asked)
        ours, theirs = answers(adapted), answers(plain.adapted(asked))
        rounding = {"float32": 1e-4, "bfloat16": 0.08, "float16": 0.02}[how["dtype"]]
        for mine, right in zip(ours, theirs, strict=True):
            assert float((mine - right).abs().max()) <= rounding * float(right.abs().max())
        assert equal(answers(base), before)
        assert not equal(ours, before)
        del adapted
        gc.collect()
        assert equal(answers(base), before)
        assert equal(answers(base.adapted(asked)), ours)

    def test_shares_what_does_not_change(self, model: Any, film: Path) -> None:
        adapted = model.adapted([str(film)])
        assert adapted is not model
        assert adapted.base is model
        assert adapted.text_encoder is model.text_encoder
        assert adapted.vae is model.vae
        assert adapted.unet.conv_in is model.unet.conv_in
        assert adapted.unet.mid_block is model.unet.mid_block
        assert adapted.unet.up_blocks[1] is model.unet.up_blocks[1]
        assert adapted.unet.up_blocks[0] is not model.unet.up_blocks[0]

    def test_nothing_is_the_same_model(self, model: Any, ink: Path, film: Path) -> None:
        assert model.adapted([]) is model
        assert model.adapted([f"{ink}:0", f"{film}:0:1"]) is model
        text = model.adapted([f"{ink}:0:1"])
        assert text.unet is model.unet
        assert text.text_encoder is not model.text_encoder

    def test_the_last_few_stay(self, model: Any, ink: Path) -> None:
        first = model.adapted([str(ink)])
        assert model.adapted([f"{ink}:1:1"]) is first
        weak = weakref.ref(first)
        del first
        gc.collect()
        assert weak() is not None
        for i in range(select.MAX_SETS):
            model.adapted([f"{ink}:{i + 2}"])
        gc.collect()
        assert weak() is None

    def test_one_that_is_in_use_is_not_made_twice(self, model: Any, ink: Path) -> None:
        first = model.adapted([str(ink)])
        for i in range(select.MAX_SETS + 1):
            model.adapted([f"{ink}:{i + 2}"])
        assert model.adapted([str(ink)]) is first

    def test_memory_bounds_them(
        self, model: Any, ink: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(select, "MEMORY_SHARE", 1e-9)
        model.adapted([str(ink)])
        model.adapted([f"{ink}:2"])
        assert len(model.adapters._kept) == 1

    def test_adds_to_those_that_a_model_has(self, model: Any, ink: Path, film: Path) -> None:
        both = model.adapted([str(ink), str(film)])
        assert model.adapted([str(ink)]).adapted([str(film)]) is both

    def test_two_half_loras_are_one(self, folder: Path, ink: Path) -> None:
        plain = load(folder, dtype="float32", plain=True)
        once, twice = plain.adapted([str(ink)]), plain.adapted([f"{ink}:0.5", f"{ink}:0.5"])
        for name, weight in once.unet.state_dict().items():
            assert float((weight - twice.unet.state_dict()[name]).abs().max()) <= 1e-6

    def test_no_spelling_of_two_layers_is_the_same(self, model: Any) -> None:
        layers = layers_of(model.stored.shapes)
        modules = {part: layers[part] for part in ("unet", "text_encoder")}
        alone = [table(model, {part: modules[part]}) for part in modules]
        for part, found in zip(modules, alone, strict=True):
            assert {one for target in found.values() for one in target.layers} == modules[part]
            assert {target.part for target in found.values()} == {part}
        assert not alone[0].keys() & alone[1].keys()


class TestFiles:
    def test_what_is_no_lora(self, model: Any, tmp_path: Path, folder: Path) -> None:
        path = tmp_path / "a.safetensors"
        for content, told in (
            (b"", "empty"),
            (b"PK\x03\x04" + bytes(100), "zip archive"),
            (b"\x80\x02" + bytes(100), "pickle"),
            (b"<html>" + bytes(100), "web page"),
        ):
            path.write_bytes(content)
            assert told in refused(model, path)
        path.unlink()
        assert "no file here" in refused(model, path)
        assert "a folder without" in refused(model, tmp_path)
        raw_file(path, {})
        assert "holds nothing" in refused(model, path)
        whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
        assert "whole weight" in refused(model, whole)

    def test_a_pickle_of_tensors(self, model: Any, ink: Path, tmp_path: Path) -> None:
        path = tmp_path / "ink.pt"
        torch.save(load_file(ink), path)
        assert equal(answers(model.adapted([str(path)])), answers(model.adapted([str(ink)])))
        torch.save({"a": Path}, path)  # a class that is none of a tensor's
        refused(model, path)

    def test_half_a_file(self, model: Any, ink: Path, tmp_path: Path) -> None:
        path = tmp_path / "half.safetensors"
        path.write_bytes(ink.read_bytes()[: ink.stat().st_size // 2])
        assert "cut short" in refused(model, path)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_not_finite(self, value: float, model: Any, tmp_path: Path) -> None:
        path = lora(tmp_path / "a.safetensors")
        tensors = load_file(path)
        key = f"lora_unet_{ATTENTION}attn1_to_q.lora_up.weight"
        tensors[key][3, 1] = value
        save_file(tensors, path)
        assert "holds NaN or Inf" in (line := refused(model, path))
        assert ATTENTION[:30] in line

    def test_a_weight_that_is_too_large(self, folder: Path, tmp_path: Path) -> None:
        path = lora(tmp_path / "a.safetensors", by=1e4)
        model = load(folder, dtype="float16")
        assert "becomes NaN or Inf in float16" in refused(model, path)

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"down": (4, 31)}, "has the shape (4, 31); (4, 32) would fit"),
            ({"up": (32, 3)}, "has the shape (32, 3); (32, 4) would fit"),
            ({"up": (31, 4)}, "has the shape (31, 4); (32, 4) would fit"),
            ({"up": None}, "lacks its up half"),
            ({"down": None}, "lacks its down half"),
            ({"down": (0, 32), "up": (32, 0)}, "is empty"),
            ({"alpha": (2,)}, "it is one number"),
            ({"alpha": (), "up": None, "down": None}, "belongs to nothing"),
            ({"dora_scale": (5, 1)}, "has the shape (5, 1); the layer is (32, 32)"),
            ({"mid": (4, 4, 3, 3)}, "has the shape (4, 4, 3, 3); (4, 4) would fit"),
        ],
    )
    def test_tensors_that_do_not_fit(
        self, change: dict[str, Any], told: str, model: Any, tmp_path: Path
    ) -> None:
        shapes = {"down": (4, 32), "up": (32, 4)} | change
        base = f"lora_unet_{ATTENTION}attn1_to_q"
        names = {s: f"{base}.lora_{s}.weight" for s in ("up", "down", "mid")}
        names |= {s: f"{base}.{s}" for s in ("alpha", "dora_scale")}
        tensors = {names[s]: torch.ones(shape) for s, shape in shapes.items() if shape is not None}
        path = tmp_path / "a.safetensors"
        save_file(tensors, path)
        assert told in refused(model, path)

    @pytest.mark.parametrize(
        ("tensors", "told"),
        [
            ({"oft_R.weight": (4, 8)}, "PEFT's OFT"),
            ({"ia3_l": (1, 32)}, "PEFT's IA³"),
            ({"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2)}, "lacks its w2_b"),
            ({"lokr_w1": (4, 4)}, "lokr_w2 must be whole or of two parts"),
            ({"lokr_w1": (4, 4), "lokr_w2": (8, 9)}, "does not make (32, 32)"),
            ({"diff": (32, 31)}, "(32, 32) would fit"),
            ({"diff_b": (32,)}, "belongs to nothing"),
            ({"diff": (32, 32), "lora_up.weight": (32, 1)}, "in two ways"),
            ({"oft_blocks": (4, 8, 9)}, "square blocks"),
            ({"oft_blocks": (4, 3, 8, 8)}, "the layer is"),
            ({"a1.weight": (32, 2), "a2.weight": (3, 32), "b1.weight": (32, 2)}, "lacks its b2"),
            ({"lora_up.weight": (32, 2), "lora_up": (32, 2)}, "are the same"),
        ],
    )
    def test_kin_that_does_not_fit(
        self, tensors: dict[str, Any], told: str, model: Any, tmp_path: Path
    ) -> None:
        path = tmp_path / "a.safetensors"
        base = f"lora_unet_{ATTENTION}attn1_to_q"
        save_file({f"{base}.{name}": torch.ones(shape) for name, shape in tensors.items()}, path)
        assert told in refused(model, path)

    @pytest.mark.parametrize("alpha", [1e5, 9_999_999_999, float("nan")])
    def test_an_alpha_that_scales_nothing(self, alpha: float, model: Any, tmp_path: Path) -> None:
        """LoKr with whole factors has no rank. Trainers write an alpha beside it all the same."""
        base = f"lora_unet_{ATTENTION}attn1_to_q"
        tensors = {f"{base}.lokr_w1": torch.eye(4), f"{base}.lokr_w2": torch.eye(8)}
        save_file(tensors, plain := tmp_path / "plain.safetensors")
        tensors[f"{base}.alpha"] = torch.tensor(alpha).half()
        save_file(tensors, told := tmp_path / "told.safetensors")
        assert equal(*(answers(model.adapted([str(path)])) for path in (plain, told)))

    def test_whole_numbers(self, model: Any, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        base = f"lora_unet_{ATTENTION}attn1_to_q"
        down = torch.ones(2, 32, dtype=torch.int8)
        save_file(
            {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": torch.ones(32, 2)}, path
        )
        assert "stored as I8; floats are needed" in refused(model, path)

    @pytest.mark.parametrize(
        ("keys", "metadata", "told"),
        [
            ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 8)}, {}, "FLUX.1"),
            ({"lora_te2_text_model_x.lora_down.weight": (4, 8)}, {}, "it is for SDXL"),
            (
                {
                    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (
                        4,
                        2048,
                    )
                },
                {},
                "it is for SDXL, and this model is sd1",
            ),
            ({"x.lora_down.weight": (4, 8)}, {"ss_base_model_version": "sd_v2"}, "Diffusion 2"),
            ({"bundle_emb.ink.string_to_param.*": (2, 24)}, {}, "embeddings alone"),
            ({"a\nb\x1b[31m" + "x" * 900: (1,)}, {}, "belongs to nothing"),
        ],
    )
    def test_another_family_s(
        self, keys: dict[str, Any], metadata: Any, told: str, model: Any, tmp_path: Path
    ) -> None:
        path = tmp_path / "a.safetensors"
        save_file({key: torch.ones(shape) for key, shape in keys.items()}, path, metadata)
        told = told.replace("sd1", model.family.name)
        assert told in (line := refused(model, path))
        assert told in refused(model, path, unmatched="warn")  # nothing of it would be used
        assert "lora_unmatched" not in line

    def test_text_states_of_another_width(self, model: Any, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        base = f"lora_unet_{ATTENTION}attn2_to_k"
        names = f"{base}.lora_down.weight", f"{base}.lora_up.weight"
        save_file(dict(zip(names, (torch.ones(4, 768), torch.ones(32, 4)), strict=True)), path)
        assert "it is for Stable Diffusion 1, and this model is" in refused(model, path)

    @pytest.mark.parametrize(
        ("metadata", "told"),
        [
            ("[1]", "is not a JSON object"),
            ("{", "is not a JSON object"),
            ('{"unet.lora_alpha": "much"}', "a number is needed"),
            ('{"unet.lora_alpha": 1e999}', "a number is needed"),
            ('{"unet.lora_alpha": 1e39}', "has the alpha 1e+39; at most 1e+09 is taken"),
            ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(a+)+$": 1}}', "not a layer's name"),
            (f'{{"unet.lora_alpha": 1{" " * 2**21}}}', "2097152 are the most"),
        ],
    )
    def test_peft_s_settings(self, metadata: str, told: str, model: Any, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        base = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        tensors = {
            f"{base}.lora_A.weight": torch.ones(2, 64),
            f"{base}.lora_B.weight": torch.ones(64, 2),
        }
        save_file(tensors, path, {"lora_adapter_metadata": metadata})
        assert told in refused(model, path)

    @pytest.mark.parametrize(
        ("patterns", "alpha"),
        [
            ({}, 8.0),
            ({f"{i}.{'x' * 50}": 1.0 for i in range(5000)} | {"attn1.to_q": 4.0}, 4.0),
            ({"to_k": 3.0, "to_q": 2.0, "attn1\\.to_q": 4.0}, 2.0),
            ({"^attn1.to_q": 3.0, "1.to_q": 3.0, f"^{PLAIN}": 5.0}, 5.0),
        ],
        ids=["none", "300 KB of them", "the first of two", "a whole name"],
    )
    def test_peft_s_alpha_of_a_layer(
        self, patterns: dict[str, float], alpha: float, model: Any, tmp_path: Path
    ) -> None:
        path = tmp_path / "a.safetensors"
        halves = {"A": torch.ones(2, 32), "B": torch.ones(32, 2)}
        told = {"unet.lora_alpha": 8.0, "unet.r": 2, "unet.alpha_pattern": patterns}
        save_file(
            {f"unet.{PLAIN}.lora_{half}.weight": each for half, each in halves.items()},
            path,
            {"lora_adapter_metadata": json.dumps(told)},
        )
        [chosen] = model.adapters.choose([AskedLora(str(path))]).chosen
        assert [change.alpha for change in chosen.changes] == [alpha]

    @pytest.mark.parametrize("part", ["", "unet."])
    def test_peft_s_settings_with_and_without_a_part(
        self, part: str, model: Any, tmp_path: Path
    ) -> None:
        """A network that is saved on its own writes no part before its settings."""
        path = tmp_path / "a.safetensors"
        halves = {"A": torch.ones(2, 32), "B": torch.ones(32, 2)}
        told = {"lora_alpha": 8, "r": 2, "use_rslora": True, "alpha_pattern": {"to_q": 4}}
        save_file(
            {f"{PLAIN}.lora_{half}.weight": each for half, each in halves.items()},
            path,
            {"lora_adapter_metadata": json.dumps({part + key: told[key] for key in told})},
        )
        [chosen] = model.adapters.choose([AskedLora(str(path))]).chosen
        assert [(change.alpha, change.rooted) for change in chosen.changes] == [(4.0, True)]

    @pytest.mark.parametrize("rank", [0, -1, 1.5, True, "2"])
    def test_a_rank_of_peft_s_that_is_none(self, rank: Any, model: Any, tmp_path: Path) -> None:
        path = tmp_path / "mine"
        path.mkdir()
        base = f"base_model.model.{PLAIN}"
        tensors = {f"{base}.lokr_w1": torch.eye(4), f"{base}.lokr_w2": torch.eye(8)}
        save_file(tensors, path / "adapter_model.safetensors")
        config = {"peft_type": "LOKR", "alpha": 8, "r": rank}
        (path / "adapter_config.json").write_text(json.dumps(config))
        assert "a number from 1 is needed" in refused(model, path)

    def test_peft_s_alpha_lies_beside_the_weights(
        self, model: Any, folder: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "loras/mine"
        path.mkdir(parents=True)
        tensors = load_file(lora(tmp_path / "a.safetensors", text=False))
        layer = f"lora_unet_{ATTENTION}attn1_to_q"
        pair = {
            f"base_model.model.{PLAIN}.lora_A.weight": tensors[f"{layer}.lora_down.weight"],
            f"base_model.model.{PLAIN}.lora_B.weight": tensors[f"{layer}.lora_up.weight"],
        }
        save_file(pair, path / "adapter_model.safetensors")
        file, config = path / "adapter_model.safetensors", path / "adapter_config.json"
        listed = load(folder, dtype="float32", models_dir=tmp_path)
        seen: list[tuple[torch.Tensor, ...]] = []
        for alpha in (2, 8):
            config.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": alpha}))
            drawn = [answers(model.adapted([str(one)])) for one in (path, file)]
            drawn.append(answers(listed.adapted(["mine"])))
            assert all(equal(drawn[0], one) for one in drawn[1:])
            seen.append(drawn[0])
        assert not equal(*seen)
        kept = [model.adapters.choose([AskedLora(str(path))]).records[0]["sha256"]]
        save_file({key: 2 * value for key, value in pair.items()}, tmp_path / "new.safetensors")
        file.write_bytes((tmp_path / "new.safetensors").read_bytes())  # the folder's times stay
        kept.append(model.adapters.choose([AskedLora(str(path))]).records[0]["sha256"])
        assert kept[0] != kept[1]

    def test_a_file_that_changes_under_our_hands(
        self, model: Any, folder: Path, tmp_path: Path
    ) -> None:
        path = lora(tmp_path / "a.safetensors")
        chosen = model.adapters.choose([AskedLora(str(path), 1.5)])
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(SafelightError, match="overwritten after it was loaded"):
            model.adapters.adapted(chosen)


class TestRequests:
    def test_a_picture_with_and_without(self, model: Any, ink: Path, tmp_path: Path) -> None:
        plain = model.generate("an apple", **SETTINGS)
        drawn = model.generate("an apple", loras=[f"{ink}:0.8:0.5"], **SETTINGS)
        again = model.generate("an apple", loras=[f"{ink}:0"], **SETTINGS)
        assert drawn.images[0].tobytes() != plain.images[0].tobytes()
        assert again.images[0].tobytes() == plain.images[0].tobytes()
        other = model.adapted([f"{ink}:0.8:0.5"]).generate("an apple", **SETTINGS)
        assert other.images[0].tobytes() == drawn.images[0].tobytes()
        assert other.recipe()["loras"] == drawn.recipe()["loras"]
        assert other.settings == drawn.settings
        [path] = drawn.save(tmp_path / "a.png")
        recipe = read_recipe(path)
        [told] = recipe["loras"]
        assert (told["name"], told["weight"], told["text_weight"]) == ("ink", 0.8, 0.5)
        assert len(told["sha256"]) == 64
        assert recipe["settings"]["loras"] == ["ink:0.8:0.5"]
        assert str(ink.parent) not in json.dumps(recipe)
        text = path.read_bytes().decode("latin-1")
        assert "an apple <lora:ink:0.5:0.8>" in text
        assert f'Lora hashes: "ink: {told["hash"]}"' in text

    def test_each_of_several_pictures_tells_its_own(self, model: Any, ink: Path) -> None:
        drawn = model.generate("an apple", loras=[f"{ink}:0.8"], count=2, **SETTINGS)
        first, second = (drawn.recipe(i)["loras"] for i in (0, 1))
        assert [one["name"] for one in second] == ["ink"]
        assert first == second

    def test_pictures_share_a_call_with_the_same_set_alone(
        self, model: Any, ink: Path, film: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from safelight.engine import core

        calls: list[int] = []
        advance = core.advance
        monkeypatch.setattr(
            core, "advance", lambda m, jobs: (calls.append(len(jobs)), advance(m, jobs))[1]
        )
        engine = Engine(model, exact=False, rows=64)
        sets = [[], [str(ink)], [str(ink)], [str(film)], []]
        results = [
            engine.add(Request(prompt="an apple", loras=s, **SETTINGS), i)
            for i, s in enumerate(sets)
        ]
        made = dict[int, bytes]()
        while engine.busy:
            _, finished = engine.step()
            made |= {t.tag: t.image.tobytes() for t in finished if t.image is not None}
        assert max(calls) == 2
        assert made[0] == made[4]
        assert made[1] == made[2]
        assert len({made[0], made[1], made[3]}) == 3
        assert [len(r.loras) for r in results] == [0, 1, 1, 1, 0]

    def test_many_sets_take_their_turns(
        self, model: Any, ink: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No more sets than fit are in memory at once, and each is merged once."""
        merges: list[Any] = []
        merged = select.merged
        monkeypatch.setattr(
            select, "merged", lambda m, chosen: (merges.append(chosen), merged(m, chosen))[1]
        )
        engine = Engine(model, exact=False, rows=8)
        engine.model.adapters._kept.clear()
        for i in range(7):
            asked = Request(prompt="an apple", loras=[f"{ink}:{i / 10 + 3}"], **SETTINGS)
            engine.add(asked.replace(steps=2 + i % 2), i)
        done: list[int] = []
        while engine.busy:
            live = {t.set_key for t in engine.tickets if t.prepared}
            assert len(live) <= select.MAX_SETS
            done += [ticket.tag for ticket in engine.step()[1]]
        assert sorted(done) == list(range(7))
        assert len(merges) == 7

    def test_a_lora_that_is_refused_ends_its_picture_alone(
        self, model: Any, ink: Path, tmp_path: Path
    ) -> None:
        bad = lora(tmp_path / "bad.safetensors", by=float("nan"))
        engine = Engine(model, exact=False, rows=8)
        engine.add(Request(prompt="an apple", loras=[str(ink)], **SETTINGS), "good")
        engine.add(Request(prompt="an apple", loras=[str(bad)], **SETTINGS), "bad")
        ended: dict[str, Any] = {}
        while engine.busy:
            ended |= {t.tag: t.error or t.image for t in engine.step()[1]}
        assert "holds NaN or Inf" in str(ended["bad"])
        assert not isinstance(ended["good"], Exception)

    def test_what_is_left_out_is_told(self, model: Any, tmp_path: Path) -> None:
        path = lora(tmp_path / "a.safetensors")
        tensors = load_file(path)
        save_file({**tensors, "lora_unet_x.alpha": torch.tensor(1.0)}, path)
        with pytest.raises(SafelightError, match="1 of 28 keys belongs to nothing"):
            model.generate("an apple", loras=[str(path)], **SETTINGS)
        drawn = model.generate("an apple", loras=[str(path)], lora_unmatched="warn", **SETTINGS)
        assert any("lora_unet_x.alpha" in warning for warning in drawn.warnings)

    def test_a_story_and_a_grid(self, model: Any, ink: Path) -> None:
        asked = Request(prompt="an apple", loras=[str(ink)], **SETTINGS)
        drawn = model.generate(asked).images[0]
        assert watch(model, asked).picture.tobytes() == drawn.tobytes()
        [cells] = grid(model, asked, Axis("loras", ((), (str(ink),)))).results
        assert [len(cell.loras) for cell in cells] == [0, 1]

    def test_embeddings_inside(self, model: Any, tmp_path: Path) -> None:
        path = lora(tmp_path / "a.safetensors")
        tensors = load_file(path)
        vectors = torch.ones(2, 24)
        save_file({**tensors, "bundle_emb.moss.string_to_param.*": vectors}, path)
        words = {"prompt_syntax": "a1111", "loras": [str(path)], **SETTINGS}
        without = {**words, "loras": [str(lora(tmp_path / "b.safetensors"))]}
        for prompt, same in (("an apple", True), ("moss", False)):
            one, other = model.generate(prompt, **words), model.generate(prompt, **without)
            assert (one.images[0].tobytes() == other.images[0].tobytes()) == same

    def test_a_server_takes_no_paths(self, folder: Path, ink: Path) -> None:
        model = load(folder, dtype="float32", takes_paths=False)
        for name in (str(ink), "../ink", "ink.safetensors", "~/ink"):
            with pytest.raises(SafelightError, match="no lora") as caught:
                model.generate("an apple", loras=[name], **SETTINGS)
            assert "no file here" not in str(caught.value)

    def test_a_file_on_the_hub(
        self, folder: Path, ink: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []

        def from_hub(name: HubName, **_: Any) -> Path:
            asked.append(str(name))
            return ink

        monkeypatch.setattr("safelight.weights.find.from_hub", from_hub)
        monkeypatch.chdir(tmp_path)
        model = load(folder, dtype="float32")
        address = "https://huggingface.co/org/inks/resolve/main/a/ink.safetensors:0.5"
        drawn = model.generate("an apple", loras=[address], **SETTINGS)
        assert drawn.recipe()["loras"][0]["name"] == "org/inks/a/ink.safetensors"
        local = model.generate("an apple", loras=[f"{ink}:0.5"], **SETTINGS)
        assert drawn.images[0].tobytes() == local.images[0].tobytes()
        first = len(asked)
        model.adapters.choose([AskedLora("org/inks/adapter_model.safetensors")])
        config = "org/inks/adapter_config.json"
        assert asked[first:] == [config, "org/inks/adapter_model.safetensors"]
        first = len(asked)
        tagged = "an apple<lora:org/inks/a/ink.safetensors>"
        refusals: list[tuple[Any, dict[str, Any]]] = [
            (model, {"prompt": "an apple", "loras": ["org/inks"]}),
            (model, {"prompt": tagged, "prompt_syntax": "a1111"}),
            (load(folder, takes_paths=False), {"loras": ["org/inks/a/ink.safetensors"]}),
        ]
        for one, given in refusals:
            with pytest.raises(SafelightError, match="no lora"):
                one.generate(**given, **SETTINGS)
        assert len(asked) == first

    def test_a_folder_of_other_things_hides_no_lora(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lora((tmp_path / "Lora").mkdir() or tmp_path / "Lora" / "ink.safetensors")
        (tmp_path / "work/ink").mkdir(parents=True)
        (tmp_path / "work/film").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        model = load(folder, models_dir=tmp_path)
        assert model.adapters.choose([AskedLora("ink")]).asked[0].name == "ink"
        with pytest.raises(SafelightError, match="lora ink: the weight must be a number, not 'x'"):
            model.adapters.choose([AskedLora.parse("ink:0.8:x")])
        with pytest.raises(SafelightError, match="a folder without adapter_model"):
            model.adapters.choose([AskedLora("film")])

    def test_names_are_found_in_the_models_folder(self, folder: Path, tmp_path: Path) -> None:
        lora((tmp_path / "Lora").mkdir() or tmp_path / "Lora" / "ink.safetensors")
        model = load(folder, dtype="float32", takes_paths=False, models_dir=tmp_path)
        drawn = model.generate("an apple", loras=["ink:0.5"], **SETTINGS)
        assert drawn.recipe()["loras"][0]["name"] == "ink"
        tagged = model.generate("an apple<lora:ink:0.5>", prompt_syntax="a1111", **SETTINGS)
        words = model.generate("an apple", prompt_syntax="a1111", loras=["ink:0.5"], **SETTINGS)
        assert tagged.images[0].tobytes() == words.images[0].tobytes()
        assert tagged.recipe()["loras"] == [{**words.recipe()["loras"][0], "in_prompt": True}]
        plain = model.generate("an apple<lora:ink:0.5>", **SETTINGS)
        assert "loras" not in plain.recipe()
        assert any("is text in prompt_syntax plain" in warning for warning in plain.warnings)


class TestTags:
    @pytest.mark.parametrize(
        ("tag", "read"),
        [
            ("<lora:ink>", ("ink", 1, 1)),
            ("<lora:my ink:0.8>", ("my ink", 0.8, 0.8)),
            ("<lora:ink:0.8:-0.5>", ("ink", -0.5, 0.8)),
            ("<lora:ink:te=0.3:unet=0.6>", ("ink", 0.6, 0.3)),
            ("<lora:ink:0.5:unet=1>", ("ink", 1, 0.5)),
            ("<lyco:ink:2>", ("ink", 2, 2)),
        ],
    )
    def test_as_the_web_ui_reads_them(self, tag: str, read: Any) -> None:
        for syntax in ("a1111", "comfy", "compel"):
            [one], _ = asked_of(Request(prompt=f"a cat {tag}", prompt_syntax=syntax))
            assert (one.name, one.weight, one.text_weight, one.tagged) == (*read, True)

    @pytest.mark.parametrize(
        "tag",
        ["<lora:ink:strong>", "<lora:>", "<lora:ink:1:1:8>", "<lora:ink:dyn=4>", "<lora:ink:1000>",
         "<lora:ink:nan>", "<lora:ink:te=x>", "<lora:ink:as=1>"],
    )  # fmt: skip
    def test_what_is_none(self, tag: str) -> None:
        with pytest.raises(SafelightError):
            asked_of(Request(prompt=f"a cat {tag}", prompt_syntax="a1111"))


def load_file(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {key: tensor.clone() for key, tensor in load_file(path).items()}
