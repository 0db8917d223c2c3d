"""The contenders' networks: Stable Diffusion 1.5's, of random weights that are the same for all."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from safelight.engine import Engine
from safelight.engine.job import prepare
from safelight.engine.shortcuts import Kept, Shortcuts, shortened
from safelight.families import Conditioning
from safelight.families.sd import VARIANTS
from safelight.fast import accelerate, native_bfloat16
from safelight.model import Model
from safelight.nets.unet import UNet2DConditionModel, UNetConfig
from safelight.nets.vae import AutoencoderKL, VAEConfig
from safelight.picture import from_tensor, to_tensor
from safelight.request import Request
from safelight.sampling.schedule import SchedulerConfig

SIDE = 64
"""Side of the latents: the pictures have 512 pixels a side."""

State = dict[str, Tensor]
Run = Callable[[], Any]


def meta(network: Any, config: Any) -> Any:
    with torch.device("meta"):
        return network(config)


def weights(net: nn.Module, dtype: torch.dtype = torch.float32) -> State:
    """Return random weights that keep the scale of activations."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, like in net.state_dict().items():
        if like.dim() == 1:  # a bias, or the scale of a norm
            value = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            state[name] = torch.full(like.shape, value, dtype=dtype)
        else:
            gain = 1 / math.sqrt(like[0].numel())
            state[name] = (torch.randn(like.shape, generator=generator) * gain).to(dtype)
    return state


def _filled(net: nn.Module, state: State, dtype: torch.dtype) -> Any:
    net.load_state_dict({name: t.to(dtype) for name, t in state.items()}, assign=True)
    return net.eval().requires_grad_(False)


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if name.endswith("bfloat16") else torch.float32


def ours(net: nn.Module, state: State, dtype: torch.dtype) -> Any:
    _filled(net, state, dtype)
    accelerate(net, dtype)
    return net


def theirs(kind: str, config: dict[str, Any], state: State, dtype: torch.dtype) -> Any:
    """Return diffusers' network of the same config; in bfloat16 channels-last, its fastest."""
    import diffusers

    network = getattr(diffusers, kind)  # this imports it, outside of `meta`'s default device
    net = _filled(meta(network.from_config, config), state, dtype)
    return net.to(memory_format=torch.channels_last) if dtype == torch.bfloat16 else net


def by_openvino(net: nn.Module, inputs: tuple[Tensor, ...], name: str) -> Callable[..., Tensor]:
    """Return a function that runs `net`, which is in float32, by OpenVINO.

    For int8, nncf quantises weights and activations, by the ranges that these inputs give. What
    stays a float is bfloat16 if the processor has it.
    """
    openvino: Any = importlib.import_module("openvino")
    low = dtype_of(name) == torch.bfloat16 or (name.endswith("int8") and native_bfloat16())
    precision = "bf16" if low else "f32"
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    with warnings.catch_warnings():  # tracing warns of fixed shapes, which they are here
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(net, example_input=inputs)
    if name.endswith("int8"):
        converted = _quantised(converted, inputs)
    compiled = openvino.Core().compile_model(converted, "CPU", settings)
    return lambda *given: torch.from_numpy(compiled([one.numpy() for one in given])[0])


def _quantised(model: Any, inputs: tuple[Tensor, ...]) -> Any:
    nncf: Any = importlib.import_module("nncf")
    one = nncf.Dataset([[tensor.numpy() for tensor in inputs]])
    return nncf.quantize(model, one, subset_size=1, model_type=nncf.ModelType.TRANSFORMER)


