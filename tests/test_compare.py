"""Grids over two settings: possible axes, what is drawn, and the look of the sheet."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import safelight
from safelight import Request, SafelightError, cli, compare
from safelight.compare import MAX_CELLS, Axis, Grid, grid, requests, sheet
from safelight.model import Model
from safelight.picture import largest_difference
from safelight.recipe import parse_recipe_text, read_recipe
from safelight.server.jobs import Picture, Status

BASE = Request(
    prompt="a cat", seed=1, steps=2, sampler="euler", guidance_scale=4.0, width=64, height=64
)


@pytest.fixture(scope="module")
def model() -> Model:
    return safelight.load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def told() -> list[tuple[int, int]]:
    """Return the cells that `made` reported as finished."""
    return []


@pytest.fixture(scope="module")
def made(model: Model, told: list[tuple[int, int]]) -> Grid:
    x, y = Axis("sampler", ("euler", "heun", "lms")), Axis("steps", (1, 3))
    return grid(model, BASE, x, y, on_cell=lambda column, row, _: told.append((column, row)))


class TestAxis:
    @pytest.mark.parametrize(
        ("text", "name", "values"),
        [
            ("sampler=ddim,euler_a", "sampler", ("ddim", "euler_a")),
            ("steps=5, 10,20", "steps", (5, 10, 20)),
            ("guidance-scale=1,7.5", "guidance_scale", (1.0, 7.5)),
            ("seed=1,2", "seed", (1, 2)),
            ("strength=0.3,none", "strength", (0.3, None)),
            ("schedule=none,karras", "schedule", (None, "karras")),
            ("width=64,128", "width", (64, 128)),
            ("prompt=a cat|a dog, sitting", "prompt", ("a cat", "a dog, sitting")),
            ("prompt=x=y", "prompt", ("x=y",)),
            ("prompt=none|a cat", "prompt", ("none", "a cat")),
            ("negative_prompt=|none|ugly", "negative_prompt", ("", "", "ugly")),
        ],
    )
    def test_reads(self, text: str, name: str, values: tuple[object, ...]) -> None:
        axis = Axis.parse(text)
        assert (axis.name, axis.values) == (name, values)

    @pytest.mark.parametrize(
        ("text", "named"),
        [
            ("sampler", "as in steps=5,10,20"),
            ("", "as in steps=5,10,20"),
            ("sampelr=ddim", "did you mean sampler"),
            ("image=a.png", "'image' cannot be an axis"),
            ("count=1,2", "known: prompt"),
            ("x" * 1000 + "=1", "cannot be an axis"),
        ],
    )
    def test_refuses(self, text: str, named: str) -> None:
        with pytest.raises(SafelightError, match=named) as caught:
            Axis.parse(text)
        assert len(str(caught.value)) < 400

    def test_labels(self) -> None:
        assert Axis("guidance_scale", (1.0, 7.5)).labels == ["1", "7.5"]
        assert Axis("schedule", (None, "karras")).labels == ["default", "karras"]
        assert Axis("negative_prompt", ("", "red")).labels == ["(empty)", "red"]


class TestRequests:
    def test_rows_and_columns(self) -> None:
        asked = requests(BASE, Axis("steps", (5, 10)), Axis("sampler", ("ddim", "lms", "euler")))
        found = [[(r.sampler, r.steps) for r in row] for row in asked]
        assert found == [[(s, n) for n in (5, 10)] for s in ("ddim", "lms", "euler")]
        assert {r.seed for row in asked for r in row} == {1}

    def test_a_seed_that_was_drawn_is_that_of_all(self) -> None:
        [row] = requests(Request(prompt="a cat"), Axis("steps", (1, 2, 3)))
        assert len({request.seed for request in row}) == 1

    @pytest.mark.parametrize(
        ("x", "y", "named"),
        [
            ("sampler=ddim,eulr", None, "did you mean euler"),
            ("steps=5,0", None, "steps must be"),
            ("steps=5,abc", None, "steps must be.*not 'abc'"),
            ("steps=5,", None, "steps must be.*not ''"),
            ("guidance_scale=1", "seed=-1", "seed must be"),
            ("strength=nan", None, "strength must be"),
            ("steps=1", "steps=2", "not steps twice"),
            ("steps=" + ",".join("1" * 11), "seed=" + ",".join("1" * 10), "at most 100 cells"),
        ],
    )
    def test_refuses(self, x: str, y: str | None, named: str) -> None:
        with pytest.raises(SafelightError, match=named):
            requests(BASE, Axis.parse(x), None if y is None else Axis.parse(y))

    def test_the_most(self) -> None:
        tens = Axis("seed", tuple(range(10))), Axis("steps", tuple(range(1, 11)))
        assert sum(map(len, requests(BASE, *tens))) == MAX_CELLS

    def test_one_picture_a_cell(self) -> None:
        with pytest.raises(SafelightError, match="count must be 1"):
            requests(BASE.replace(count=2), Axis("steps", (1,)))


class TestGrid:
    def test_cells_are_what_they_are_alone(self, model: Model, made: Grid) -> None:
        for i, steps in enumerate((1, 3)):
            for j, sampler in enumerate(("euler", "heun", "lms")):
                alone = model.generate(BASE.replace(steps=steps, sampler=sampler)).images[0]
                assert largest_difference(alone, made.results[i][j].images[0]) <= 1

    def test_each_is_told_once(self, made: Grid, told: list[tuple[int, int]]) -> None:
        assert sorted(told) == [(column, row) for column in range(3) for row in range(2)]

    def test_the_note_names_no_setting_at_its_default(self, made: Grid) -> None:
        shared = made._shared()
        assert shared["guidance_scale"] == 4  # its default is the model's
        assert not {"prompt_syntax", "aesthetic_score", "control_scale"} & shared.keys()

    def test_the_recipe(self, made: Grid, tmp_path) -> None:
        made.save(tmp_path / "grid.png")
        recipe = read_recipe(tmp_path / "grid.png")
        assert recipe["grid"] == {"sampler": ["euler", "heun", "lms"], "steps": [1, 3]}
        assert recipe["settings"]["prompt"] == "a cat"
        assert recipe["settings"]["steps"] == 1
        with Image.open(tmp_path / "grid.png") as picture:
            assert isinstance(picture.info["parameters"], str)
            assert parse_recipe_text(picture.info["parameters"])["prompt"] == "a cat"
        with pytest.raises(SafelightError, match="exists"):
            made.save(tmp_path / "grid.png")

    def test_steps_are_told(self, model: Model) -> None:
        told: list[tuple[int, int]] = []
        grid(model, BASE, Axis("steps", (1, 2)), on_step=lambda *now: told.append(now))
        assert told == [(1, 3), (2, 3), (3, 3)]

    def test_a_cell_that_cannot_be_stops_all_before_the_first_step(self, model: Model) -> None:
        told: list[tuple[int, int]] = []
        with pytest.raises(SafelightError, match="ddim has no schedule karras"):
            grid(
                model,
                BASE.replace(schedule="karras"),
                Axis("sampler", ("euler", "ddim")),
                on_step=lambda *now: told.append(now),
            )
        assert told == []

    def test_cells_of_a_photo_are_shrunk_once_they_are_finished(
        self, model: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(compare, "MAX_PIXELS", 2 * 100 * 75)
        photo, mask = Image.new("RGB", (400, 300)), Image.new("L", (400, 300))
        mask.paste(255, (50, 50, 80, 80))
        part = {"image": photo, "mask": mask, "mask_padding": 4, "width": 64, "height": 64}
        told: list[tuple[int, int]] = []
        made = grid(
            model,
            BASE.replace(**part),
            Axis("guidance_scale", (1.0, 2.0)),
            on_cell=lambda column, row, picture: told.append(picture.size),
        )
        assert told == [(400, 300)] * 2
        assert [result.images[0].size for result in made.results[0]] == [(100, 75)] * 2
        assert made.recipe()["size"] == [400, 300]
        assert made.sheet().width < 400

    def test_a_model_of_pixels(self) -> None:
        pixels = safelight.load("embedded-unconditional", device="cpu")
        base = Request(unconditional=True, seed=1, sampler="ddim")
        made = grid(pixels, base, Axis("steps", (1, 2)))
        assert made.sheet().width > 2 * 192


class TestSheet:
    def plain(self, size: tuple[int, int] = (64, 64)) -> Image.Image:
        return Image.new("RGB", size, (200, 30, 30))

    def red(self, page: Image.Image) -> np.ndarray:
        return (np.asarray(page) == (200, 30, 30)).all(-1)

    def test_every_cell_is_there_enlarged(self) -> None:
        x, y = Axis("steps", (1, 2, 3)), Axis("seed", (1, 2))
        page = sheet([[self.plain()] * 3] * 2, x, y, title="a cat", note="embedded")
        inside = 190 * 190  # but for its frame
        assert self.red(page).sum() == 6 * inside

    def test_labels_stay_out_of_the_pictures(self) -> None:
        words = "a very long prompt, " * 200
        x, y = Axis("prompt", (words, "x" * 5000)), Axis("negative_prompt", (words, "y" * 5000))
        page = sheet([[self.plain()] * 2] * 2, x, y, title=words, note=words)
        assert self.red(page).sum() == 4 * 190 * 190
        assert page.width < 1000
        assert page.height < 1000

    def test_there_is_ink_over_each_column_and_beside_each_row(self) -> None:
        page = sheet([[self.plain()] * 2] * 2, Axis("steps", (1, 2)), Axis("seed", (3, 4)))
        rows, columns = np.nonzero(self.red(page))
        dark = np.asarray(page.convert("L")) < 100
        dark[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = False
        middle = (columns.min() + columns.max()) // 2
        assert dark[: rows.min(), columns.min() : middle].any()
        assert dark[: rows.min(), middle : columns.max()].any()
        half = (rows.min() + rows.max()) // 2
        assert dark[rows.min() : half, : columns.min()].any()
        assert dark[half : rows.max(), : columns.min()].any()

    def test_large_pictures_are_made_smaller(self) -> None:
        page = sheet([[self.plain((2048, 1024))] * 10] * 4, Axis("steps", tuple(range(10))))
        assert page.width * page.height < 45_000_000

    def test_sizes_may_differ(self) -> None:
        page = sheet([[self.plain((64, 64)), self.plain((64, 128))]], Axis("height", (64, 128)))
        assert self.red(page).sum() == 190 * 190 + 190 * 382


class TestStudio:
    def test_cells_are_shrunk_one_by_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from safelight.studio import compare as studio

        monkeypatch.setattr(compare, "MAX_PIXELS", 2 * 100 * 75)
        saved = BytesIO()
        Image.new("RGB", (400, 300)).save(saved, "PNG")
        recipe = {"settings": BASE.to_dict(), "model": {"name": "m", "sha256": "a" * 64}}
        recipe |= {"device": "cpu", "dtype": "float32", "warnings": []}
        picture = Picture(id="p", index=0, seed=1, width=400, height=300, recipe=recipe)
        hub: Any = SimpleNamespace(root=tmp_path, picture_bytes=lambda _: saved.getvalue())
        job = SimpleNamespace(status=Status.SUCCEEDED, error=None, pictures=[picture])
        assert studio._result(hub, job, 0.25).images[0].size == (100, 75)  # type: ignore[arg-type]
        made: list[Grid] = []
        monkeypatch.setattr(Grid, "save", lambda grid, path: made.append(grid))
        studio._sheet(hub, [job] * 2, [Axis("steps", (2, 3))], "me")  # type: ignore[list-item]
        [(first, second)] = made[0].results
        assert first.images[0].size == second.images[0].size == (100, 75)
        assert made[0].recipe()["size"] == [400, 300]


class TestCommand:
    def test_compare(self, tmp_path, capsys) -> None:
        path = tmp_path / "grid.png"
        code = cli.run(
            [
                *("compare", "a cat", "--x", "sampler=ddim,euler_a", "--y", "steps=1,2"),
                *("--seed", "1", "--device", "cpu", "--out", str(path)),
            ]
        )
        assert (code, capsys.readouterr().out) == (0, f"{path}\n")
        assert read_recipe(path)["grid"]["steps"] == [1, 2]

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["--x", "sampler=ddim"], "PROMPT is missing"),
            (["a cat"], "--x"),
            (["a cat", "--x", "prompt=a|b"], "prompt is an axis"),
            (["a cat", "--x", "steps=1,2", "--steps", "3"], "steps is an axis"),
            (["a cat", "--x", "steps=1,2", "--out", "a.jpg"], "name.png"),
            (["a cat", "--x", "sampler=eulr"], "did you mean euler"),
            (["a cat", "--x", "steps=1", "--y", "seed=1.5"], "seed must be"),
        ],
    )
    def test_refuses(self, arguments, named, tmp_path, monkeypatch, capsys) -> None:
        monkeypatch.chdir(tmp_path)
        assert cli.run(["compare", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert named in error
        assert list(tmp_path.iterdir()) == []
