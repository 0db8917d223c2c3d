"""Fuzzers of files from strangers: each is refused in one line, or works.

The suite runs a few hundred examples of each fuzzer. With SAFELIGHT_FUZZ=SECONDS each runs for that
long, always with new examples; `make soak` does that, and prints the figures.
"""

import contextlib
import gc
import io
import json
import math
import os
import shutil
import struct
import time
import zlib
from collections import Counter
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from safelight import machine
from safelight.adapters import keys
from safelight.errors import SafelightError
from safelight.picture import encode, open_picture
from safelight.prompt.tokenizer import folder_tokenizer
from safelight.recipe import parse_recipe_text, png_texts, read_recipe, recipe_text
from safelight.request import Request
from safelight.weights import load_model
from safelight.weights.check import ITEM_SIZES, read_header
from safelight.weights.folder import Folder
from safelight.weights.gguf import BLOCKS, ORIGINAL_SHAPE
from safelight.weights.headers import header_of
from safelight.weights.tensors import open_tensors
from safelight.weights.tokenizers import gguf_home
from test_gguf_tokenizer import file as gguf_words
from test_gguf_tokenizer import of_file, qwen_say, t5_say
from test_weights_gguf import described, entry, framed, listed
from test_weights_gguf import text as gguf_text
from test_weights_pickles import archived, pickled, tensor
from weights_tiny import NETS, PIXELS, SCHEDULER, pixel_folder, raw_file, text_folder

SECONDS = float(os.environ.get("SAFELIGHT_FUZZ", 0))
SLOWEST = 2.0
"""The most processor time in seconds for one example: what promise 1 allows for a refusal."""

PNG = b"\x89PNG\r\n\x1a\n"


class Figures:
    """The outcomes of a fuzzer's examples."""

    def __init__(self, longest: int) -> None:
        self.ended, self.slowest, self.longest = Counter(), 0.0, longest

    def one(self, try_it):
        """Run one example: it may raise only SafelightError, of one line."""
        gc.disable()  # after some thousand examples, a collection takes seconds
        began = time.process_time()
        try:
            try_it()
            self.ended["work"] += 1
        except SafelightError as error:
            self.ended["refused"] += 1
            line = str(error)
            assert line.isprintable(), line
            assert len(line) <= self.longest, line
        finally:
            gc.enable()
        took = time.process_time() - began
        self.slowest = max(self.slowest, took)
        assert took < SLOWEST


def fuzz(name, examples, strategy, try_it, capfd, longest=400):
    """Feed examples of a strategy to `try_it`: a number of them, or for some seconds.

    longest: the most characters of a refusal.
    """
    figures, end, run = Figures(longest), time.monotonic() + SECONDS, 0

    def once(count):
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        @seed(run)
        @given(strategy)
        def examined(example):
            if run and time.monotonic() > end:
                return  # the time is up in the middle of a round
            figures.one(lambda: try_it(example))

        examined()

    once(examples)
    while time.monotonic() < end:
        run += 1
        once(10 * examples)
    if SECONDS:
        took = time.monotonic() - end + SECONDS
        with capfd.disabled():
            counts = ", ".join(f"{n} {how}" for how, n in figures.ended.items())
            print(f"\nfuzz {name}, {took:.0f} s: {counts}; slowest {figures.slowest:.2f} s")  # noqa: T201
    assert sum(figures.ended.values()) >= examples


# --- values that a JSON file may hold ------------------------------------------------------------

WHOLE = (0, -1, 1, 4000, 8192, 65536, 2**31, 2**63, -(2**63), 10**40, 10**400, -(10**400))
FRACTIONS = (0.0, -0.0, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan"))
HUGE = st.sampled_from((*WHOLE, *FRACTIONS, True, False, None))
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", "\0", "\ud800", "\u202e", "a" * 5000, "../../etc/passwd", "os.system"]),
)
LEAVES = st.one_of(HUGE, TEXTS, st.integers(), st.floats(), st.integers(-3, 40))
VALUES = st.one_of(
    LEAVES,
    st.recursive(
        LEAVES,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
        max_leaves=8,
    ),
    st.builds(lambda n, v: [v] * n, st.sampled_from([0, 1, 2, 13, 3000]), LEAVES),
    st.sampled_from([50, 300]).map(lambda depth: json.loads("[" * depth + "]" * depth)),
)


