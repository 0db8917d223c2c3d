"""The command line, on a model that draws one plain colour for each seed."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import safelight
from safelight import cli
from safelight.cli.output import note
from safelight.errors import SafelightError
from safelight.interrupt import ctrl_c_waits
from safelight.picture import save_png
from safelight.recipe import enlarge, png_texts, read_recipe
from safelight.request import Request
from safelight.result import Result
from safelight.sampling import SAMPLERS
from safelight.settings import settings_of
from safelight.sizes import unlike_native
from safelight.storage import storage_at

DIGEST = "ab" * 32


class PlainModel:
    """Replaces a loaded model, and remembers its requests."""

    def __init__(self):
        self.sha256 = DIGEST
        self.name, self.native_size = "plain", (64, 64)
        self.family = SimpleNamespace(areas=None)
        self.device = SimpleNamespace(type="meta")
        self.loaded, self.other_vae, self.refiner, self.control = [], None, None, None
        self.other_parts, self.image_prompts = None, {}
        self.upscalers = SimpleNamespace(files={})
        self.requests = []
        self.warnings = []
        self.before_step = lambda: None
        self.shift = 0

    def load(self, name, device, dtype, **how):
        self.loaded.append((name, device, dtype))
        return self

    def stream(self, request):
        self.requests.append(request)
        return PlainRun(self, request)

    def generate(self, request, on_step):
        run = self.stream(request)
        for step in run:
            on_step(step)
        return run.result


class PlainRun:
    """Replaces an engine's run: pictures of one colour."""

    def __init__(self, model, request):
        self.model, self.request = model, request
        self.made = None

    def __iter__(self):
        model, request = self.model, self.request
        seeds = list(range(request.seed, request.seed + request.count))
        steps = request.steps or 4
        self.made = Result(
            images=[],
            seeds=seeds,
            settings={**request.to_dict(), "steps": steps},
            model=model.loaded[-1][0],
            sha256=model.sha256,
            device="cpu",
            dtype="float32",
            warnings=list(model.warnings),
            timings={"total": 0.25},
        )
        for i, seed in enumerate(seeds):
            for step in range(1, steps + 1):
                model.before_step()
                yield SimpleNamespace(image_index=i, step=step, steps=steps)
            size = (request.width or 64, request.height or 64)
            colour = ((seed + model.shift) % 256, 9, 9)
            self.made.images.append(Image.new("RGB", size, colour))

    @property
    def result(self):
        return self.made


@pytest.fixture
def model(monkeypatch, tmp_path):
    plain = PlainModel()
    monkeypatch.setitem(vars(safelight), "load", plain.load)
    monkeypatch.chdir(tmp_path)
    return plain


@pytest.fixture
def run(capsys):
    def run(*arguments):
        code = cli.run(arguments)
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return run


def refused(done, *parts):
    """Return whether a run ended with one line of error and nothing else."""
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    for part in parts:
        assert part in done.err
    return True


