"""The training loop: one for the autoencoder and for all denoisers.

A step's data and noise depend on the seed and the step's number alone, so a run that was killed
and goes on from its last checkpoint sees what an undisturbed run sees.

accelerate handles devices, also several at once: `accelerate launch -m safelight train …`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.interrupt import ctrl_c_waits
from safelight.picture import reason
from safelight.train.board import Board
from safelight.train.devices import accelerator, check_compiler, compiled, memory_told
from safelight.train.export import writing
from safelight.train.graphs import Steps
from safelight.train.losses import Losses
from safelight.train.out import hold, make_folder, save_whole
from safelight.train.plan import PACE, Plan

LOOKS = 20
"""Steps on a GPU between two checks that the loss is finite. If it is not in so many steps in a
row, training ends. Such a step changes no weight."""


@dataclass
class Draw:
    """The randomness of one step: numpy's for the data, torch's for the noise.

    Noise is drawn on the device that uses it, because a GPU would have to wait for the CPU's. A
    seed gives the same noise on devices of one kind.
    """

    data: np.random.Generator
    noise: torch.Generator
    device: torch.device | str = "cpu"
    step: int = 0
    number: Tensor | None = None
    """The step's number on the device, if steps are recorded: then Python's decisions by `step` are
    made only once, for all steps.
    """

    @classmethod
    def of(
        cls,
        seed: int,
        step: int,
        rank: int = 0,
        device: str | torch.device = "cpu",
        steps: Steps | None = None,
    ) -> Draw:
        """Return the randomness of a step.

        rank: of several processes that train together, each with its own share of the data. steps:
        recorded ones, whose generator and number on the device are used.
        """
        key = [seed, step, rank] if rank else [seed, step]
        torch_seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
        noise = torch.Generator(device) if steps is None else steps.noise
        number = None if steps is None else steps.number.fill_(step)
        return cls(np.random.default_rng(key), noise.manual_seed(torch_seed), device, step, number)

    def pick(self, count: int, n: int) -> Tensor:
        """Return n of the numbers from 0 to count − 1, int64, on the device."""
        return torch.randint(count, (n,), generator=self.noise, device=self.device)

    def normal(self, shape: Iterable[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.noise, device=self.device)

    def uniform(self, shape: Iterable[int]) -> Tensor:
        return torch.rand(tuple(shape), generator=self.noise, device=self.device)


Loss = Callable[[Any, Draw], Tensor]
"""Runs the network on data that it draws itself, and returns a scalar."""

Show = Callable[[Any, int], Image.Image | None]
"""Is given the network with its averaged weights, and the step; may draw a sheet of samples."""


def progress(line: str) -> None:
    """Write a line to stderr: stdout is for results."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