def changes(known):
    """Return a strategy for an object's keys with other values, or, for "…", without the key."""
    keys = st.one_of(st.sampled_from(sorted(known)), TEXTS)
    return st.dictionaries(keys, st.one_of(VALUES, st.just("…")), min_size=1, max_size=3)


def changed(content, change):
    return {k: v for k, v in {**content, **change}.items() if v != "…"}


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzzed")
    return text_folder(root / "text"), pixel_folder(root / "pixels")


def _jsons(folder):
    names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*.json"))]
    return {name: json.loads((folder / name).read_text()) for name in names}


EXTRA = {
    "config.json": {**NETS["unet"][2], **NETS["vae"][2], **NETS["text_encoder"][2], **PIXELS}
    | dict.fromkeys(("scaling_factor", "downsample_padding", "freq_shift", "norm_eps", "act_fn"))
    | dict.fromkeys(("time_cond_proj_dim", "in_channels", "out_channels", "latent_channels")),
    "scheduler_config.json": {
        **SCHEDULER,
        **dict.fromkeys(("trained_betas", "beta_start", "beta_end", "steps_offset", "sigma_min")),
        **dict.fromkeys(("prediction_type", "timestep_spacing", "num_train_timesteps")),
    },
    "tokenizer_config.json": dict.fromkeys(("model_max_length", "bos_token", "pad_token")),
}


@pytest.mark.parametrize("kind", [0, 1])
def test_configs(folders, kind, tmp_path, capfd):
    folder = shutil.copytree(folders[kind], tmp_path / "model")
    files = {n: c for n, c in _jsons(folder).items() if not n.endswith("vocab.json")}
    files.setdefault("safelight.json", {"words": [], "draw_with": {}, "distilled": True})
    strategy = st.one_of(
        st.tuples(st.just(name), changes({**content, **EXTRA.get(name.rpartition("/")[2], {})}))
        for name, content in files.items()
    )

    def try_it(example):
        name, change = example
        path = folder / name
        before = path.read_bytes() if path.exists() else None
        path.write_text(json.dumps(changed(files[name], change)))
        try:
            model = load_model(folder, device="cpu", dtype="float32")
            asked = (
                {"unconditional": True}
                if kind
                else {"prompt": "an apple", "width": 64, "height": 64}
            )
            model.generate(Request(steps=1, sampler="euler", seed=1, **asked))
        finally:
            path.unlink() if before is None else path.write_bytes(before)

    fuzz(f"configs of {('text', 'pixels')[kind]}", 20, strategy, try_it, capfd)


def mutated(content: bytes, spots):
    """Return bytes with a few changed, removed or inserted."""
    found = bytearray(content)
    for at, kind, byte in spots:
        place = at % max(1, len(found))
        if kind == "set" and found:
            found[place] = byte
        elif kind == "cut":
            del found[place : place + 1 + byte % 16]
        else:
            found[place:place] = bytes([byte]) * (1 + byte % 3)
    return bytes(found)


SPOTS = st.lists(
    st.tuples(st.integers(0, 2**24), st.sampled_from(["set", "cut", "put"]), st.integers(0, 255)),
    min_size=1,
    max_size=4,
)


