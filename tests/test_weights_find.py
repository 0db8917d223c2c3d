import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file

from safelight import cli
from safelight.errors import SafelightError
from safelight.families import family_of_folder
from safelight.weights import find as module
from safelight.weights import inspect, load_model
from safelight.weights.cache import cache_folder
from safelight.weights.digest import digest_file, digest_files, model_digest
from safelight.weights.find import file_on_hub, find, is_cached
from safelight.weights.folder import Folder, choose_weights
from safelight.weights.hub import (
    CONTROLNET,
    MODEL,
    VAE,
    _complete,
    cached_files,
    download,
    files_of,
)
from safelight.weights.hub_names import HubName, hub_name
from test_weights_load import single_file
from weights_tiny import FAMILY, change, pixel_folder, raw_file, refused, text_folder, write

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache, folder, repo="org/tiny"):
    """Return `folder` as in the hub's cache: blobs by hash, a snapshot of links to them."""
    base = cache / f"models--{repo.replace('/', '--')}"
    write(base / "refs/main", COMMIT)
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        content = path.read_bytes()
        name = hashlib.sha256(content).hexdigest()
        if path.suffix != ".safetensors":
            name = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        blob = base / "blobs" / name
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = base / "snapshots" / COMMIT / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return base / "snapshots" / COMMIT


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, and a hub that cannot be reached."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def no_network(*args, **kwargs):
        raise ConnectionError("no network in a test")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    return cache


def test_paths_are_found(tmp_path, monkeypatch):
    folder = text_folder(tmp_path / "my model")
    found = find(str(folder))
    assert (found.name, found.path) == ("my model", folder)
    file = raw_file(tmp_path / "a.b.safetensors", {})
    assert find(str(file)).name == "a.b"
    (tmp_path / "link.safetensors").symlink_to(file)  # as the hub's cache has them
    assert find(tmp_path / "link.safetensors").name == "link"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("~/my model").path == folder


@pytest.mark.parametrize(
    "name",
    ["", "nope", "a/b/c", "../x", "org/..", "org/x.safetensors", "org/x.ckpt", "a\0b", "x" * 9999,
     "https://example.com/org/name", "/absent/folder", "org/na me", "org/name@", "--help", "a\nb"],
)  # fmt: skip
def test_what_is_no_name_is_refused(name, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda: find(name), "no model", "embedded", "org/name")


def test_the_closest_name_is_told(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda: find("embeded"), "did you mean 'embedded'?")
    (tmp_path / "Stable-diffusion").mkdir()
    raw_file(tmp_path / "Stable-diffusion/deliberate_v2.safetensors", {})
    for name in ("deliberate-v2", "models/Deliberate_V3.safetensors"):
        refused(lambda name=name: find(name, models_dir=tmp_path), "did you mean 'deliberate_v2'?")
    with pytest.raises(SafelightError) as caught:
        find("x" * 100_000)
    assert "did you mean" not in str(caught.value)


def test_built_in_models_are_in_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MODELS", tmp_path)
    refused(lambda: find("embedded"), "not part of this installation")
    pixel_folder(tmp_path / "embedded")
    assert find("embedded").path == tmp_path / "embedded"


def test_a_cached_model_is_found_without_network(hub, tmp_path):
    snapshot = cached(hub, text_folder(tmp_path / "model"))
    for name in ("org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"):
        assert find(name).path == snapshot
    assert Folder(snapshot, "org/tiny").part_headers("unet")[0].tensors


def test_a_cached_model_is_found_offline_in_a_fresh_process(tmp_path):
    cached(tmp_path / "home/hub", text_folder(tmp_path / "model"))
    code = "from safelight.weights.find import find; print(find('org/tiny').path)"
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip().endswith(f"models--org--tiny/snapshots/{COMMIT}"), done.stderr