class TestGenerate:
    def test_prints_the_path_and_nothing_else(self, run, model, tmp_path):
        done = run("generate", "a red apple", "--seed", "7")
        assert (done.code, done.out, done.err) == (0, "safelight-7.png\n", "")
        assert model.loaded == [("embedded", "auto", "auto")]
        assert read_recipe(tmp_path / "safelight-7.png")["settings"]["prompt"] == "a red apple"

    def test_every_option_arrives(self, run, model, tmp_path):
        Image.new("RGB", (64, 72), "red").save("in.png")
        Image.new("L", (64, 72), 255).save("mask.png")
        done = run(
            *("generate", "a cat", "--negative-prompt", "dog", "--width", "64", "--height", "72"),
            *("--steps", "3", "--guidance-scale", "5.5", "--seed", "9", "--count", "2"),
            *("--sampler", "ddim", "--schedule", "karras", "--spacing", "trailing"),
            *("--model", "some/model", "--image", "in.png", "--mask", "mask.png"),
            *("--strength", "0.5", "--eta", "0.25", "--device", "cpu", "--dtype", "float32"),
            *("--out", "new/b.png"),
        )
        assert (done.code, done.err) == (0, "")
        assert done.out.splitlines() == [str(Path("new") / f"b-{i}.png") for i in (1, 2)]
        assert model.loaded == [("some/model", "cpu", "float32")]
        with Image.open("in.png") as image, Image.open("mask.png") as mask:
            assert model.requests == [
                Request(
                    prompt="a cat",
                    negative_prompt="dog",
                    width=64,
                    height=72,
                    steps=3,
                    guidance_scale=5.5,
                    seed=9,
                    count=2,
                    sampler="ddim",
                    schedule="karras",
                    spacing="trailing",
                    image=image,
                    mask=mask,
                    strength=0.5,
                    eta=0.25,
                )
            ]

    @pytest.mark.parametrize(
        ("arguments", "name", "value"),
        [
            (["-s", "7"], "seed", 7),
            (["-n", "2"], "count", 2),
            (["-W", "72"], "width", 72),
            (["-H", "72"], "height", 72),
            (["--cfg-scale", "3"], "guidance_scale", 3),
            (["--cfg-scale=3"], "guidance_scale", 3),
            (["--num-inference-steps", "9"], "steps", 9),
            (["--sampler", "Euler a"], "sampler", "euler_a"),
            (["--sampler", "DPM++ 2M Karras"], "schedule", "karras"),
            (["--sampler", "DPMSolverMultistepScheduler"], "sampler", "dpmpp_2m"),
        ],
    )
    def test_short_options_and_those_of_other_programs(self, run, model, arguments, name, value):
        done = run("generate", "a", *arguments)
        assert (done.code, done.err) == (0, "")
        assert getattr(model.requests[0], name) == value

    def test_what_follows_two_dashes_is_no_option(self, run, model):
        assert run("generate", "--", "--cfg-scale").code == 0
        assert model.requests[0].prompt == "--cfg-scale"

    def test_a_seed_of_minus_one_is_random(self, run, model):
        for _ in range(2):
            assert run("generate", "a", "--seed", "-1").code == 0
        one, two = (request.seed for request in model.requests)
        assert one != two

    @pytest.mark.parametrize("end", ["png", "jpg", "webp"])
    def test_the_seed_and_the_format_in_the_name(self, run, model, end):
        done = run("generate", "a", "-n", "2", "-s", "5", "-o", f"cat-{{seed}}.{end}")
        assert done.out.split() == [f"cat-5.{end}", f"cat-6.{end}"]
        with Image.open(f"cat-5.{end}") as image:
            assert image.format == {"jpg": "JPEG"}.get(end, end.upper())

    @pytest.mark.parametrize("size", [["-W", "512"], ["-W", "256", "-H", "256"]])
    def test_a_size_far_from_the_model_s_own_is_told_before_the_work(self, run, model, size):
        said = []
        model.before_step = lambda: said.append(1) or (_ for _ in ()).throw(SafelightError("end"))
        done = run("generate", "a", *size)
        assert done.err.startswith("warning: plain was trained on 64x64: ")
        assert "times as long; leave out --width and --height" in done.err

    def test_the_size_of_a_picture_is_told_as_such(self, run, model):
        Image.new("RGB", (256, 256)).save("photo.png")
        done = run("generate", "a", "--image", "photo.png")
        assert "256x256 will hardly show" in done.err
        assert "; give --width 64 --height 64, or enlarge the result" in done.err

    def test_a_phone_s_photo_gets_the_model_s_own_size_as_advice(self, run, model):
        Image.new("RGB", (4032, 3024)).save("photo.png")
        done = run("generate", "a dog", "--image", "photo.png")
        assert refused(done, "image is 4032x3024", "ask for width 296 and height 224")
        assert model.loaded == []
        model.native_size = (256, 256)
        assert run("generate", "a", "--image", "photo.png", "-W", "296", "-H", "224").err == ""
        done = run("generate", "a dog", "--image", "photo.png", "--model", "none")
        assert refused(done, "ask for width 592 and height 440")

    def test_a_size_is_warned_of_once(self, run, model):
        own = unlike_native("plain", (64, 64), (512, 768))
        model.warnings = [own, "another"]
        done = run("generate", "a", "-W", "512", "-H", "768", "--json")
        assert done.err.count("plain was trained on") == 1
        assert done.err.endswith("warning: another\n")
        assert json.loads(done.out)["warnings"] == [own, "another"]

    def test_what_no_model_could_draw_is_refused_before_one_is_loaded(self, run, model):
        Image.new("L", (4000, 64)).save("wide.png")
        refused(run("generate", "a", "--image", "wide.png"), "image is 4000x64", "ask for width")
        Image.new("L", (64, 64)).save("edges.png")
        refused(run("generate", "a", "--control-image", "edges.png"), "give one with --controlnet")
        assert model.loaded == []

    @pytest.mark.parametrize(
        ("side", "size", "told"),
        [(256, 512, True), (256, 384, True), (256, 264, False), (512, 768, False)],
    )
    def test_a_small_model_s_bound_is_near_its_own_size(self, run, model, side, size, told):
        model.native_size = (side, side)
        err = run("generate", "a", "-W", f"{size}", "-H", f"{size}").err
        assert (f"{size}x{size} will hardly show what was asked for" in err) == told

    def test_a_model_of_many_sizes_tells_itself_what_it_draws_badly(self, run, model):
        model.family.areas, model.native_size = (0.2, 2.5), (1024, 1024)
        model.warnings = ["its own"]
        assert run("generate", "a", "-W", "464", "-H", "464").err == "warning: its own\n"

    @pytest.mark.parametrize("size", [["-W", "128"], ["-W", "72", "-H", "64"], []])
    def test_a_size_near_it_is_not(self, run, model, size):
        assert run("generate", "a", *size).err == ""

    def test_unconditional_has_a_model_of_its_own(self, run, model):
        assert run("generate", "--unconditional", "--seed", "1").code == 0
        assert model.loaded[0][0] == "embedded-unconditional"
        assert model.requests[0].unconditional

    def test_json(self, run, model):
        model.warnings = ["the prompt was cut"]
        done = run("generate", "a", "--seed", "3", "--count", "2", "--json")
        told = json.loads(done.out)
        assert told["paths"] == ["safelight-3.png", "safelight-4.png"]
        assert told["seeds"] == [3, 4]
        assert told["settings"]["prompt"] == "a"
        assert told["warnings"] == ["the prompt was cut"]
        assert told["timings"] == {"total": 0.25}
        assert done.err == "warning: the prompt was cut\n"

    def test_the_same_command_twice_gives_the_same_bytes_under_two_names(
        self, run, tmp_path, model
    ):
        for _ in range(2):
            run("generate", "a", "--seed", "3")
        one, two = tmp_path / "safelight-3.png", tmp_path / "safelight-3-2.png"
        assert one.read_bytes() == two.read_bytes()

    def test_a_file_that_exists_is_kept_unless_asked(self, run, model, tmp_path):
        path = tmp_path / "a.png"
        path.write_text("mine")
        told = "'a.png' exists: give another name, or --overwrite (in Python overwrite=True)"
        assert refused(run("generate", "a", "--out", "a.png"), told)
        assert path.read_text() == "mine"
        assert model.loaded == []
        assert run("generate", "a", "--out", "a.png", "--overwrite").code == 0
        assert read_recipe(path)

    def test_a_home_directory_that_the_shell_left(self, run, model, monkeypatch, tmp_path):
        for name in ("HOME", "USERPROFILE"):
            monkeypatch.setenv(name, str(tmp_path / "home"))
        (tmp_path / "home").mkdir()
        Image.new("RGB", (64, 64), "red").save("home/in.png")
        (tmp_path / "home" / "styles.csv").write_text("name,prompt,negative_prompt\ninky,ink,\n")
        done = run(
            *("generate", "a", "--image=~/in.png", "--out=~/a.png"),
            *("--styles-file=~/styles.csv", "--style=inky"),
        )
        assert (done.code, done.err) == (0, "")
        assert done.out == f"{tmp_path / 'home' / 'a.png'}\n"
        assert not (tmp_path / "~").exists()
        assert storage_at("~/batch").root == str(tmp_path / "home" / "batch")

    def test_show(self, run, model, monkeypatch):
        shown = []
        monkeypatch.setattr("typer.launch", lambda path: shown.append(path) or 0)
        run("generate", "a", "--seed", "3", "--count", "2", "--show")
        assert shown == ["safelight-3.png", "safelight-4.png"]

    def test_show_without_a_viewer_is_a_warning(self, run, model, monkeypatch):
        monkeypatch.setattr("typer.launch", lambda path: 3)
        done = run("generate", "a", "--seed", "3", "--show")
        assert (done.code, done.out) == (0, "safelight-3.png\n")
        assert done.err.startswith("warning: no viewer")

    def test_what_is_printed_cannot_drive_the_terminal(self, run, model):
        model.warnings = ["a\x1b[2Jb\nc"]
        assert run("generate", "a").err == "warning: a\\x1b[2Jb\\nc\n"


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ([], "PROMPT"),
            (["a", "--sampler", "eulr"], "euler"),
            (["a", "--scheduler", "karras"], "give it as schedule (--schedule karras)"),
            (["a", "--width", "100"], "multiple of 8"),
            (["a", "--height", "2056"], "2048"),
            (["a", "--steps", "0"], "1 to 1000"),
            (["a", "--steps", "1001"], "1 to 1000"),
            (["a", "--steps", "3.5"], "--steps"),
            (["a", "--count", "65"], "1 to 64"),
            (["a", "--seed", "-2"], "seed"),
            (["a", "--seed", "9" * 30], "seed"),
            (["a", "--strength", "0"], "strength"),
            (["a", "--strength", "nan"], "strength"),
            (["a", "--guidance-scale", "nan"], "guidance_scale"),
            (["a", "--guidance-scale", "inf"], "guidance_scale"),
            (["a", "--eta", "nan"], "eta"),
            (["a", "--schedule", "linear"], "karras"),
            (["a", "--spacing", "even"], "trailing"),
            (["a", "--image", "none.png"], "none.png"),
            (["a", "--image", "text.png"], "PNG, JPEG or WebP"),
            (["a", "--image", "."], "folder"),
            (["a", "--image", "red.png", "--mask", "text.png"], "mask"),
            (["a", "--image", "red.png", "--mask", "small.png"], "64x64, not 8x8"),
            (["a", "--mask", "red.png"], "picture"),
            (["a", "--unconditional"], "prompt"),
            (["--unconditional", "--image", "red.png"], "image"),
            (["x" * 16385], "16 KiB"),
            (["a", "--out", "a.gif"], ".png, .jpg, .jpeg, .webp"),
            (["a", "--out", "-"], "must be a folder or a name"),
            (["a", "--sampler", "DPM++ 2M Karras", "--schedule", "beta"], "schedule"),
            (["a", "--cfgscale", "3"], "--guidance-scale"),
            (["a", "--out", "text.png/a.png"], "cannot be written"),
            (["a", "--out", "a" * 300 + ".png"], "cannot be written"),
            (["a", "--bogus"], "--bogus"),
            (["a", "b"], '(b): put the prompt in quotes, as in safelight generate "a red apple"'),
        ],
    )
    def test_is_one_line_and_nothing_written(self, run, model, tmp_path, arguments, named):
        Image.new("RGB", (64, 64), "red").save("red.png")
        Image.new("RGB", (8, 8), "red").save("small.png")
        (tmp_path / "text.png").write_text("no picture")
        before = sorted(tmp_path.rglob("*"))
        assert refused(run("generate", *arguments), named)
        assert sorted(tmp_path.rglob("*")) == before
        assert model.loaded == []

    def test_a_full_disk_is_known_before_the_work(self, run, model, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
        assert refused(run("generate", "a", "--count", "64"), "1 MiB free and 64 are needed")
        assert model.loaded == []

    def test_a_disk_that_fills_during_the_work(self, run, model, monkeypatch, tmp_path):
        def full(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        assert refused(run("generate", "a"), "No space left on device")
        assert list(tmp_path.iterdir()) == []

    def test_an_error_of_the_model(self, run, model):
        def fail():
            raise SafelightError("the picture has a NaN")

        model.before_step = fail
        assert refused(run("generate", "a"), "the picture has a NaN")

    def test_a_fault_of_ours_keeps_its_traceback(self, model):
        def fail():
            raise ZeroDivisionError

        model.before_step = fail
        with pytest.raises(ZeroDivisionError):
            cli.run(["generate", "a"])

    def test_an_unknown_command(self, run):
        assert refused(run("paint"), "paint")


class TestInterrupted:
    def interrupt(self):
        raise KeyboardInterrupt

    def test_during_a_step(self, run, model, tmp_path):
        model.before_step = self.interrupt
        done = run("generate", "a")
        assert (done.code, done.out, done.err) == (130, "", "stopped\n")
        assert list(tmp_path.iterdir()) == []

    def test_as_a_picture_is_written(self, run, model, monkeypatch):
        monkeypatch.setattr(
            "safelight.picture._sync_folder", lambda _: signal.raise_signal(signal.SIGINT)
        )
        done = run("generate", "a", "--seed", "3")
        assert (done.code, done.out, done.err) == (130, "safelight-3.png\n", "stopped\n")

    def test_ctrl_c_waits_where_it_must(self):
        reached = False
        with pytest.raises(KeyboardInterrupt), ctrl_c_waits():  # noqa: PT012
            signal.raise_signal(signal.SIGINT)
            reached = True
        assert reached
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_an_ignored_ctrl_c_stays_ignored(self):
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with ctrl_c_waits():
                signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGINT, before)

    @pytest.mark.parametrize("step", [5, 6])  # of four for each picture
    def test_what_is_made_stays(self, run, model, tmp_path, step):
        taken = []

        def at_the_second_picture():
            taken.append(1)
            if len(taken) == step:
                self.interrupt()

        model.before_step = at_the_second_picture
        done = run("generate", "a", "--count", "3", "--steps", "4", "--seed", "1")
        assert (done.code, done.out, done.err) == (130, "safelight-1.png\n", "stopped\n")
        assert [path.name for path in tmp_path.iterdir()] == ["safelight-1.png"]
        assert read_recipe(tmp_path / "safelight-1.png")["settings"]["seed"] == 1

    def test_what_is_made_before_an_error_stays(self, run, model, tmp_path):
        taken = []

        def at_the_second_picture():
            taken.append(1)
            if len(taken) == 5:
                raise SafelightError("not finite")

        model.before_step = at_the_second_picture
        done = run("generate", "a", "--count", "2", "--steps", "4", "--seed", "1")
        assert (done.code, done.out) == (2, "safelight-1.png\n")
        assert "not finite" in done.err
        assert [path.name for path in tmp_path.iterdir()] == ["safelight-1.png"]

    @pytest.mark.parametrize("as_json", [False, True])
    def test_what_is_saved_before_the_disk_is_full_is_told(self, run, model, monkeypatch, as_json):
        save = Result.save_one

        def full(result, i, path, **how):
            if i == 1:
                raise SafelightError("the disk is full")
            save(result, i, path, **how)

        monkeypatch.setattr(Result, "save_one", full)
        done = run("generate", "a", "-n", "2", "-s", "1", *(["--json"] if as_json else []))
        assert (done.code, done.err) == (2, "error: the disk is full\n")
        paths = json.loads(done.out)["paths"] if as_json else done.out.splitlines()
        assert paths == ["safelight-1.png"]

    def test_a_finished_picture_that_cannot_be_saved_is_told(self, run, model, monkeypatch):
        taken = []

        def at_the_second_picture():
            taken.append(1)
            if len(taken) == 5:
                self.interrupt()

        def full(result, i, path, **how):
            raise SafelightError("the disk is full")

        model.before_step = at_the_second_picture
        monkeypatch.setattr(Result, "save_one", full)
        done = run("generate", "a", "-n", "2", "--steps", "4", "-s", "1")
        assert (done.code, done.err) == (130, "warning: the disk is full\nstopped\n")

    def test_during_saving(self, run, model, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "fsync", lambda _: self.interrupt())
        (tmp_path / "a.png").write_text("mine")
        done = run("generate", "a", "--out", "a.png", "--overwrite")
        assert (done.code, done.out, done.err) == (130, "", "stopped\n")
        assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]

    @pytest.mark.skipif(os.name == "nt", reason="signals")
    def test_by_a_real_signal(self, tmp_path):
        driver = (
            "import time, safelight; from safelight.__main__ import main\n"
            "class Device: type = 'meta'\n"
            "class Slow:\n"
            "    name, native_size, device = 'slow', (64, 64), Device\n"
            "    class family: areas = None\n"
            "    def stream(self, request):\n"
            "        print('started', flush=True); time.sleep(60)\n"
            "safelight.load = lambda *a, **k: Slow()\n"
            "main()"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", driver, "generate", "a"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A suite that was started in the background ignores Ctrl-C, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out, err) == (130, "", "stopped\n")
        assert list(tmp_path.iterdir()) == []


class TestProgress:
    def test_on_a_terminal(self, model, capsys, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "80")
        model.before_step = lambda: time.sleep(0.15)
        assert cli.run(["generate", "a", "--seed", "1", "--count", "2"]) == 0
        told = capsys.readouterr()
        assert told.out == "safelight-1.png\nsafelight-2.png\n"
        assert "picture 2 of 2, step" in told.err
        assert "/8" in told.err
        assert "0:00:0" in told.err


class TestTools:
    def test_samplers(self, run):
        done = run("samplers")
        assert [line.split()[0] for line in done.out.splitlines()] == ["NAME", *SAMPLERS]
        assert "DPM++ 2M" in done.out

    def test_samplers_json(self, run):
        told = {entry["name"]: entry for entry in json.loads(run("samplers", "--json").out)}
        assert list(told) == list(SAMPLERS)
        assert told["ddim"]["eta"] is True
        assert told["euler_a"]["a1111"] == "Euler a"

    def test_models(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        names = [line.split()[0] for line in run("models").out.splitlines()]
        assert names == ["NAME", "embedded", "embedded-fast", "embedded-unconditional"]
        assert len(json.loads(run("models", "--json").out)) == 3

    def test_inspect_a_picture(self, run, model):
        run("generate", "a \x1b[31mred\x1b[0m apple", "--seed", "3")
        lines = run("inspect", "safelight-3.png").out.splitlines()
        assert "settings.prompt: a \\x1b[31mred\\x1b[0m apple" in lines
        assert "model.sha256: " + DIGEST in lines
        assert "settings.sampler: pndm" in lines  # the model's default is another
        assert not [line for line in lines if "aesthetic_score" in line or "syntax" in line]
        lines = run("inspect", "safelight-3.png", "--all").out.splitlines()
        assert "settings.prompt_syntax: plain" in lines
        told = json.loads(run("inspect", "safelight-3.png", "--json").out)
        assert told == read_recipe("safelight-3.png")

    def test_inspect_a_checkpoint(self, run, monkeypatch):
        asked = []
        found = {"family": "sd1", "components": {"unet": {"bytes": 7}}, "native_size": (64, 64)}
        monkeypatch.setattr(
            "safelight.weights.summary.inspect", lambda f, models_dir: asked.append(f) or found
        )
        lines = run("inspect", "some/model").out.splitlines()
        assert lines == ["family: sd1", "components.unet.bytes: 7", "native_size: 64, 64"]
        assert asked == ["some/model"]

    def test_inspect_nothing(self, run, model):
        assert refused(run("inspect", "none.safetensors"))
        assert refused(run("inspect", "a\0b"))

    def test_verify(self, run, model):
        run("generate", "a", "--seed", "3", "--count", "2", "--out", "a.png")
        for name in ("a-1.png", "a-2.png"):
            done = run("verify", name)
            assert (done.code, done.out, done.err) == (0, "0\n", "")
        assert model.requests[-1].seed == 4
        assert model.loaded[-1] == ("embedded", "cpu", "float32")

    def test_verify_tells_the_largest_difference(self, run, model):
        run("generate", "a", "--seed", "3", "--out", "a.png")
        model.shift = 5
        done = run("verify", "a.png")
        silent = "its recipe does not say what machine it was drawn on\n"
        assert (done.code, done.out, done.err) == (1, "5\n", silent)

    def test_verify_with_another_model(self, run, model):
        run("generate", "a", "--out", "a.png")
        model.sha256 = "cd" * 32
        done = run("verify", "a.png", "--model", "other", "--device", "cuda", "--dtype", "float16")
        assert refused(done, "abababab", "cdcdcdcd", "--model")
        assert model.loaded[-1] == ("other", "cuda", "float16")

    def test_verify_needs_the_picture_it_started_from(self, run, model):
        Image.new("RGB", (64, 64), "red").save("in.png")
        Image.new("RGB", (64, 64), "blue").save("other.png")
        run("generate", "a", "--image", "in.png", "--out", "a.png")
        done = run("verify", "a.png")
        assert refused(done, "image is needed again", ": give it with --image\n")
        assert refused(run("verify", "a.png", "--image", "other.png"), "image must be the one")
        assert run("verify", "a.png", "--image", "in.png").out == "0\n"
        assert run("verify", "a.png", "--init-image", "in.png").out == "0\n"

    def test_verify_a_picture_that_was_enlarged(self, run, model):
        run("generate", "a", "--seed", "3", "--out", "a.png")
        recipe = read_recipe("a.png")
        with Image.open("a.png") as image:
            large, told = enlarge(image, recipe, (160, 96))
        save_png(large, "large.png", png_texts(told))
        assert run("verify", "large.png").out == "0\n"
        save_png(large, "untold.png", png_texts(recipe))
        assert refused(run("verify", "untold.png"), "different sizes")

    def test_verify_a_picture_of_other_programs(self, run, model):
        Image.new("RGB", (64, 64), "red").save("in.png")
        assert refused(run("verify", "in.png"), "no recipe")


class TestHelp:
    def command(self, *arguments):
        return [sys.executable, "-m", "safelight", *arguments]

    def test_without_a_command(self, run):
        assert run().out == run("--help").out
        for arguments in (["--version"], ["--version", "samplers"]):
            done = run(*arguments)
            assert (done.code, done.out) == (0, f"safelight {safelight.__version__}\n")

    @pytest.mark.parametrize("group", ["keys", "train"])
    def test_a_group_without_a_command(self, run, group):
        done = run(group)
        assert (done.code, done.err) == (0, "")
        assert done.out == run(group, "--help").out
        assert run(group, "x").err == "error: No such command 'x'.\n"

    @pytest.mark.parametrize(
        ("arguments", "needed"),
        [
            (["--help"], []),
            (["--version"], []),
            (["serve", "--help"], []),
            # Its options are made from Request, whose pictures are PIL's.
            (["generate", "--help"], ["PIL", "safelight.request"]),
        ],
    )
    def test_imports_nothing_heavy(self, arguments, needed):
        code = (
            "import sys; from safelight import cli; cli.run(sys.argv[1:])\n"
            "print([m for m in ('torch', 'numpy', 'diffusers', 'huggingface_hub', 'fastapi', 'PIL',"
            f" 'safelight.request') if m in sys.modules and m not in {needed}])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1] == "[]"

    def test_a_picture_needs_no_compiler(self, tmp_path):
        code = (
            "import sys; from safelight import cli\n"
            "try: cli.run(sys.argv[1:])\n"
            "except SystemExit: pass\n"
            "print([m for m in ('torch._dynamo', 'sympy', 'diffusers', 'transformers',"
            " 'huggingface_hub') if m in sys.modules])"
        )
        arguments = ["generate", "a red apple", "--steps", "2", "--out", str(tmp_path / "a.png")]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True
        )
        assert (tmp_path / "a.png").exists()
        assert done.stdout.splitlines()[-1] == "[]"

    def test_names_the_defaults_of_a_request(self, run):
        text = " ".join(run("generate", "--help").out.split())
        assert f"[the model's own, else {Request().guidance_scale}]" in text
        assert f"[the model's own, else {Request().sampler}]" in text
        assert f"[{Request().count}]" in text

    def test_options_that_few_need_stand_last(self, run):
        text = run("generate", "--help").out
        headings = re.findall(r"^(\w.*):$", text, re.MULTILINE)
        first = ["Arguments", "Options", "Settings", "Model and folders"]
        rest = ["Inpainting", "ControlNet", "Second pass", "IP-Adapter", "SDXL", "Fast mode"]
        assert headings == [*first, *rest]
        parts = dict(zip(headings, re.split(r"^\w.*:$", text, flags=re.MULTILINE)[1:], strict=True))
        assert all(name in parts["Options"] for name in ("--model", "--out", "--help"))
        assert "--steps" in parts["Settings"]
        assert "--device" in parts["Model and folders"]
        assert "--hires-scale" in parts["Second pass"]
        assert "--crop-left" in parts["SDXL"]
        assert "--cache-every" in parts["Fast mode"]

    def test_what_a_command_does_fits_its_line(self, run):
        assert "...\n" not in run("--help").out.partition("Commands:")[2]

    def test_tokens_says_no_option_that_it_lacks(self, run):
        assert "--unconditional" not in run("tokens", "--help").out

    @pytest.mark.parametrize(("end", "kind"), [("jpg", "JPEG"), ("webp", "WEBP")])
    def test_inspect_and_verify_say_the_same_of_a_picture_without_a_recipe(
        self, run, end, kind, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        Image.new("RGB", (64, 64)).save(f"a.{end}")
        for command in ("inspect", "verify"):
            refused(run(command, f"a.{end}"), f"must be a PNG to carry a recipe, not {kind}")

    def test_every_setting_is_an_option(self, run):
        text = run("generate", "--help").out
        for name, setting in settings_of(Request).items():
            assert name == "prompt" or f"{setting.option} " in text

    @pytest.mark.skipif(shutil.which("head") is None, reason="needs head")
    def test_a_reader_that_goes_away(self):
        code = f"{sys.executable} -m safelight samplers --json | head -c 1"
        for command in (code, code.replace("--json", "")):
            done = subprocess.run(command, shell=True, capture_output=True, text=True)
            assert done.stderr == ""
            assert len(done.stdout) == 1

    @pytest.mark.skipif(os.name == "nt", reason="pipes")
    def test_a_reader_that_was_never_there(self):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            self.command("samplers"), stdout=writer, stderr=subprocess.PIPE, text=True
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (1, "")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk_behind_stdout(self):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                self.command("samplers"), stdout=full, stderr=subprocess.PIPE, text=True
            )
        assert done.returncode == 2
        assert done.stderr == "error: stdout cannot be written: No space left on device\n"

    @pytest.mark.parametrize("as_json", [[], ["--json"]])
    def test_characters_that_stdout_cannot_hold_are_escaped(self, model, monkeypatch, as_json):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
        monkeypatch.setattr(sys, "stdout", stdout)
        name = "é日\U0001f34e.png"
        assert cli.run(["generate", "a", "--out", name, *as_json]) == 0
        said = stdout.buffer.getvalue().decode("latin-1")
        assert "é\\u65e5\\ud83c\\udf4e.png" in said
        assert not as_json or json.loads(said)["paths"] == [name]

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_message_that_cannot_be_written_does_not_end_the_work(self, capsys, monkeypatch):
        with monkeypatch.context() as patched, Path("/dev/full").open("wb", buffering=0) as full:
            patched.setattr(sys, "stderr", io.TextIOWrapper(full, write_through=True))
            note("loading")
        assert capsys.readouterr().err == ""

    def test_the_console_script(self):
        script = Path(sys.executable).with_name("safelight")
        if not script.exists():
            pytest.skip("the package is not installed")
        done = subprocess.run([script, "--version"], capture_output=True, text=True)
        assert done.stdout == f"safelight {safelight.__version__}\n"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["--batch-size", "2"], ["--n-iter=3"]),
        (["--batch-size", "2"], ["--count", "3"]),
        (["--count", "2"], ["-n", "3"]),
        (["-n3"], ["--batch-size", "2"]),
        (["--negative", "x"], ["--negative-prompt", "y"]),
    ],
)
def test_two_names_of_one_setting_are_refused(run, model, one, other) -> None:
    first, second = (names[0].partition("=")[0].removesuffix("3") for names in (one, other))
    told = f"error: {first} and {second} are one setting: give one of them\n"
    assert run("generate", "a cat", *one, *other).err == told
    assert model.loaded == []


@pytest.mark.parametrize("empty", [[""], ["--negative-prompt", ""], ["--", ""]])
def test_an_empty_text_is_no_option(run, model, empty) -> None:
    assert run("generate", "--unconditional", *empty).code == 0
    assert model.requests[0].unconditional


def test_the_same_name_twice_is_the_last(run, model) -> None:
    assert run("generate", "a", "-n", "3", "-n", "2", "--lora", "x", "--lora", "y").code == 0
    assert (model.requests[0].count, len(model.requests[0].loras)) == (2, 2)


def test_another_program_s_option_that_a_command_does_not_take(run, model) -> None:
    done = run("compare", "a", "--x", "steps=1,2", "--batch-size", "2")
    assert refused(done, "No such option: --batch-size")
