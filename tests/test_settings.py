"""A setting is described once, in Request; every interface derives its part from that."""

from __future__ import annotations

import typing
from typing import Annotated, Any

import pytest
from pydantic import Field

from safelight.cli import generate, options
from safelight.compare import Axis
from safelight.defaults import BY_MODEL
from safelight.errors import SafelightError
from safelight.keywords import GenerateSettings, RequestSettings
from safelight.request import Request
from safelight.sampler_names import sampler_and_schedule
from safelight.sampling import SAMPLERS
from safelight.settings import About, Texts, Whole, json_schema, settings_of
from safelight.settings_docs import markdown
from safelight.sizes import drawable_size

Layers = Annotated[Whole, Field(ge=1, le=12)]


class Longer(Request):
    """A Request with one more setting."""

    clip_skip: Annotated[Layers, About(short="-c", infotext="Clip skip", slider=(1, 12, 1))] = (
        Field(1, description="text layers to leave out")
    )
    upscaler: Annotated[str | None, About(default="none at all")] = Field(
        None, description="model that enlarges"
    )


class TestANewSetting:
    def test_is_an_option(self, capsys: pytest.CaptureFixture[str]) -> None:
        command = options.command_of(generate.generate, Longer)
        with pytest.raises(SystemExit):
            command.main(["--help"], prog_name="generate")
        told = " ".join(capsys.readouterr().out.split())
        assert "-c, --clip-skip <int> Text layers to leave out: a whole number from 1 to 12" in told
        assert "--upscaler <str> Model that enlarges [none at all]" in told

    def test_is_in_the_schemas_of_the_apis(self) -> None:
        from safelight.server.apis import openai_shapes, ours

        ours_body = ours.body_of(Longer)["requestBody"]["content"]["application/json"]["schema"]
        theirs = openai_shapes.body_of(Longer, "application/json")
        theirs_body = theirs["requestBody"]["content"]["application/json"]["schema"]
        for schema in (ours_body, theirs_body, json_schema(Longer)):
            found, none = schema["properties"]["clip_skip"]["anyOf"]
            assert (found["type"], found["minimum"], found["maximum"]) == ("integer", 1, 12)
            assert none == {"type": "null"}
            assert schema["properties"]["upscaler"]["anyOf"][1] == {"type": "null"}

    def test_is_in_the_table_of_the_docs(self) -> None:
        row = "| `clip_skip` | `-c`, `--clip-skip` | text layers to leave out | a whole number"
        assert row in markdown(Longer)

    def test_is_checked_and_told_of(self) -> None:
        with pytest.raises(ValueError, match=r"^clip_skip must be a whole number from 1 to 12"):
            Longer(clip_skip=13)  # pyright: ignore[reportCallIssue]


class Listing(Request):
    """A Request with one more list of texts."""

    helpers: Annotated[Texts, About(option="--helper", accepts="a name")] = Field(
        (), description="who helps"
    )


class TestAListOfTexts:
    def test_is_an_option_that_may_be_repeated(self, capsys: pytest.CaptureFixture[str]) -> None:
        given: list[dict[str, Any]] = []
        command = options.command_of(lambda settings: given.append(settings), Listing)
        for arguments in (["a"], ["a", "--helper", "one", "--helper", "two,three"]):
            command.main(arguments, standalone_mode=False)
        assert given == [{"prompt": "a"}, {"prompt": "a", "helpers": ["one", "two,three"]}]
        with pytest.raises(SystemExit):
            command.main(["--help"], prog_name="generate")
        told = " ".join(capsys.readouterr().out.split())
        assert "Who helps: a name; may be given more than once." in told

    def test_is_an_array_in_the_apis(self) -> None:
        schema: Any = json_schema(Listing)["properties"]["helpers"]
        listed = schema["anyOf"][0]
        assert (listed["type"], listed["items"]) == ("array", {"type": "string"})
        assert schema["default"] == []
        made = Listing.from_json('{"helpers": ["one", "two"]}')
        assert made.helpers == ("one", "two")
        assert made.to_dict()["helpers"] == ["one", "two"]
        assert Listing.from_dict(made.to_dict()) == made

    def test_is_one_text_in_a_box_and_on_an_axis(self) -> None:
        setting = settings_of(Listing)["helpers"]
        assert setting.parse(" one,two\n three,\n") == ("one", "two", "three")
        assert setting.parse(setting.text(("one", "two"))) == ("one", "two")
        assert setting.left_out == "none"
        assert Axis.parse("loras=none|ink:0.5|ink:0.5,film").values == (
            (),
            ("ink:0.5",),
            ("ink:0.5", "film"),
        )

    @pytest.mark.parametrize("value", ["one", [1], ["a"] * 33, {"a": 1}, None])
    def test_is_checked(self, value: Any) -> None:
        told = r"^helpers must be a list of at most 32 texts, each a name, not "
        with pytest.raises(ValueError, match=told):
            Listing(helpers=value)  # pyright: ignore[reportCallIssue]