def test_an_absent_model_says_how_to_get_it(hub, monkeypatch):
    unreached = "the hub could not be reached (ConnectionError): is there a network"
    refused(lambda: find("org/tiny"), unreached, "safelight download org/tiny")
    refused(lambda: find("org/tiny@v1"), "safelight download org/tiny@v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(lambda: find("org/tiny"), "HF_HUB_OFFLINE is set", "safelight download org/tiny")


def test_without_download_the_hub_is_not_asked(hub, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: asked.append(a))
    refused(lambda: find("org/tiny", download=False), "not in the hub cache", "safelight download")
    snapshot = cached(hub, text_folder(tmp_path / "model"))
    assert find("org/tiny", download=False).path == snapshot
    assert asked == []


def test_the_hubs_own_refusals_are_told(hub, monkeypatch):
    response = SimpleNamespace(headers={}, status_code=404, request=SimpleNamespace(url=""))
    offline = errors.OfflineModeIsEnabled("x")
    for told in (httpx2.ConnectError("x"), offline):

        def fail(*args, told=told, **kwargs):
            raise told

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
        word = "unset it" if told is offline else "could not be reached (ConnectError)"
        with pytest.raises(SafelightError) as caught:
            download(HubName("org/tiny"), print)
        assert word in str(caught.value)
        assert "safelight download" not in str(caught.value)  # it is this command
    for error, word in (
        (errors.GatedRepoError, "terms"),
        (errors.RevisionNotFoundError, "no such revision"),
        (errors.RepositoryNotFoundError, "not on the hub"),
    ):

        def refuse(*args, error=error, **kwargs):
            raise error("x\ny", response=response)

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
        refused(lambda: find("org/tiny"), word, "safelight download")


def test_what_is_missing_is_downloaded_and_no_more(hub, tmp_path, monkeypatch):
    folder = text_folder(tmp_path / "model")
    for extra in (
        "v1-5-pruned.safetensors",
        "v1-5-pruned.ckpt",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "safety_checker/model.safetensors",
        "README.md",
    ):
        write(folder / extra, "x")
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    # A download that was cut short: the index is there, the weights are not.
    part = tmp_path / "part"
    write(part / "model_index.json", (folder / "model_index.json").read_text())
    snapshot = cached(hub, part)
    info = SimpleNamespace(
        sha=COMMIT, siblings=[SimpleNamespace(rfilename=n, size=1) for n in names]
    )
    asked = []

    def download(repo, revision, allow_patterns):
        asked.extend(allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: info)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *a, **k: str(folder / "model_index.json")
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find("org/tiny").path == snapshot
    assert asked == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    info.siblings = []
    refused(lambda: find("org/tiny"), "no model_index.json")


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_a_damaged_download_is_found(file, hub, tmp_path):
    snapshot = cached(hub, text_folder(tmp_path / "model"))
    model_digest(digest_files({file: snapshot / file}))
    blob = (snapshot / file).resolve()
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    refused(lambda: model_digest(digest_files({file: snapshot / file})), "damaged")


def test_digests(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    big, small = tmp_path / "big", tmp_path / "small"
    big.write_bytes(b"x" * 17 * 2**20)
    small.write_bytes(b"y")
    sha = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in (big, small)}
    assert model_digest(digest_files({"big": big})) == sha[big]
    lines = f"a {sha[small]}\nb {sha[big]}\n"
    assert (
        model_digest(digest_files({"b": big, "a": small}))
        == hashlib.sha256(lines.encode()).hexdigest()
    )
    (note,) = cache_folder().iterdir()
    remembered = json.loads(note.read_text())
    note.write_text(json.dumps([*remembered[:-1], "from the cache"]))
    assert digest_file(big).sha256 == "from the cache"
    assert digest_file(small).sha256 == sha[small]
    os.utime(big, ns=(1, 1))
    assert digest_file(big).sha256 == sha[big]
    note.write_text("{")
    assert digest_file(big).sha256 == sha[big]


def test_a_digest_needs_no_cache(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "big").write_bytes(b"x" * 17 * 2**20)
    assert len(digest_file(tmp_path / "big").sha256) == 64


INDEX = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}


