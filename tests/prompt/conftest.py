from types import SimpleNamespace

import pytest
import torch

from safelight.nets.clip import CLIPTextConfig, CLIPTextModel
from safelight.prompt.tokenizer import clip_tokenizer

CONFIG = {
    "vocab_size": 49408,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
EOS = "<|endoftext|>"


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """Return a tiny random CLIP, ours and transformers', with CLIP's own vocabulary."""
    import transformers

    torch.manual_seed(0)
    ours = CLIPTextModel(CLIPTextConfig.from_dict(CONFIG)).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = clip_tokenizer(EOS, 77)
    tokenizer.save(folder)
    theirs = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**CONFIG, attn_implementation="eager")
    ).eval()
    prefix = "" if "text_model.final_layer_norm.weight" in theirs.state_dict() else "text_model."
    same = {name.removeprefix(prefix): tensor for name, tensor in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(same, strict=False)
    assert not unexpected
    assert all("position_ids" in name for name in missing)
    return SimpleNamespace(
        tokenizer=tokenizer,
        encoder=ours,
        hf_tokenizer=transformers.CLIPTokenizer.from_pretrained(folder),
        hf_encoder=theirs,
    )