@memory_told()
def fit(
    net: nn.Module,
    loss_of: Loss,
    plan: Plan,
    folder: Path,
    *,
    every: int = 500,
    native: bool = False,
    on_device: bool = False,
    log: Callable[[str], None] = progress,
    on_checkpoint: Show | None = None,
    also: Mapping[str, Any] | None = None,
) -> None:
    """Train `net`, in place: in the end it holds its averaged (EMA) weights.

    on_device: `loss_of` takes its data from the device and nothing from `Draw.data`, so a GPU can
    do whole steps without Python (see `graphs.Steps`).

    also: what `loss_of` changes besides, such as a discriminator and its optimizer; their
    state_dict() is kept in the checkpoint, too.

    Every `every` steps, and at Ctrl-C, the state goes to folder/checkpoint.pt, by a rename; loss,
    learning rate and what on_checkpoint drew go to folder/tensorboard. With `native` the network
    is compiled first. Raises SafelightError when the folder holds the checkpoint of another plan,
    when the loss is not finite for LOOKS steps in a row, or when a file cannot be written.
    """
    make_folder(folder)
    machine = accelerator()
    net.to(machine.device)
    if machine.device.type == "cuda":
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    params = list(net.parameters())
    average = [p.detach().clone() for p in params]
    graphed = on_device and machine.device.type == "cuda" and machine.num_processes == 1
    optimizer = torch.optim.AdamW(
        params,
        lr=plan.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=plan.weight_decay,
        fused=True,
    )
    path, pace_path = folder / "checkpoint.pt", folder / "steps"
    if plan.seconds is not None and pace_path.exists():
        plan = plan.paced(int(pace_path.read_text()))
    start, losses = 0, Losses(machine.device)
    if path.exists():
        start, before = _resume(path, plan, params, average, optimizer, also or {})
        losses = Losses(machine.device, before)
    for group in optimizer.param_groups:
        # A recorded step reads its learning rate from the device.
        group["capturable"] = graphed
        group["lr"] = torch.zeros((), device=machine.device) if graphed else 0.0
    run, optimizer = machine.prepare(compiled(net, native), optimizer)
    if plan.steps and start >= plan.steps:
        _copy(average, params)
        return
    chief = machine.is_main_process
    board = Board(folder / "tensorboard", start) if chief else None
    began, saved, marked = time.monotonic(), start, 0.0
    # Steps for one figure of the loss. A short training also has twenty figures.
    window = 100 if plan.seconds is not None else min(100, max(1, plan.steps // 20))

    def save(step: int) -> None:
        nonlocal saved
        if board is not None and step > saved:
            state = {
                "plan": json.dumps(asdict(plan)),
                "step": step,
                "line": losses.state,
                "params": [p.detach() for p in params],
                "average": average,
                "optimizer": optimizer.state_dict(),
                "also": {name: part.state_dict() for name, part in (also or {}).items()},
            }
            kept = f"that of step {saved} is kept" if saved else "there is none yet"
            save_whole(path, state, f"the checkpoint of step {step}", kept)
            saved = step

    adam: Any = optimizer.optimizer

    def once(draw: Draw) -> Tensor:
        """Do a step; returns its loss, NaN if the step changed nothing."""
        loss = loss_of(run, draw)
        machine.backward(loss)
        norm = machine.clip_grad_norm_(params, 1.0)
        finite = torch.isfinite(norm) & torch.isfinite(loss.detach())
        # PyTorch's gradient scalers tell the optimizer in this way to leave a step out.
        adam.found_inf = (~finite).float()
        optimizer.step()
        return torch.where(finite, loss.detach(), math.nan)

    steps = Steps(once, optimizer, log) if graphed else None
    step = start
    try:
        while not plan.steps or step < plan.steps:
            # Only between two steps is the state complete for a checkpoint.
            with ctrl_c_waits():
                _set_rate(optimizer, plan.rate(step))
                draw = Draw.of(plan.seed, step, machine.process_index, machine.device, steps)
                if steps is None:
                    loss = once(draw)
                    optimizer.zero_grad(set_to_none=True)
                else:
                    loss = steps.do(draw)
                # Early on the average follows closely, or it would keep the random start for long.
                keep = min(plan.ema, (1 + step) / (10 + step))
                with torch.no_grad():
                    _towards(average, params, 1 - keep)
                losses.add(loss)
                looks = machine.device.type == "cpu" or losses.steps % LOOKS == 0
                most = min(LOOKS, plan.steps or LOOKS)
                if looks and losses.diverged(most):
                    raise SafelightError(
                        f"the loss is not finite at step {step}, nor at the {most - 1} before it: "
                        f"a lower learning rate than {plan.learning_rate:g} would help; the last "
                        f"checkpoint is {path}"
                    )
                step += 1
            if not plan.steps and step - start in PACE:
                losses.wait()
                if step - start == PACE[0]:
                    marked = time.monotonic()
                else:
                    plan = _agreed(_paced(plan, step, began, marked))
                    if chief:
                        with writing(pace_path):
                            pace_path.write_text(str(plan.steps))
            if board is not None and (step % window == 0 or step == plan.steps):
                pace = (time.monotonic() - began) / (step - start)
                losses.report(plan, step, pace, log, board, machine.num_processes)
            if step % every == 0 or step == plan.steps:
                save(step)
                if board is not None and on_checkpoint is not None:
                    with _averaged(params, average):
                        sheet = on_checkpoint(net, step)
                    if sheet is not None:
                        board.add_image("samples", sheet, step)
    except KeyboardInterrupt:
        with ctrl_c_waits():  # in the studio the server's end is a second one
            save(step)
            if chief:
                log(f"stopped after step {step}: the same command goes on from there")
        raise
    finally:
        if board is not None:
            board.close()
    machine.wait_for_everyone()  # what the first process has written is read next
    _copy(average, params)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _paced(plan: Plan, step: int, began: float, marked: float) -> Plan:
    """Return a plan of seconds with its number of steps, from the pace since `marked`.

    began, marked: `time.monotonic` at the first step, and PACE[0] steps later.
    """
    assert plan.seconds is not None
    now = time.monotonic()
    pace = (now - marked) / (PACE[1] - PACE[0])
    return plan.paced(step + max(1, round((plan.seconds - (now - began)) / pace)))


def _agreed(plan: Plan) -> Plan:
    """Return the first process's plan: processes that take different steps wait for ever."""
    from accelerate.utils import broadcast_object_list

    [first] = broadcast_object_list([plan])
    return first


@contextmanager
def _averaged(params: list[nn.Parameter], average: list[Tensor]) -> Iterator[None]:
    """Let the parameters hold their averages within the block."""
    held = [p.detach().clone() for p in params]
    _copy(average, params)
    yield
    _copy(held, params)


def _towards(held: list[Tensor], values: list[nn.Parameter], share: float) -> None:
    """Move `held` by a share of the way to `values`, in few calls of the device."""
    torch._foreach_mul_(held, 1 - share)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(held, list[Tensor](values), alpha=share)  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def _copy(values: Iterable[Tensor], into: Iterable[Tensor]) -> None:
    for target, value in zip(into, values, strict=True):
        target.copy_(value)


def check_plan(folder: Path, plan: Plan, *, native: bool = False) -> None:
    """Make the folder of a run. Raises SafelightError if it holds another plan's checkpoint.

    The first process keeps other trainings out of the folder until it ends.

    Also raises SafelightError if the folder cannot be made or another training writes to it, or if
    a package that training needs is missing, or with `native` the compiler. `fit` checks all but
    the other training as well, but only after pictures were drawn and files were written into the
    model beside the checkpoint.
    """
    accelerator()
    if native:
        check_compiler()
    make_folder(folder)
    if (folder / "checkpoint.pt").exists():
        # Mapped: the tensors are never read.
        _load(folder / "checkpoint.pt", plan, mmap=True)
    if accelerator().is_main_process:
        hold(folder)


def _load(path: Path, plan: Plan, *, mmap: bool = False) -> tuple[dict[str, Any], int]:
    """Return a checkpoint and its step. Raises SafelightError if it is not of this plan."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
        step, made_by = int(state["step"]), Plan(**json.loads(state["plan"]))
    except Exception as error:  # for a damaged file it raises anything
        raise SafelightError(
            f"{path} is not a checkpoint of ours ({reason(error)}): remove it to begin anew"
        ) from None
    if not plan.agrees(made_by, step):
        raise SafelightError(
            f"{path} was made by other settings ({_difference(made_by, plan)}): give another "
            "folder, or the same settings to go on"
        )
    return state, step


def _resume(
    path: Path,
    plan: Plan,
    params: list[nn.Parameter],
    average: list[Tensor],
    optimizer: torch.optim.Optimizer,
    also: Mapping[str, Any],
) -> tuple[int, tuple[int, int, float]]:
    """Load a checkpoint; return the step to go on from, and the state of the log's current line.

    That state is the steps, those that were finite, and the sum of their losses.
    """
    state, step = _load(path, plan)
    _copy(state["params"], params)
    _copy(state["average"], average)
    optimizer.load_state_dict(state["optimizer"])
    for name, part in also.items():
        part.load_state_dict(state["also"][name])
    return step, state.get("line", (0, 0, 0.0))


def _difference(old: Plan, new: Plan) -> str:
    was, wanted = asdict(old), asdict(new)
    other = [name for name in was if was[name] != wanted[name]]
    return ", ".join(
        "the pictures, captions, prompts, size, base model or an option such as --min-snr changed"
        if name == "recipe"
        else f"{name} was {was[name]}, now {wanted[name]}"
        for name in other
    )