@pytest.mark.parametrize(
    ("index", "word"),
    [
        ({}, "None is not supported"),
        ({"_class_name": 5}, "5 is not supported"),
        ({"_class_name": ["DDPMPipeline"]}, "is not supported"),
        ({"_class_name": "WanPipeline"}, "'WanPipeline' is not supp"),
        ({"_class_name": "WanPipeline"}, "StableDiffusionPipeline, StableDiffusionXLPipeline"),
        ({"_class_name": "Flux2Pipeline"}, "this is FLUX.2 dev, whose text encoder (Mistral)"),
        ({"_class_name": "Flux2KleinKVPipeline"}, "'Flux2KleinKVPipeline' is not supported"),
        ({"_class_name": "os.system"}, "is not supported"),
        ({**INDEX, "unet": ["diffusers", "SomethingElse"]}, "expected UNet2DConditionModel"),
        ({**INDEX, "unet": []}, "expected UNet2DConditionModel"),
        ({**INDEX, "unet": ["os", ["system"]]}, "expected UNet2DConditionModel"),
        ({**INDEX, "prior": ["diffusers", "PriorTransformer"]}, "'prior'"),
        ({**INDEX, "../../etc": ["diffusers", "UNet2DConditionModel"]}, "'../../etc'"),
        ({**INDEX, "/etc": ["diffusers", "UNet2DConditionModel"]}, "'/etc'"),
        ({**INDEX, "x" * 500: ["a", "b"]}, "is not supported"),
    ],
)
def test_a_pipeline_of_another_kind_is_refused(index, word, tmp_path):
    write(tmp_path / "model_index.json", index)
    refused(lambda: family_of_folder(Folder(tmp_path, "x").index, "x"), word)


@pytest.mark.parametrize(
    ("pipeline", "kind"),
    [
        ("StableDiffusionPipeline", "text"),
        ("StableDiffusionImg2ImgPipeline", "text"),
        ("StableDiffusionInpaintPipeline", "text"),
        ("LatentConsistencyModelPipeline", "text"),
        ("LatentConsistencyModelImg2ImgPipeline", "text"),
        ("DDPMPipeline", "pixels"),
        ("DDIMPipeline", "pixels"),
    ],
)
def test_supported_pipelines(pipeline, kind):
    index = {"_class_name": pipeline, "safety_checker": ["a", "B"]}
    assert family_of_folder(index, "x").kind == kind


def test_a_folder_without_an_index_is_refused(tmp_path):
    refused(lambda: Folder(tmp_path, "x"), "no model_index.json")


@pytest.mark.parametrize(
    "missing",
    ["scheduler/scheduler_config.json", "unet/config.json", "tokenizer/vocab.json",
     "tokenizer/merges.txt"],
)  # fmt: skip
def test_a_snapshot_without_what_loading_reads_is_not_complete(missing, tmp_path):
    folder = text_folder(tmp_path / "model")
    assert _complete(folder, "org/tiny", MODEL)
    (folder / missing).unlink()
    assert not _complete(folder, "org/tiny", MODEL)
    write(folder / "tokenizer/tokenizer.json", "{}")
    assert _complete(folder, "org/tiny", MODEL) == missing.startswith("tokenizer/")


def test_a_download_that_was_cut_between_shards_is_not_complete(tmp_path):
    folder = text_folder(tmp_path / "model")
    whole = folder / "unet/diffusion_pytorch_model.safetensors"
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    whole.rename(whole.with_name(shards[0]))
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    write(whole.with_name(f"{whole.name}.index.json"), index)
    assert not _complete(folder, "org/tiny", MODEL)
    write(whole.with_name(shards[1]), "x")
    assert _complete(folder, "org/tiny", MODEL)


def test_the_plain_weights_come_before_the_variants():
    stem = "unet/diffusion_pytorch_model"
    names = [
        f"{stem}.safetensors",
        f"{stem}.safetensors.index.json",
        f"{stem}.fp16.safetensors",
        f"{stem}.safetensors.index.fp16.json",
        f"{stem}.bf16.safetensors",
        f"{stem}.safetensors.index.bf16.json",
    ]
    while names:
        assert choose_weights("unet", names[::-1], "x") == names[0]
        del names[0]
    assert choose_weights("unet", [f"{stem}.fp16.bin", f"{stem}.bin"], "x") == f"{stem}.bin"
    assert choose_weights("unet", [f"{stem}.bf16.bin"], "x") == f"{stem}.bf16.bin"
    assert choose_weights("text", ["text/pytorch_model.bin"], "x", "model").endswith(".bin")
    refused(lambda: choose_weights("unet", [], "x"), f"{stem}.safetensors is missing")


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize("ending", [".{}-0000{}-of-00002", "-0000{1}-of-00002.{0}"])
def test_shards_of_the_chosen_variant_are_downloaded(variant, ending):
    def shards(ending):
        names = [f"diffusion_pytorch_model{ending.format(variant, i)}" for i in (1, 2)]
        return [f"unet/{name}.safetensors" for name in names]

    index = {"_class_name": "DDPMPipeline"}
    always = ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]
    plain = ["unet/diffusion_pytorch_model.safetensors.index.json"]
    plain += shards("-0000{1}-of-00002")
    half = [f"unet/diffusion_pytorch_model.safetensors.index.{variant}.json", *shards(ending)]
    assert files_of(index, always + plain + half, "x") == sorted(always + plain)
    assert files_of(index, always + half, "x") == sorted(always + half)