def test_tokenizers(folders, tmp_path, capfd):
    root = shutil.copytree(folders[0], tmp_path / "model")
    (root / "unet/diffusion_pytorch_model.safetensors").unlink()  # not read
    vocab = json.loads((root / "tokenizer/vocab.json").read_text())
    merges = (root / "tokenizer/merges.txt").read_bytes()
    model = {"vocab": vocab, "merges": [], "end_of_word_suffix": "</w>"}
    some = st.dictionaries(st.one_of(TEXTS, st.sampled_from(sorted(vocab))), VALUES, max_size=4)
    strategy = st.one_of(
        st.tuples(st.just("vocab.json"), some.map(lambda c: json.dumps({**vocab, **c}).encode())),
        st.tuples(st.just("vocab.json"), some.map(lambda c: json.dumps(c).encode())),
        st.tuples(
            st.just("vocab.json"), SPOTS.map(lambda s: mutated(json.dumps(vocab).encode(), s))
        ),
        st.tuples(st.just("merges.txt"), SPOTS.map(lambda s: mutated(merges, s))),
        st.tuples(st.just("merges.txt"), st.binary(max_size=200)),
        st.tuples(
            st.just("tokenizer.json"),
            changes(model).map(lambda c: json.dumps({"model": changed(model, c)}).encode()),
        ),
        st.tuples(st.just("tokenizer_config.json"), some.map(lambda c: json.dumps(c).encode())),
        st.tuples(
            st.just("tokenizer_config.json"),
            changes(EXTRA["tokenizer_config.json"]).map(lambda c: json.dumps(c).encode()),
        ),
    )

    def try_it(example):
        name, content = example
        kept = {p.name: p.read_bytes() for p in (root / "tokenizer").iterdir()}
        (root / "tokenizer" / name).write_bytes(content)
        if name == "tokenizer.json":
            (root / "tokenizer/vocab.json").unlink()
        try:
            tokenizer = folder_tokenizer(Folder(root, "model"), 600, 16)
            ids = tokenizer.encode("an apple, 3 cats \U0001f34e").ids
            assert len(ids) == tokenizer.max_length <= 16
            assert all(0 <= i < 600 for i in ids)
        finally:
            (root / "tokenizer" / name).unlink()
            for file, before in kept.items():
                (root / "tokenizer" / file).write_bytes(before)

    fuzz("tokenizers", 120, strategy, try_it, capfd)


TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from([*ITEM_SIZES, "F4", "C64", "f32", ""]), VALUES),
        "shape": st.one_of(
            st.lists(st.sampled_from([0, 1, 2, 3, 2**31, 2**62, 2**63, -1, 1.0]), max_size=9),
            VALUES,
        ),
        "data_offsets": st.one_of(
            st.tuples(st.integers(0, 24), st.integers(0, 24)).map(list), VALUES
        ),
    },
)


def fitting(sizes):
    """Return a header whose tensors follow each other, which is mostly valid."""
    header, end = {}, 0
    for i, (dtype, shape) in enumerate(sizes):
        count = ITEM_SIZES[dtype]
        for side in shape:
            count *= side
        header[f"t{i}"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + count]}
        end += count
    return header, end


FITTING = st.lists(
    st.tuples(st.sampled_from(sorted(ITEM_SIZES)), st.lists(st.integers(0, 3), max_size=3)),
    max_size=4,
).map(fitting)


def test_safetensors_headers(tmp_path, capfd):
    path = tmp_path / "x.safetensors"
    strategy = st.one_of(
        st.tuples(
            st.dictionaries(TEXTS, st.one_of(TENSOR, VALUES), max_size=3), st.integers(0, 24)
        ),
        FITTING,
        st.tuples(FITTING, SPOTS).map(
            lambda e: (mutated(json.dumps(e[0][0]).encode(), e[1]), e[0][1])
        ),
    )

    def try_it(example):
        header, size = example
        raw_file(path, header, b"\0" * size)
        found = read_header(path)
        with safe_open(path, "pt") as file:  # what we take, the library takes for the same
            assert {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()} == {  # noqa: SIM118
                k: v.shape for k, v in found.tensors.items()
            }

    fuzz("safetensors headers", 150, strategy, try_it, capfd)


