"""How fast this machine is with Safelight, and with what else is installed, in one run.

Stable Diffusion 1.5's networks with random weights of unit gain, the same for all. The contenders
take turns, so that what else the machine does meets them alike, and a product of two large
matrices between them tells what the processor gives at that moment. Report ratios: each is the
median of the ratios within a round.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safelight.engine import Engine
from safelight.engine.job import prepare
from safelight.errors import SafelightError
from safelight.families import Conditioning
from safelight.families.sd import VARIANTS
from safelight.fast import accelerate, native_bfloat16
from safelight.model import Model
from safelight.nets.unet import UNet2DConditionModel, UNetConfig
from safelight.nets.vae import AutoencoderKL, VAEConfig
from safelight.picture import from_tensor, to_tensor
from safelight.sampling import table
from safelight.sampling.schedule import SchedulerConfig

STEP_FLOP = 1.607e12
"""Of one guided step at 512×512 as it is usually computed, attention counted."""

SIDE = 64
"""Of the latents: the pictures have 512 pixels a side."""

State = dict[str, Tensor]
Run = Callable[[], Any]


def contenders() -> list[str]:
    """Those that can run here, ours first."""
    found = ["safelight float32", "diffusers float32", "openvino float32"]
    if native_bfloat16():
        found[1:1] = ["safelight bfloat16", "diffusers bfloat16", "openvino bfloat16"]
    return [name for name in found if importlib.util.find_spec(name.split()[0])]


PARTS = ("step", "decode", "picture", "start")


def run(
    names: Iterable[str],
    *,
    parts: Iterable[str] = PARTS,
    repeat: int = 5,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Steps, decodes, pictures and cold starts of the contenders named, `repeat` rounds each.

    Returns, for each of `parts`: "seconds" (the median of each contender), "times" (all of them),
    and "ratio" (how many times as long each took as each Safelight, the median over the rounds);
    beside them, but for "start", "matmul_gflops" and "error" (relative to diffusers, or Safelight,
    in float32). A picture takes 20 steps of dpmpp_2m and a decode, its text encoded before;
    OpenVINO, which brings no sampler, draws none.

    Raises SafelightError for names of contenders or parts that there are not.
    """
    names, parts = list(names), list(parts)
    unknown = [name for name in names if name not in contenders()]
    if unknown:
        raise SafelightError(
            f"{unknown[0]!r:.40} cannot run here; there are {', '.join(contenders())}"
        )
    strange = [part for part in parts if part not in PARTS]
    if strange:
        raise SafelightError(f"no part {strange[0]!r:.40}; there are {', '.join(PARTS)}")
    found: dict[str, Any] = {
        "cpu": torch.cpu.get_capabilities().get("architecture", ""),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "step_flop": STEP_FLOP,
    }
    with torch.inference_mode():
        if "step" in parts:
            log("a guided step of SD 1.5 at 512x512")
            found["step"] = _compare(_steps(names, log), repeat, log)
        if "decode" in parts:
            log("a decode to 512x512")
            found["decode"] = _compare(_decodes(names, log), repeat, log)
        if "picture" in parts:
            log("a picture of 512x512 in 20 steps")
            found["picture"] = _compare(_pictures(names, log), repeat, log)
    if "start" in parts:
        log("a first picture of embedded, from process start")
        found["start"] = _starts(names, repeat, log)
    return found


def _compare(runs: dict[str, Run], repeat: int, log: Callable[[str], None]) -> dict[str, Any]:
    outputs = {name: torch.as_tensor(run()).float() for name, run in runs.items()}  # and warm
    times: dict[str, list[float]] = {name: [] for name in runs}
    products = []
    for i in range(repeat):
        for name, run in runs.items():
            times[name].append(_seconds(run))
        products.append(_matmul_gflops())
        log(f"  round {i + 1}: " + ", ".join(f"{n} {t[-1]:.2f} s" for n, t in times.items()))
    exact = next((n for n in ("diffusers float32", "safelight float32") if n in outputs), None)
    found = _summary(times) | {"matmul_gflops": statistics.median(products)}
    if exact is not None:
        true = outputs[exact]
        found["error"] = {
            name: float((output - true).norm() / true.norm())
            for name, output in outputs.items()
            if name != exact
        }
    return found


def _summary(times: dict[str, list[float]]) -> dict[str, Any]:
    ours = [name for name in times if name.startswith("safelight")]
    return {
        "seconds": {name: statistics.median(t) for name, t in times.items()},
        "times": times,
        "ratio": {
            mine: {
                name: statistics.median(b / a for a, b in zip(times[mine], t, strict=True))
                for name, t in times.items()
                if name != mine
            }
            for mine in ours
        },
    }