@pytest.mark.parametrize("layout", [VAE, CONTROLNET])
def test_shards_of_one_network_are_downloaded(layout):
    stem = "diffusion_pytorch_model"
    shards = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    files = ["config.json", f"{stem}.safetensors.index.json", *shards]
    others = ["README.md", f"{stem}.fp16.safetensors", f"other-{shards[0]}"]
    assert sorted(layout.files({}, [*files, *others], "x")) == sorted(files)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", HubName("org/name")),
        ("org/name@v1", HubName("org/name", "v1")),
        ("org/name/a.gguf", HubName("org/name", None, "a.gguf")),
        ("org/name@v1/a/b c.SAFETENSORS", HubName("org/name", "v1", "a/b c.SAFETENSORS")),
        ("https://huggingface.co/org/name", HubName("org/name")),
        ("https://hf.co/org/name/tree/v1/", HubName("org/name", "v1")),
        ("https://huggingface.co/org/name/blob/main/a.ckpt", HubName("org/name", None, "a.ckpt")),
        (
            "http://www.huggingface.co/org/name/resolve/v1/a/b.pt?download=true#x",
            HubName("org/name", "v1", "a/b.pt"),
        ),
        *[
            (text, None)
            for text in (
                *("name", "models/sd15.safetensors", "org/name/readme.txt", "org/name/folder"),
                *("org/name/../a.bin", "org/name//a.bin", "org/name/a\\b.bin", "a/b/c\0.bin"),
                *("/org/name/a.bin", "./org/name/a.bin", "~/org/name/a.bin", "org/name/.gguf/"),
                *("https://example.com/org/name", "https://huggingface.co/org", "C:/a/b.ckpt"),
            )
        ],
    ],
)
def test_names_of_the_hub(text, name):
    assert hub_name(text) == name
    assert name is None or hub_name(str(name)) == name


@pytest.fixture
def one_file(hub, tmp_path, monkeypatch):
    """A hub with a repository of a few files, of which one can be downloaded; what was asked."""
    names = ["README.md", "a/one.safetensors", "b.gguf", "c.ckpt", "d.bin"]
    info = SimpleNamespace(
        sha=COMMIT, siblings=[SimpleNamespace(rfilename=name, size=2e9) for name in names]
    )
    asked = []

    def fetch(repo, file, revision):
        asked.append((repo, file, revision))
        write(tmp_path / "given" / file, "x" * 64)
        return str(cached(hub, tmp_path / "given", repo) / file)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    return asked