LONG = st.sampled_from((0, 1, 2, 8, 32, 64, 256, 2**20, 2**32 - 1, 2**62, 2**63, 2**64 - 1))
INTS = LONG.map(lambda number: struct.pack("<Q", number)[:4])
STRINGS = st.one_of(TEXTS, st.sampled_from(["general.alignment", f"{ORIGINAL_SHAPE}t0"])).map(
    lambda text: text.encode(errors="surrogatepass")
)
LISTS = st.builds(listed, st.integers(0, 13), LONG, st.binary(max_size=40))
ENTRIES = st.one_of(
    st.builds(entry, STRINGS, st.sampled_from([0, 4, 5, 6, 7, 10, 12]), st.binary(max_size=9)),
    st.builds(entry, STRINGS, st.just(4), INTS),
    st.builds(entry, STRINGS, st.just(8), STRINGS.map(gguf_text)),
    st.builds(entry, STRINGS, st.just(9), LISTS),
)
DIMS = st.lists(st.one_of(st.sampled_from([0, 1, 2, 32, 256]), LONG), max_size=5)
DESCRIBED = st.builds(described, st.sampled_from(["t0", "b"]), DIMS, st.integers(0, 42), LONG)


def placed(tensors, entries=()):
    """Return a file whose tensors follow each other. tensors: their types and dimensions."""
    told, end = [], 0
    for place, (kind, dims) in enumerate(tensors):
        numbers, size = gguf.GGML_QUANT_SIZES[kind]
        end += -end % 32
        told.append(described(f"t{place}", dims, kind, end))
        end += math.prod(dims) // numbers * size
    return framed(told, entries, b"\0" * end)


PLACED = st.builds(
    placed,
    st.lists(
        st.tuples(
            st.sampled_from([Kind.F32, Kind.F16, Kind.BF16, Kind.I8, *(Kind[k] for k in BLOCKS)]),
            st.lists(st.integers(1, 3), max_size=3).map(lambda dims: [256, *dims]),
        ),
        min_size=1,
        max_size=3,
    ),
    st.one_of(st.just([]), st.lists(ENTRIES, max_size=2)),
)


def overlaid(good, pieces):
    """Return bytes with pieces in place of others."""
    for at, piece in pieces:
        good = good[:at] + piece + good[at + len(piece) :]
    return good


def test_gguf_headers(tmp_path, capfd):
    path = tmp_path / "x.gguf"
    pieces = st.one_of(INTS, LISTS, ENTRIES, DESCRIBED)
    several = st.lists(st.tuples(st.integers(8, 160), pieces), min_size=1, max_size=2)
    words = entry("words", 9, listed(8, 2, gguf_text("a") + gguf_text("")))
    shape = entry(f"{ORIGINAL_SHAPE}t0", 9, listed(5, 3, struct.pack("<3i", 16, 2, 16)))
    good = placed([(Kind.Q4_K, (256, 2)), (Kind.F32, (3, 2))], [words, shape])
    strategy = st.one_of(
        PLACED,
        st.tuples(st.one_of(PLACED, st.just(good)), SPOTS).map(lambda e: mutated(*e)),
        st.tuples(st.just(good), several).map(lambda e: overlaid(*e)),
        st.tuples(PLACED, several).map(lambda e: spliced(*e)),
        st.builds(
            framed, st.lists(DESCRIBED, min_size=1, max_size=2), st.lists(ENTRIES, max_size=2)
        ),
    )

    def try_it(content):
        path.write_bytes(content)
        header = header_of(path)
        assert header.format == "gguf"
        theirs = gguf.GGUFReader(path).tensors  # what we take, the library takes for the same
        assert {t.name: (t.tensor_type.name, t.data_offset, t.n_bytes) for t in theirs} == {
            key: (t.dtype, header.start + t.start, t.end - t.start)
            for key, t in header.tensors.items()
        }
        with open_tensors(header) as read:
            for key, info in header.tensors.items():
                assert tuple(read(key).to(torch.float32).shape) == info.shape

    try_it(good)
    fuzz("gguf headers", 200, strategy, try_it, capfd, longest=200)


