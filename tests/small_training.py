"""A short training on the digits. test_train_folder kills it in a process of its own."""

import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from safelight.train import unconditional as u
from safelight.train.plan import Plan


def learn(out: Path) -> None:
    small = {"block_out_channels": (16, 16, 16), "norm_num_groups": 8, "attention_head_dim": 8}
    how = {
        "CHECKPOINT_EVERY": 8,
        "draw_sheet": lambda *_: None,
        "network": lambda size: replace(u.PIXELS, sample_size=size, **small),
    }
    plan = Plan(steps=63, batch=2, learning_rate=1e-3, warmup=5)
    with mock.patch.multiple(u, **how):
        u.unconditional("digits", out, plan, size=16)


if __name__ == "__main__":
    torch.set_num_threads(1)
    learn(Path(sys.argv[1]))