def test_a_file_of_a_repository(one_file, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    name = "org/tiny/a/one.safetensors"
    refused(lambda: find(name, download=False), f"to get it: safelight download {name}")
    address = "https://huggingface.co/org/tiny/blob/main/a/one.safetensors"
    assert cli.run(["download", address]) == 0
    out, told = capfd.readouterr()
    assert out.endswith(f"snapshots/{COMMIT}/a/one.safetensors\n")
    assert "2.00 GB" in told
    for finds in (find, module.find_vae, module.find_controlnet, module.find_ip_adapter):
        for given in (name, address):
            source = finds(given, download=False)
            assert (source.name, str(source.path)) == (name, out.strip())
    assert one_file == [("org/tiny", "a/one.safetensors", None)]
    assert [(one, path.name) for one, path in cached_files()] == [(name, "one.safetensors")]
    assert is_cached(hub_name(name), "model")


def test_a_file_that_a_repository_lacks(one_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = "its files are org/tiny/a/one.safetensors, org/tiny/b.gguf, org/tiny/c.ckpt and 1 more"
    refused(lambda: find("org/tiny/x.gguf"), "x.gguf is not in that repository", others)
    refused(lambda: find("org/tiny"), "no model_index.json", others)
    (tmp_path / "org").mkdir()
    refused(lambda: find("org/tiny/x.gguf"), "no model 'org/tiny/x.gguf'", "no file or folder here")
    refused(lambda: file_on_hub(HubName("org/tiny", None, "x.bin"), "lora"), "no lora")
    assert not one_file


@pytest.mark.parametrize(
    ("kind", "stem"),
    [
        ({"model_type": "clip"}, "model"),
        ({"model_type": "clip_vision_model"}, "model"),
        ({"_class_name": "AutoencoderKL"}, "diffusion_pytorch_model"),
        ({"_class_name": "ControlNetModel"}, "diffusion_pytorch_model"),
    ],
)
def test_the_config_tells_which_network_is_downloaded(
    kind, stem, hub, tmp_path, monkeypatch, capfd
):
    """As errors advise: safelight download laion/CLIP-ViT-H-14-laion2B-s32B-b79K."""
    folder = tmp_path / "network"
    names = ("config.json", f"{stem}.safetensors", "open_clip_pytorch_model.bin", "README.md")
    for name in names:
        write(folder / name, json.dumps(kind))
    info = SimpleNamespace(
        sha=COMMIT, siblings=[SimpleNamespace(rfilename=name, size=1) for name in names]
    )
    asked = []

    def fetch(repo, revision, allow_patterns):
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: info)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *a, **k: str(folder / "config.json")
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr("safelight.weights.hub.digest_file", lambda path: None)
    assert cli.run(["download", "org/tiny"]) == 0, capfd.readouterr()
    assert sorted(asked) == sorted(names[:2])


def test_a_small_model_may_lie_in_the_root(tmp_path):
    folder = pixel_folder(tmp_path / "model")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (folder / "unet" / name).rename(folder / name)
    (folder / "scheduler/scheduler_config.json").rename(folder / "scheduler_config.json")
    found = Folder(folder, "x")
    found.flat = family_of_folder(found.index, "x").flat
    assert found.part_json("unet", "config.json")["sample_size"] == 8
    assert found.part_headers("unet")[0].tensors


def test_a_download_has_what_a_small_model_reads_from_its_root():
    index = {"_class_name": "DDPMPipeline"}
    weights = "unet/diffusion_pytorch_model.safetensors"
    for names in (
        ["config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"],
        ["config.json", "scheduler_config.json", weights],
        ["config.json", "scheduler/scheduler_config.json", weights],
        ["unet/config.json", "scheduler_config.json", weights],
        ["unet/config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"],
    ):
        assert {*names} <= {*files_of(index, ["model_index.json", *names], "x")}
    refused(lambda: files_of(index, ["scheduler_config.json", weights], "x"), "unet/config.json is")


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        (["tokenizer/merges.txt"], "tokenizer/merges.txt is missing"),
        (["tokenizer/vocab.json"], "tokenizer/vocab.json is missing"),
        (["tokenizer/merges.txt", "tokenizer/vocab.json"], "tokenizer/tokenizer.json is missing"),
    ],
)
def test_the_file_that_a_tokenizer_lacks_is_named(lost, told, tmp_path):
    folder = text_folder(tmp_path / "model")
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    index = json.loads((folder / "model_index.json").read_text())
    assert files_of(index, names, "x")
    refused(lambda: files_of(index, names - {*lost}, "x"), told)


def test_the_tokenizer_of_qwen_may_be_in_its_older_files():
    """As in the repository of Qwen-Image."""
    index = {"_class_name": "QwenImagePipeline"}
    parts = ("transformer/diffusion_pytorch_model", "text_encoder/model")
    parts += ("vae/diffusion_pytorch_model",)
    names = [f"{part}.safetensors" for part in parts]
    names += [f"{part.partition('/')[0]}/config.json" for part in parts]
    names += ["model_index.json", "scheduler/scheduler_config.json"]
    names += [f"tokenizer/{n}" for n in ("vocab.json", "merges.txt", "tokenizer_config.json")]
    assert files_of(index, names, "x") == sorted(names)
    del names[-2]
    refused(lambda: files_of(index, names, "x"), "tokenizer/merges.txt is missing")