def test_gguf_tokenizers(tmp_path, capfd):
    path = tmp_path / "x.gguf"
    whole = [gguf_words(path, say()).read_bytes() for say in (t5_say, qwen_say)]
    numbers = st.one_of(INTS, LISTS, st.sampled_from([b"\0" * 4, b"\xff" * 4, b"\1\0\0\0"]))
    several = st.lists(st.tuples(st.integers(24, 500), numbers), min_size=1, max_size=3)
    strategy = st.one_of(
        st.tuples(st.sampled_from(whole), SPOTS).map(lambda e: mutated(*e)),
        st.tuples(st.sampled_from(whole), several).map(lambda e: overlaid(*e)),
    )

    def try_it(content):
        path.write_bytes(content)
        if gguf_home(header_of(path)) is not None:
            of_file(path).encode("ab a</s> b", 8, pad=False)

    for content in whole:
        try_it(content)
    fuzz("gguf tokenizers", 150, strategy, try_it, capfd, longest=200)


# --- LoRAs ----------------------------------------------------------------------------------------

SIDES = (0, 1, 2, 3, 4, 8, 24, 32, 33, 64, 256)
SPELLINGS = (
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "lora_unet_input_blocks_1_0_in_layers_2",
    "lora_unet_down_blocks_0_resnets_0_norm1",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
)
FAMILIES = tuple(
    [ending for ending in (*keys.WRITTEN, *keys.REFUSED) if mark in ending]
    for mark in ("lora_", "hada", "lokr", "1.weight", "oft", "diff", "norm", "weight", "alpha")
)