class TestTheSettings:
    def test_keywords_are_those_of_the_request(self) -> None:
        """Editors complete, and type checkers check, the keywords of Request and Model.generate."""
        assert set(RequestSettings.__annotations__) | set(GenerateSettings.__annotations__) == set(
            Request.model_fields
        )
        hints = typing.get_type_hints(RequestSettings)
        for setting in settings_of(Request).values():
            kinds = typing.get_args(hints[setting.name]) or (hints[setting.name],)
            # None is a random seed, and no reference pictures.
            may_be_none = setting.optional or setting.name in ("seed", "reference_images")
            assert (type(None) in kinds) == may_be_none

    def test_a_schema_has_json_schema_s_own_keywords(self) -> None:
        properties = json_schema(Request)["properties"]
        width: Any = properties["width"]["anyOf"][0]
        assert width == {"type": "integer", "minimum": 64, "maximum": 2048, "multipleOf": 8}
        assert properties["strength"]["anyOf"][0]["exclusiveMinimum"] == 0
        assert properties["sampler"]["anyOf"][0]["enum"] == list(SAMPLERS)
        assert properties["schedule"]["anyOf"][0]["enum"] == ["karras", "exponential", "beta"]
        assert not {"ge", "le", "gt", "multiple_of"} & set(
            str(properties).replace("'", " ").split()
        )

    def test_a_schema_has_no_default_that_depends_on_the_model(self) -> None:
        properties: Any = json_schema(Request)["properties"]
        for name in BY_MODEL:
            assert "default" not in properties[name], name
        for name in ("guidance_scale", "sampler"):
            default = settings_of(Request)[name].default
            assert f"(left out: the model's own, else {default})" in properties[name]["description"]
        assert properties["count"]["default"] == 1

    def test_every_name_of_a_sampler_is_known(self) -> None:
        for name, sampler in SAMPLERS.items():
            assert sampler_and_schedule(name) == (name, None)
            if sampler.a1111:
                assert sampler_and_schedule(sampler.a1111) == (name, None)
                assert sampler_and_schedule(f"{sampler.a1111} Karras") == (name, "karras")
        for ours, theirs in (
            ("dpmpp_2m", "DPMSolverMultistepScheduler"),
            ("euler_a", "EulerAncestralDiscreteScheduler"),
            ("euler_a", "euler_ancestral"),
            ("unipc", "uni_pc"),
        ):
            assert sampler_and_schedule(theirs) == (ours, None)
        assert sampler_and_schedule("DPM fast") is None

    @pytest.mark.parametrize(
        ("name", "told"),
        [
            ("DPM++ SDE Karras", "the most like it is dpmpp_2m_sde with schedule karras"),
            ("DPM++ 2S a", "the most like it is dpm2_a"),
            ("dpm_adaptive", "the most like it is dpmpp_2m"),
            ("DPM++ 2N Karras", "did you mean dpmpp_2m with schedule karras?"),
            ("Euler aa Karras", "did you mean euler_a?"),  # it takes no schedule
            ("k_euler_a", "did you mean euler_a?"),
            ("Karras", "karras is a schedule: give it as schedule (--schedule karras)"),
            ("SGM Uniform", "here it is the spacing trailing: give that as spacing"),
            ("normal", "it is the model's own schedule"),
            ("\0" * 9000, "known: pndm, "),
        ],
    )
    def test_an_unknown_sampler_s_error_says_what_may_be_meant(self, name: str, told: str) -> None:
        with pytest.raises(SafelightError) as caught:
            Request(sampler=name)
        assert told in str(caught.value)
        assert (caught.value.code, caught.value.field) == ("unknown_sampler", "sampler")

    def test_help_of_a_request_is_short(self) -> None:
        import pydoc

        told = pydoc.plain(pydoc.render_doc(Request))
        assert len(told.splitlines()) < 100 + len(Request.model_fields)
        assert all(f"|  {name}: " in told for name in Request.model_fields)


@pytest.mark.parametrize(
    ("size", "native", "drawn"),
    [
        ((64, 64), (64, 64), (64, 64)),
        ((64, 72), (64, 64), (64, 72)),
        ((128, 128), (64, 64), (64, 64)),
        ((256, 256), (256, 256), (256, 256)),
        ((264, 248), (256, 256), (264, 248)),
        ((384, 384), (256, 256), (256, 256)),
        ((512, 512), (256, 256), (256, 256)),
        ((512, 768), (256, 256), (208, 312)),
        ((1024, 1024), (256, 256), (256, 256)),
        ((768, 512), (512, 512), (768, 512)),
        ((512, 512), (64, 64), (64, 64)),
        ((1024, 512), (64, 64), (128, 64)),
        ((2048, 64), (64, 64), (2048, 64)),
        ((1024, 1024), (512, 512), (1024, 1024)),
        ((2048, 1024), (512, 512), (720, 360)),
    ],
)
def test_sizes_that_a_model_draws(
    size: tuple[int, int], native: tuple[int, int], drawn: tuple[int, int]
) -> None:
    assert drawable_size(size, native) == drawn