@pytest.mark.parametrize("target", ["/etc/hostname", "../outside.json", "../model-evil/c.json"])
def test_a_link_out_of_the_folder_is_refused(target, tmp_path):
    folder = text_folder(tmp_path / "model")
    write(tmp_path / "outside.json", "{}")
    write(tmp_path / "model-evil/c.json", "{}")
    config = folder / "config.json"
    config.symlink_to(target if target.startswith("/") else Path(target))
    if config.exists():
        refused(lambda: Folder(folder, "x").file("config.json"), "link out of the folder")


def test_a_linked_part_is_refused_and_a_link_inside_is_not(tmp_path):
    folder = text_folder(tmp_path / "model")
    (folder / "unet").rename(tmp_path / "elsewhere")
    (folder / "unet").symlink_to(tmp_path / "elsewhere")
    refused(lambda: Folder(folder, "x").part_json("unet", "config.json"), "link out")
    (folder / "vae/config.json").rename(folder / "vae/real.json")
    (folder / "vae/config.json").symlink_to("real.json")
    assert Folder(folder, "x").part_json("vae", "config.json")
    (tmp_path / "alias").symlink_to(folder)
    assert Folder(tmp_path / "alias", "x").part_json("vae", "config.json")


def test_a_dangling_link_is_told(tmp_path):
    folder = text_folder(tmp_path / "model")
    (folder / "safelight.json").symlink_to("absent")
    refused(lambda: Folder(folder, "x").json("safelight.json"), "link to a file that is not there")


@pytest.mark.parametrize(
    "shard",
    ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".safetensors", "x.bin",
     "a\\b.safetensors", "x.safetensors\n", 5, None, ["x.safetensors"]],
)  # fmt: skip
def test_an_index_that_names_other_places_is_refused(shard, tmp_path):
    folder = pixel_folder(tmp_path / "model")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(folder / "unet/x.safetensors")
    index = weights.with_name(weights.name + ".index.json")
    write(index, {"weight_map": {"conv_in.weight": shard}})
    refused(lambda: Folder(folder, "x").part_headers("unet"), "not the name of a file beside it")


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}, "[]", "{"])
def test_an_index_without_a_map_is_refused(content, tmp_path):
    folder = pixel_folder(tmp_path / "model")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.unlink()
    write(weights.with_name(weights.name + ".index.json"), content)
    refused(lambda: Folder(folder, "x").part_headers("unet"))


def test_a_part_that_is_missing_is_named(tmp_path):
    folder = text_folder(tmp_path / "model")
    (folder / "vae/config.json").unlink()
    refused(lambda: Folder(folder, "x").part_json("vae", "config.json"), "vae/config.json")
    change(folder / "model_index.json", "vae", None)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    refused(lambda: Folder(folder, "x").part_headers("unet"), "unet/diffusion_pytorch_model.safet")


def test_a_download_says_sizes_first_and_checks_what_came(hub, tmp_path, monkeypatch, capfd):
    """The fake hub copies files into the cache, as its client does."""
    folder = text_folder(tmp_path / "model")
    names = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    write(folder / "README.md", "not read")
    siblings = [SimpleNamespace(rfilename=n, size=p.stat().st_size) for n, p in names.items()]
    info = SimpleNamespace(sha=COMMIT, siblings=siblings)
    asked = []

    def fetch(repo, *names, revision=None, allow_patterns=()):
        asked.append(revision)
        part = tmp_path / f"part{len(asked)}"
        for name in (*names, *allow_patterns):
            write(part / name, "")
            (part / name).write_bytes((folder / name).read_bytes())
        snapshot = cached(hub, part)
        return str(snapshot / names[0] if names else snapshot)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert cli.run(["download", "org/tiny"]) == 0
    out, told = capfd.readouterr()
    assert out.strip().endswith(COMMIT)
    assert "org/tiny: 11 files, 0.00 GB; 0.00 GB of it to download" in told
    assert asked == [None, COMMIT]  # all files of one commit
    assert load_model("org/tiny", download=False, device="cpu").name == "org/tiny"
    weights = Path(out.strip()) / "unet/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: out.strip())
    weights.resolve().write_bytes(content)
    assert cli.run(["download", "org/tiny"]) == 2
    assert "the download is damaged" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["", "tiny", "../x", "org/na me", "org/x/y", "/etc/passwd"])
