"""A fine-tuning and a distillation, in one of two processes that test_train_folder starts.

Prints which files of the folder this process wrote, as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image

from safelight.train import distil, finetune
from safelight.train.plan import Plan

WRITING = set("wxa+")


def sheet(_: Any, path: Path, *__: Any, **___: Any) -> Image.Image:
    """Stand for `draw_sheet`, which takes seconds."""
    drawn = Image.new("RGB", (8, 8))
    drawn.save(path)
    return drawn


def learn(folder: Path) -> set[str]:
    """Train on folder/pictures and folder/prompts.txt; return what was written below `folder`."""
    written: set[str] = set()

    def note(event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and WRITING & set(str(given[1] or "")):
            path = Path(str(given[0]))
            if path.is_relative_to(folder):
                written.add(str(path.relative_to(folder)))

    sys.addaudithook(note)
    plan = Plan(steps=1, batch=1, learning_rate=1e-5)
    with mock.patch.object(finetune, "draw_sheet", sheet):
        finetune.finetune(folder / "pictures", folder / "fine", plan, size=64)
    with mock.patch.multiple(distil, draw_sheet=sheet, BATCH=1):
        distil.distil(folder / "prompts.txt", folder / "fast", plan, drawing_steps=1)
    return written


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(sorted(learn(Path(sys.argv[1])))))