def adapter(parts):
    """Return the header of an adapter's file, and the bytes of its tensors."""
    header, end = {}, 0
    for key, dtype, shape in parts:
        size = math.prod(shape) * ITEM_SIZES[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return header, end


def tensors(endings):
    """Return some tensors of one kind of adapter, for one layer or several."""
    key = st.builds(
        str.__add__, st.sampled_from(SPELLINGS[:3] + SPELLINGS), st.sampled_from(endings)
    )
    key = st.one_of(key, key, key, TEXTS)
    shape = st.one_of(
        st.sampled_from([[2, 32], [32, 2], [2, 24], [24, 2], [32, 32], [], [1], [2, 32, 3, 3]]),
        st.lists(st.sampled_from(SIDES), max_size=4).filter(lambda s: math.prod(s) < 2**16),
    )
    dtype = st.sampled_from(["F32"] * 6 + ["F16", "BF16", "F8_E4M3", "I64", "BOOL"])
    return st.lists(
        st.tuples(key, dtype, shape), min_size=1, max_size=6, unique_by=lambda part: part[0]
    )


VALID = [
    {
        ".lora_down.weight": [2, 32],
        ".lora_up.weight": [32, 2],
        ".alpha": [],
        ".dora_scale": [32, 1],
    },
    {".hada_w1_a": [32, 2], ".hada_w1_b": [2, 32], ".hada_w2_a": [32, 2], ".hada_w2_b": [2, 32]},
    {".lokr_w1": [4, 4], ".lokr_w2_a": [8, 2], ".lokr_w2_b": [2, 8], ".alpha": [1]},
    {".a1.weight": [32, 2], ".a2.weight": [2, 32], ".b1.weight": [32, 2], ".b2.weight": [2, 32]},
    {".oft_blocks": [4, 8, 8], ".rescale": [32, 1]},
    {".oft_blocks": [2, 4, 8, 8], ".alpha": []},
    {".diff": [32, 32]},
    {".weight": [32], ".on_input": []},
]


@st.composite
def nearly_valid(draw):
    """Return the tensors of an adapter that fits, and perhaps one that does not."""
    shapes = draw(st.sampled_from(VALID))
    parts = [[SPELLINGS[0] + ending, "F32", shape] for ending, shape in shapes.items()]
    victim = draw(st.integers(0, len(parts) - 1))
    what = draw(st.sampled_from(["nothing", "nothing", "key", "dtype", "shape", "gone"]))
    if what == "gone":
        parts.pop(victim)
    elif what == "key":
        parts[victim][0] = draw(st.sampled_from(SPELLINGS)) + draw(st.sampled_from([*keys.WRITTEN]))
    elif what == "dtype":
        parts[victim][1] = draw(st.sampled_from(sorted(ITEM_SIZES)))
    elif what == "shape":
        parts[victim][2] = draw(st.lists(st.sampled_from(SIDES[:8]), max_size=4))
    return parts


def test_loras(folders, tmp_path, capfd):
    model = load_model(folders[0], device="cpu", dtype="float32", plain=True)
    before = {name: t.clone() for name, t in model.unet.state_dict().items()}
    told = st.one_of(st.just(None), TEXTS, VALUES.map(json.dumps))
    settings = changes(dict.fromkeys(("unet.lora_alpha", "unet.alpha_pattern", "unet.r"), 1))
    told = st.one_of(*[st.none()] * 6, told, settings.map(json.dumps))
    parts = st.one_of(nearly_valid(), st.sampled_from(FAMILIES).flatmap(tensors))
    strategy = st.tuples(parts, told, st.sampled_from([0, 1, 60, 60, 61, 188, 127, 255]))

    def try_it(example):
        parts, metadata, byte = example
        header, size = adapter(parts)
        if metadata is not None:
            header["__metadata__"] = {"lora_adapter_metadata": metadata[: 2**16]}
        path = raw_file(tmp_path / "a.safetensors", header, bytes([byte]) * size)
        model.adapters._files.clear()
        adapted = model.adapted([f"{path}:0.5"], unmatched="warn")
        assert adapted is not model

    for shapes in VALID:  # loads what takes long the first time
        parts = [[SPELLINGS[0] + ending, "F32", shape] for ending, shape in shapes.items()]
        try_it((parts, None, 60))
    fuzz("loras", 300, strategy, try_it, capfd)
    assert all(torch.equal(t, before[name]) for name, t in model.unet.state_dict().items())


# Instructions that build tables, those that build anything, and pieces of both.
PIECES = st.sampled_from(
    [
        *(b"}", b"]", b")", b"(", b"u", b"s", b"t", b"R", b"b", b"Q", b"q\x00", b"h\x00", b"K\x02"),
        *(b"N", b".", b"X\x01\x00\x00\x00a", b"\x8a\x08" + b"\x7f" * 8, b"S'\\o'\n"),
        *(b"cposix\nsystem\n", b"cbuiltins\nbytearray\n", b"ctorch._utils\n_rebuild_tensor_v2\n"),
        *(b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n"),
    ]
)


def test_pickles(tmp_path, capfd):
    """The program of a valid archive gets changed bytes or inserted pieces."""
    path = tmp_path / "x.ckpt"
    good = pickled({"state_dict": {"a": tensor(), "b": tensor(shape=(1, 2), stride=(2, 1))}})
    strategy = st.one_of(
        SPOTS.map(lambda spots: mutated(good, spots)),
        st.lists(st.tuples(st.integers(0, len(good)), PIECES), min_size=1, max_size=4).map(
            lambda pieces: spliced(good, pieces)
        ),
        st.lists(PIECES, max_size=30).map(lambda pieces: b"\x80\x02" + b"".join(pieces) + b"."),
    )

    def try_it(program):
        header = header_of(archived(path, program))
        with open_tensors(header) as read:  # what we take, the library takes for the same
            for key, info in header.tensors.items():
                assert read(key).numel() * 4 <= 8
                assert tuple(read(key).shape) == info.shape

    fuzz("pickles", 250, strategy, try_it, capfd)


def spliced(good, pieces):
    for at, piece in sorted(pieces, reverse=True):
        good = good[:at] + piece + good[at:]
    return good


# --- pictures ------------------------------------------------------------------------------------

RECIPE = {
    "safelight": "0.1.0",
    "model": {"name": "embedded", "sha256": "0123456789abcdef" * 4},
    "device": "cpu",
    "dtype": "float32",
    "drawn": {"exact": True, **machine.describe_machine(torch.device("cpu"))},
    "size": [64, 48],
    "settings": Request(prompt="a red apple", seed=5).to_dict(),
    "warnings": [],
}


def read_all(data):
    """Do everything that is done with a stranger's recipe before its model is loaded."""
    recipe = read_recipe(data)
    if "safelight" not in recipe:
        return
    recorded = machine.recorded_machine(recipe)
    with machine.threads_of(recorded):
        pass
    machine.expected_difference(recorded, RECIPE["drawn"], "float32")
    request = Request.from_dict(recipe["settings"])
    assert request.to_dict()


def test_recipes(capfd):
    image = Image.new("RGB", (16, 16))
    strategy = st.one_of(
        changes(RECIPE).map(lambda c: changed(RECIPE, c)),
        changes(RECIPE["settings"]).map(
            lambda c: {**RECIPE, "settings": changed(RECIPE["settings"], c)}
        ),
        changes(RECIPE["drawn"]).map(lambda c: {**RECIPE, "drawn": changed(RECIPE["drawn"], c)}),
        changes(RECIPE["model"]).map(lambda c: {**RECIPE, "model": changed(RECIPE["model"], c)}),
        SPOTS.map(lambda s: mutated(json.dumps(RECIPE).encode(), s).decode(errors="replace")),
    )

    def try_it(recipe):
        text = recipe if isinstance(recipe, str) else json.dumps(recipe)
        with contextlib.suppress(ValueError):  # a NUL, which no text chunk holds
            read_all(encode(image, "PNG", {"safelight": text}))

    fuzz("recipes", 150, strategy, try_it, capfd)


def chunk(kind, body, crc=None):
    check = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)


def picture():
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "PNG")
    return out.getvalue()