def test_what_is_no_hub_id_is_not_downloaded(name, capfd):
    assert cli.run(["download", "--", name]) == 2
    assert "no hub id" in capfd.readouterr().err


def test_a_repository_of_another_kind_is_not_downloaded(hub, monkeypatch, capfd):
    info = SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename="x.bin", size=1)])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: info)
    assert cli.run(["download", "org/tiny"]) == 2
    assert "no model_index.json" in capfd.readouterr().err


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A single file of the tiny family without its autoencoder."""
    monkeypatch.setattr("safelight.families.sd.VARIANTS", (FAMILY,))
    path = single_file(tmp_path / "no vae.safetensors", FAMILY)
    save_file({k: v for k, v in load_file(path).items() if "first_stage" not in k}, path)
    return path


LENT = ["model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]


def served(hub, tmp_path, monkeypatch):
    """Let the hub have a tiny model; return the list that gets the names of what is downloaded."""
    folder = text_folder(tmp_path / "model")
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    info = SimpleNamespace(
        sha=COMMIT, siblings=[SimpleNamespace(rfilename=n, size=1) for n in names]
    )
    asked = []

    def fetch(repo, revision, allow_patterns):
        asked.extend(allow_patterns)
        for name in allow_patterns:
            write(tmp_path / "part" / name, "")
            (tmp_path / "part" / name).write_bytes((folder / name).read_bytes())
        return str(cached(hub, tmp_path / "part"))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: info)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *a, **k: str(folder / "model_index.json")
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return asked


@pytest.mark.parametrize("command", ["generate", "download"])
def test_of_parts_only_what_a_file_lacks_is_downloaded(
    command, hub, file, tmp_path, monkeypatch, capfd
):
    asked = served(hub, tmp_path, monkeypatch)
    if command == "download":
        assert cli.run(["download", "org/tiny", "--parts-for", str(file)]) == 0
        assert capfd.readouterr().out.strip().endswith(COMMIT)
    else:
        model = load_model(file, parts="org/tiny", device="cpu")
        assert model.other_parts["name"] == "org/tiny"
    assert asked == LENT
    asked.clear()
    assert load_model(file, parts="org/tiny", device="cpu").other_parts
    assert asked == []  # the snapshot has all that is read


@pytest.mark.parametrize("command", ["generate", "download"])
def test_of_several_parts_the_hub_gives_what_is_left(
    command, hub, file, tmp_path, monkeypatch, capfd
):
    asked = served(hub, tmp_path, monkeypatch)
    alone = tmp_path / "unet.safetensors"
    unet = {k: v for k, v in load_file(file).items() if k.startswith("model.diffusion_model.")}
    save_file(unet, alone)
    vae = str(tmp_path / "model/vae/diffusion_pytorch_model.safetensors")
    if command == "download":
        given = ["--parts-for", str(alone), "--parts", vae]
        assert cli.run(["download", "org/tiny", *given]) == 0
    else:
        model = load_model(alone, parts=[vae, "org/tiny"], device="cpu")
        assert [p["name"] for p in model.other_parts] == ["diffusion_pytorch_model", "org/tiny"]
    assert {name.partition("/")[0] for name in asked} == {
        "model_index.json",
        "text_encoder",
        "tokenizer",
    }


def test_the_command_for_parts_that_are_absent_fetches_no_more(hub, file, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(file.parent)
    command = "safelight download org/tiny --parts-for 'no vae.safetensors'"
    refused(lambda: load_model(file.name, parts="org/tiny", device="cpu"), command)


def test_parts_of_a_whole_file_are_not_looked_for(hub, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("safelight.families.sd.VARIANTS", (FAMILY,))
    whole = single_file(tmp_path / "whole.safetensors", FAMILY)
    told = load_model(whole, parts="org/tiny", device="cpu").warnings
    assert "'org/tiny' of the parts was not looked for: whole lacks nothing" in told
    assert cli.run(["download", "org/tiny", "--parts-for", str(whole)]) == 2
    assert "lacks nothing" in capfd.readouterr().err


def test_inspecting_downloads_nothing(hub, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: asked.append(a))
    refused(lambda: inspect("org/tiny"), "not in the hub cache", "safelight download org/tiny")
    assert asked == []