def _seconds(run: Run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _matmul_gflops(n: int = 4096) -> float:
    dtype = torch.bfloat16 if native_bfloat16() else torch.float32
    a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
    torch.mm(a, b)
    return 2 * n**3 / _seconds(lambda: torch.mm(a, b)) / 1e9


# --- the networks --------------------------------------------------------------------------------


def _meta(network: Any, config: Any) -> Any:
    with torch.device("meta"):
        return network(config)


def _weights(net: nn.Module) -> State:
    """Random weights that keep the size of what passes through."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, like in net.state_dict().items():
        if like.dim() == 1:  # a bias, or the scale of a norm
            value = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            state[name] = torch.full(like.shape, value)
        else:
            gain = 1 / math.sqrt(like[0].numel())
            state[name] = torch.randn(like.shape, generator=generator) * gain
    return state


def _filled(net: nn.Module, state: State, dtype: torch.dtype) -> Any:
    net.load_state_dict({name: t.to(dtype) for name, t in state.items()}, assign=True)
    return net.eval().requires_grad_(False)


def _dtype(name: str) -> torch.dtype:
    return torch.bfloat16 if name.endswith("bfloat16") else torch.float32


def _ours(net: nn.Module, state: State, dtype: torch.dtype) -> Any:
    _filled(net, state, dtype)
    accelerate(net, dtype)
    return net


def _theirs(kind: str, config: dict[str, Any], state: State, dtype: torch.dtype) -> Any:
    """diffusers' network of the same config; in bfloat16 channels-last, which is its best."""
    import diffusers

    network = getattr(diffusers, kind)  # imported by this: not where "meta" is the default
    net = _filled(_meta(network.from_config, config), state, dtype)
    return net.to(memory_format=torch.channels_last) if dtype == torch.bfloat16 else net


def _compiled(net: nn.Module, inputs: tuple[Tensor, ...], name: str) -> Any:
    """`net`, in float32, as OpenVINO runs it."""
    openvino: Any = importlib.import_module("openvino")
    precision = "bf16" if _dtype(name) == torch.bfloat16 else "f32"
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    with warnings.catch_warnings():  # of tracing: the shapes are fixed here
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(net, example_input=inputs)
    return openvino.Core().compile_model(converted, "CPU", settings)


class _Step(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.unet(x, t, context).sample


class _Decode(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _config(part: str) -> dict[str, Any]:
    return dict(VARIANTS[0].configs[part])


def _steps(names: list[str], log: Callable[[str], None]) -> dict[str, Run]:
    config = _config("unet")
    state = _weights(_meta(UNet2DConditionModel, UNetConfig.from_dict(config)))
    generator = _seeded()
    x = torch.randn(1, 4, SIDE, SIDE, generator=generator)
    context = torch.randn(2, 77, config["cross_attention_dim"], generator=generator)

    def build(name: str) -> Run:
        dtype = _dtype(name)
        if name.startswith("safelight"):
            net = _ours(_meta(UNet2DConditionModel, UNetConfig.from_dict(config)), state, dtype)
            mine, text, t = x.to(dtype), context.to(dtype), torch.tensor([500.0])
            return lambda: net(mine, t, text)
        both, t = x.repeat(2, 1, 1, 1), torch.tensor([500.0, 500.0])
        if name.startswith("diffusers"):
            net = _theirs("UNet2DConditionModel", config, state, dtype)
            both, text = both.to(dtype), context.to(dtype)
            return lambda: net(both, t, text).sample
        net = _Step(_theirs("UNet2DConditionModel", config, state, torch.float32))
        compiled = _compiled(net, (both, t, context), name)
        return lambda: compiled((both.numpy(), t.numpy(), context.numpy()))[0]

    return _build(names, build, log)


def _decodes(names: list[str], log: Callable[[str], None]) -> dict[str, Run]:
    config = _config("vae")
    state = _weights(_meta(AutoencoderKL, VAEConfig.from_dict(config)))
    z = torch.randn(1, 4, SIDE, SIDE, generator=_seeded())

    def build(name: str) -> Run:
        dtype = _dtype(name)
        if name.startswith("safelight"):
            net = _ours(_meta(AutoencoderKL, VAEConfig.from_dict(config)), state, dtype)
            return lambda: net.decode(z.to(dtype))
        if name.startswith("diffusers"):
            net = _theirs("AutoencoderKL", config, state, dtype)
            return lambda: net.decode(z.to(dtype)).sample
        net = _Decode(_theirs("AutoencoderKL", config, state, torch.float32))
        compiled = _compiled(net, (z,), name)
        return lambda: compiled((z.numpy(),))[0]

    return _build(names, build, log)


def _pictures(names: list[str], log: Callable[[str], None]) -> dict[str, Run]:
    """Whole pictures, of the same noise; the two networks are those of the parts above."""
    family = VARIANTS[0]
    unet, vae = _config("unet"), _config("vae")
    state = _weights(_meta(UNet2DConditionModel, UNetConfig.from_dict(unet)))
    vae_state = _weights(_meta(AutoencoderKL, VAEConfig.from_dict(vae)))
    context = torch.randn(2, 77, unet["cross_attention_dim"], generator=_seeded())

    def build(name: str) -> Run:
        dtype = _dtype(name)
        if name.startswith("safelight"):
            model = Model(
                name="random",
                path="",
                sha256="",
                family=family,
                parts={
                    "unet": _ours(
                        _meta(UNet2DConditionModel, UNetConfig.from_dict(unet)), state, dtype
                    ),
                    "vae": _ours(_meta(AutoencoderKL, VAEConfig.from_dict(vae)), vae_state, dtype),
                },
                scheduler=SchedulerConfig.from_dict(family.scheduler_config),
                words=None,
                native_size=(512, 512),
                device=torch.device("cpu"),
                dtype=dtype,
            )
            return lambda: _our_picture(model, context.to(dtype))
        nets = (
            _theirs("UNet2DConditionModel", unet, state, dtype),
            _theirs("AutoencoderKL", vae, vae_state, dtype),
        )
        return lambda: _their_picture(*nets, dict(family.scheduler_config), context.to(dtype))

    return _build([name for name in names if not name.startswith("openvino")], build, log)


def _our_picture(model: Model, context: Tensor) -> Tensor:
    rows = table("dpmpp_2m", model.scheduler, 20)
    side = SIDE * model.vae.config.factor
    engine = Engine(model)
    conditioning = Conditioning(context, guidance=7.5)
    ticket = engine.add_job(prepare(model, rows, conditioning, 1, (side, side)))
    while engine.busy:
        engine.step()
    assert ticket.image is not None
    return to_tensor(ticket.image)


def _their_picture(unet: Any, vae: Any, config: dict[str, Any], context: Tensor) -> Tensor:
    """As diffusers' pipeline goes about it, with the text encoded before."""
    diffusers: Any = importlib.import_module("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config)
    scheduler.set_timesteps(20)
    x = torch.randn(1, 4, SIDE, SIDE, generator=_seeded()).to(context.dtype)
    for t in scheduler.timesteps:
        plain, told = unet(torch.cat([x, x]), t, context).sample.chunk(2)
        x = scheduler.step(plain + 7.5 * (told - plain), t, x).prev_sample
    pixels = vae.decode(x / vae.config.scaling_factor).sample.float()
    return to_tensor(from_tensor(pixels))


def _build(
    names: list[str], build: Callable[[str], Run], log: Callable[[str], None]
) -> dict[str, Run]:
    runs = {}
    for name in names:
        log(f"  preparing {name}")
        runs[name] = build(name)
    return runs


# --- from process start --------------------------------------------------------------------------

_DIFFUSERS = """
import sys, torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(
    sys.argv[1], torch_dtype=getattr(torch, sys.argv[3]), safety_checker=None
)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(1)
image = pipe("a red apple", num_inference_steps=20, generator=generator, height=64, width=64)
image.images[0].save(sys.argv[2])
"""


def _starts(names: list[str], repeat: int, log: Callable[[str], None]) -> dict[str, Any]:
    """Processes that load `embedded` and draw one picture in 20 steps of dpmpp_2m."""
    from safelight.weights.find import MODELS

    with tempfile.TemporaryDirectory(prefix="safelight-") as folder:
        out = Path(folder) / "picture.png"

        def command(name: str) -> list[str]:
            precision = name.split()[1]
            if name.startswith("diffusers"):
                model = str(MODELS / "embedded")
                return [
                    sys.executable,
                    "-W",
                    "ignore",
                    "-c",
                    _DIFFUSERS,
                    model,
                    str(out),
                    precision,
                ]
            options = [
                "--steps",
                "20",
                "--sampler",
                "dpmpp_2m",
                "--seed",
                "1",
                "--overwrite",
                "--dtype",
            ]
            start = [sys.executable, "-m", "safelight", "generate", "a red apple"]
            return [*start, *options, precision, "--out", str(out)]

        known = [name for name in names if not name.startswith("openvino")]
        times: dict[str, list[float]] = {name: [] for name in known}
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled modules are part of an install
        for i in range(repeat + 1):
            for name in known:
                began = time.perf_counter()
                done = subprocess.run(
                    command(name), capture_output=True, text=True, env=environment
                )
                if done.returncode:
                    raise SafelightError(f"{name} did not start: {done.stderr.strip()[-200:]}")
                if i:  # the first fills the file cache
                    times[name].append(time.perf_counter() - began)
            if i:
                log(f"  round {i}: " + ", ".join(f"{n} {t[-1]:.2f} s" for n, t in times.items()))
    return _summary(times)
