"""The states of both of SDXL's text encoders in each dialect, against independent references."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from safelight.engine.requests import resolve_request
from safelight.families.base import Conditioning
from safelight.model import Model
from safelight.request import Request
from safelight.weights import load_model
from tests.parity.sdxl_models import UNET, make_folder
from tests.prompt import reference

BOUND = 1e-5
TEXTS = [
    "a (red:1.3) house",
    "((a castle)), [a lake], 8k!",
    "a knight @! in light " * 25,
    "(oil painting:0.4) of a lake, " * 20,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("words") / "base", UNET)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """transformers' encoders and tokenizers."""
    kinds = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
    encoders = [
        kind.from_pretrained(folder / f"text_encoder{end}").eval()
        for kind, end in zip(kinds, ("", "_2"), strict=True)
    ]
    tokenizers = [
        transformers.CLIPTokenizer.from_pretrained(folder / f"tokenizer{end}") for end in ("", "_2")
    ]
    return SimpleNamespace(encoders=encoders, tokenizers=tokenizers)


class Words:
    """The first tokenizer with the second one's padding: A1111 and ComfyUI read words alike."""

    def __init__(self, tokenizer: Any, pad: int) -> None:
        self._tokenizer, self.pad_token_id = tokenizer, pad

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class Raw:
    """An encoder whose states are read without the final norm."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._encoder(*args, **kwargs)

    def final_layer_norm(self, states: Tensor) -> Tensor:
        return states


def encode(model: Model, text: str, syntax: Any, **settings: Any) -> Conditioning:
    request = Request(prompt=text, prompt_syntax=syntax, steps=10, seed=1, **settings)
    with torch.inference_mode():
        return model.family.encode(model, resolve_request(model, request))


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    scale = max(1.0, wanted.abs().max().item())
    assert (found - wanted).abs().max().item() <= BOUND * scale


def readers(theirs: Any) -> list[tuple[Words, Raw]]:
    pads = (theirs.tokenizers[0].pad_token_id, 0)
    return [
        (Words(theirs.tokenizers[0], pad), Raw(encoder))
        for pad, encoder in zip(pads, theirs.encoders, strict=True)
    ]


def pooled(theirs: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return theirs.encoders[1](torch.tensor([ids])).text_embeds


@pytest.mark.parametrize("text", TEXTS)
def test_a1111(model: Model, theirs: Any, text: str) -> None:
    """Weighted states of both encoders are joined; the first chunk is pooled without weights."""
    made = encode(model, text, "a1111", empty_negative="encoded", clip_skip=3)
    parts = [reference.a1111_states(*reader, [text], clip_skip=2)[0] for reader in readers(theirs)]
    assert made.tokens is not None
    assert made.pooled is not None
    close(made.tokens[1:], torch.cat(parts, dim=-1))
    [(ids, _), *_] = reference.a1111_chunks(readers(theirs)[1][0], reference.a1111_emphasis(text))
    close(made.pooled[1:], pooled(theirs, ids))


@pytest.mark.parametrize("text", TEXTS)
def test_comfy(model: Model, theirs: Any, text: str) -> None:
    made = encode(model, text, "comfy")
    parts = [reference.comfy_states(*reader, text, clip_skip=2) for reader in readers(theirs)]
    assert made.tokens is not None
    assert made.pooled is not None
    close(made.tokens[1:], torch.cat(parts, dim=-1))
    [(ids, _), *_] = reference.comfy_chunks(readers(theirs)[1][0], text)
    close(made.pooled[1:], pooled(theirs, ids))
    last = encode(model, text, "comfy", clip_skip=1).tokens
    parts = [reference.comfy_states(*reader, text, clip_skip=1) for reader in readers(theirs)]
    assert last is not None
    close(last[1:], torch.cat(parts, dim=-1))


@pytest.mark.parametrize("text", ["a (red)++ house", "a tall- knight", "a lake. " * 60])
def test_compel(model: Model, theirs: Any, text: str) -> None:
    compel = pytest.importorskip("compel")
    kind = compel.ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
    reader = compel.Compel(
        tokenizer=theirs.tokenizers,
        text_encoder=theirs.encoders,
        returned_embeddings_type=kind,
        requires_pooled=[False, True],
        truncate_long_prompts=False,
    )
    tokens, of_all = reader(text)
    made = encode(model, text, "compel")
    assert made.tokens is not None
    assert made.pooled is not None
    close(made.tokens[1:], tokens)
    close(made.pooled[1:], of_all)


def test_stages_have_pooled_states_of_their_own(model: Model) -> None:
    made = encode(model, "a [cat:dog:5]", "a1111")
    [(step, then)] = made.later
    assert step == 6  # as in the web UI, one later than written
    for now, text in ((made, "a cat"), (then, "a dog")):
        assert now.pooled is not None
        alone = encode(model, text, "a1111").pooled
        assert alone is not None
        close(now.pooled[1:], alone[1:])


@pytest.mark.parametrize(
    ("syntax", "rule", "zeros"),
    [
        ("a1111", None, True),
        ("a1111", "encoded", False),
        ("comfy", None, False),
        ("comfy", "zeros", True),
        ("compel", None, True),
        ("plain", "model", True),
    ],
)
def test_empty_negative_prompts(model: Model, syntax: str, rule: Any, zeros: bool) -> None:
    made = encode(model, "a cat", syntax, empty_negative=rule)
    assert made.tokens is not None
    assert made.pooled is not None
    assert (made.tokens[0].abs().max().item() == 0) is zeros
    assert (made.pooled[0].abs().max().item() == 0) is zeros
    other = encode(model, "a cat", syntax, empty_negative=rule, negative_prompt="a dog").tokens
    assert other is not None
    assert other[0].abs().max() > 0


def test_parts_of_and_are_rows_of_all_that_is_told(model: Model) -> None:
    made = encode(model, "a cat AND a dog : 0.5", "a1111", negative_prompt="fog")
    tensors = (made.tokens, made.pooled, made.sizes)
    assert [None if t is None else len(t) for t in tensors] == [3, 3, 3]
    assert made.weights == (1.0, 0.5)
    picture = model.generate("a cat AND a dog", prompt_syntax="a1111", steps=2, seed=1)
    assert picture.images


def test_what_does_nothing_is_said(model: Model) -> None:
    said = model.generate("a cat", prompt_syntax="a1111", clip_skip=2, steps=1, seed=1).warnings
    assert "clip_skip does nothing with SDXL in prompt_syntax a1111" in said