def test_text_chunks(capfd):
    plain = picture()
    header, rest = plain[:33], plain[33:]
    texts = png_texts({**RECIPE, "settings": {**RECIPE["settings"], "steps": 20}})
    body = st.one_of(
        st.binary(max_size=60),
        st.sampled_from(["safelight", "parameters"]).map(
            lambda k: k.encode() + b"\0" + texts[k].encode()
        ),
        st.tuples(
            st.sampled_from([b"safelight", b"parameters", b"", b"k" * 80]),
            st.sampled_from([b"\0", b"\0\0", b"\0\1", b"\0\1\0\0\0", b"\0\0\0\0\0", b""]),
            st.one_of(
                st.binary(max_size=60),
                st.binary(max_size=60).map(zlib.compress),
                SPOTS.map(lambda s: mutated(zlib.compress(texts["safelight"].encode()), s)),
                st.just(zlib.compress(b"a" * 2**22)),
            ),
        ).map(b"".join),
    )
    one = st.builds(
        chunk,
        st.one_of(
            st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"tIME", b"IEND"]),
            st.binary(min_size=4, max_size=4),
        ),
        body,
        st.one_of(st.none(), st.integers(0, 2**32 - 1)),
    )
    strategy = st.one_of(
        st.lists(one, max_size=4).map(lambda chunks: header + b"".join(chunks) + rest),
        st.tuples(st.lists(one, max_size=3), SPOTS).map(
            lambda e: mutated(header + b"".join(e[0]) + rest, e[1])
        ),
    )

    def try_it(data):
        with contextlib.suppress(SafelightError):
            open_picture(data)
        read_all(data)

    fuzz("text chunks", 150, strategy, try_it, capfd)


def test_parameters(capfd):
    made = recipe_text({**RECIPE, "settings": {**RECIPE["settings"], "steps": 20}})
    strategy = st.one_of(
        st.text(max_size=200),
        st.text(st.sampled_from('Steps: 1,"\\\n ,:é'), max_size=80).map(lambda t: made + t),
        SPOTS.map(lambda s: mutated(made.encode(), s).decode(errors="replace")),
    )
    fuzz("parameters", 150, strategy, parse_recipe_text, capfd)


def test_a_fuzzer_finds_what_is_planted(capfd):
    def planted(number):
        if number == 77:
            raise RecursionError

    with pytest.raises(RecursionError):
        fuzz("planted", 500, st.integers(0, 100), planted, capfd)


def test_the_files_of_the_fuzzers_are_there(folders):
    assert {Path(n).name for n in _jsons(folders[0])} >= {"config.json", "model_index.json"}