class Step(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.unet(x, t, context).sample


class Decode(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _config(part: str) -> dict[str, Any]:
    return dict(VARIANTS[0].configs[part])


def steps(names: list[str], log: Callable[[str], None]) -> dict[str, Run]:
    config = _config("unet")
    state = _unet_weights(config)
    generator = _seeded()
    x = torch.randn(1, 4, SIDE, SIDE, generator=generator)
    context = torch.randn(2, 77, config["cross_attention_dim"], generator=generator)

    def build(name: str) -> Run:
        dtype = dtype_of(name)
        if name.startswith("safelight"):
            net = ours(meta(UNet2DConditionModel, UNetConfig.from_dict(config)), state, dtype)
            mine, text, t = x.to(dtype), context.to(dtype), torch.tensor([500.0])
            return lambda: net(mine, t, text)
        both, t = x.repeat(2, 1, 1, 1), torch.tensor([500.0, 500.0])
        if name.startswith("diffusers"):
            net = theirs("UNet2DConditionModel", config, state, dtype)
            both, text = both.to(dtype), context.to(dtype)
            return lambda: net(both, t, text).sample
        net = Step(theirs("UNet2DConditionModel", config, state, torch.float32))
        run = by_openvino(net, (both, t, context), name)
        return lambda: run(both, t, context)

    return build_all(names, build, log)


def decodes(names: list[str], log: Callable[[str], None]) -> dict[str, Run]:
    config = _config("vae")
    state = _vae_weights(config)
    z = torch.randn(1, 4, SIDE, SIDE, generator=_seeded())

    def build(name: str) -> Run:
        dtype = dtype_of(name)
        if name.startswith("safelight"):
            net = ours(meta(AutoencoderKL, VAEConfig.from_dict(config)), state, dtype)
            return lambda: net.decode(z.to(dtype))
        if name.startswith("diffusers"):
            net = theirs("AutoencoderKL", config, state, dtype)
            return lambda: net.decode(z.to(dtype)).sample
        net = Decode(theirs("AutoencoderKL", config, state, torch.float32))
        run = by_openvino(net, (z,), name)
        return lambda: run(z)

    return build_all(names, build, log)


def pictures(names: list[str], log: Callable[[str], None]) -> dict[str, Run]:
    """Return what draws whole pictures, all from the same noise, with the two networks above."""
    unet, vae = _config("unet"), _config("vae")
    unet_state, vae_state = _unet_weights(unet), _vae_weights(vae)
    context = torch.randn(2, 77, unet["cross_attention_dim"], generator=_seeded())

    def build(name: str) -> Run:
        dtype = dtype_of(name)
        if name.startswith("safelight"):
            model = _model(unet_state, vae_state, dtype)
            return lambda: _our_picture(model, context.to(dtype), {})
        own = torch.float32 if name.startswith("openvino") else dtype  # OpenVINO converts itself
        net = Step(theirs("UNet2DConditionModel", unet, unet_state, own))
        decoder = Decode(theirs("AutoencoderKL", vae, vae_state, own))
        text = context.to(own)
        runs: list[Callable[..., Tensor]] = [net, decoder]
        if name.startswith("openvino"):
            z, t = torch.zeros(1, 4, SIDE, SIDE), torch.zeros(2)
            runs = [
                by_openvino(net, (torch.cat([z, z]), t, text), name),
                by_openvino(decoder, (z,), name),
            ]
        scheduler, scale = (
            dict(VARIANTS[0].scheduler_config),
            VAEConfig.from_dict(vae).scaling_factor,
        )
        return lambda: _their_picture(runs[0], runs[1], scheduler, text, scale)

    return build_all(names, build, log)


def fast_pictures(dtype: str, log: Callable[[str], None]) -> Callable[[dict[str, Any]], Tensor]:
    """Return a function that draws a whole picture by Safelight with settings of the fast mode."""
    log(f"  preparing safelight {dtype}")
    unet, vae = _config("unet"), _config("vae")
    model = _model(_unet_weights(unet), _vae_weights(vae), dtype_of(dtype))
    context = torch.randn(2, 77, unet["cross_attention_dim"], generator=_seeded())
    return lambda asked: _our_picture(model, context.to(model.dtype), asked)


def _unet_weights(config: dict[str, Any]) -> State:
    return weights(meta(UNet2DConditionModel, UNetConfig.from_dict(config)))


def _vae_weights(config: dict[str, Any]) -> State:
    return weights(meta(AutoencoderKL, VAEConfig.from_dict(config)))


def _model(unet: State, vae: State, dtype: torch.dtype) -> Model:
    """Return Stable Diffusion 1.5 of random weights, without a text encoder."""
    family = VARIANTS[0]
    net = meta(UNet2DConditionModel, UNetConfig.from_dict(_config("unet")))
    decoder = meta(AutoencoderKL, VAEConfig.from_dict(_config("vae")))
    return Model(
        name="random",
        path="",
        sha256="",
        family=family,
        parts={"unet": ours(net, unet, dtype), "vae": ours(decoder, vae, dtype)},
        scheduler=SchedulerConfig.from_dict(family.scheduler_config),
        words=None,
        native_size=(512, 512),
        device=torch.device("cpu"),
        dtype=dtype,
    )


def _our_picture(model: Model, context: Tensor, asked: dict[str, Any]) -> Tensor:
    request = shortened(Request(seed=1, **asked), model)
    request = request.with_defaults({"sampler": "dpmpp_2m", "steps": 20})
    side = SIDE * model.vae.config.factor
    engine = Engine(model)
    conditioning = Conditioning(context, guidance=7.5)
    job = prepare(model, model.family.table(model, request), conditioning, 1, (side, side))
    job.kept = Kept(Shortcuts.of(request))
    ticket = engine.add_job(job)
    while engine.busy:
        engine.step()
    assert ticket.image is not None
    return to_tensor(ticket.image)


def _their_picture(
    step: Callable[..., Tensor],
    decode: Callable[..., Tensor],
    config: dict[str, Any],
    context: Tensor,
    scale: float,
) -> Tensor:
    """Draw a picture as diffusers' pipeline does, with the text encoded before.

    step, decode: the two networks. scale: of the autoencoder.
    """
    diffusers: Any = importlib.import_module("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config)
    scheduler.set_timesteps(20)
    x = torch.randn(1, 4, SIDE, SIDE, generator=_seeded()).to(context.dtype)
    for t in scheduler.timesteps:
        plain, told = step(torch.cat([x, x]), t.expand(2).float(), context).chunk(2)
        x = scheduler.step(plain + 7.5 * (told - plain), t, x).prev_sample
    pixels = decode(x / scale).float()
    return to_tensor(from_tensor(pixels))


def build_all(
    names: list[str], build: Callable[[str], Run], log: Callable[[str], None]
) -> dict[str, Run]:
    runs = {}
    for name in names:
        log(f"  preparing {name}")
        runs[name] = build(name)
    return runs
