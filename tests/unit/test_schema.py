"""Reading files into models: strictly, with every mistake named."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Field

from benchmarks.domainbed.definition import ImageSpec
from benchmarks.glue_ood.definition import EvaluationSpec
from benchmarks.harness.base import BENCHMARKS, CONFIG, DefinitionError
from benchmarks.harness.config.benchmark import kind_name
from benchmarks.harness.config.methods import Method
from benchmarks.harness.config.overlay import Changes, overlay
from benchmarks.harness.config.runs import canonical_json, plan
from benchmarks.harness.config.schemas import write_schemas
from benchmarks.harness.config.yaml import (
    UNIQUE,
    AsGiven,
    Count,
    Key,
    Number,
    Positive,
    Rate,
    Strict,
    left_out,
    parse,
)
from benchmarks.text.definition import TextSpec
from emoe.config import EMoEConfig, GMoEConfig


class Inner(Strict):
    rank: Count
    scale: Positive = 1


class Whole(Strict):
    count: Count = 3
    rate: Rate = 0.5
    number: Number | None = left_out()
    choice: Literal["last", "best"] = "last"
    layers: str | list[int] = "all"
    inner: Inner | None = None
    named: dict[Key, Inner] | None = None
    once: Annotated[list[str], UNIQUE] | None = None


class File(Strict):
    whole: Whole
    part: Annotated[dict[str, Any], Changes(Whole)] = Field({})


def changed(file: File) -> Whole:
    return overlay(Whole, "some.yaml", (("whole",), file.whole.model_dump(exclude_unset=True)), (("part",), file.part))


def message(content: object) -> str:
    with pytest.raises(DefinitionError) as caught:
        changed(parse(content, File, "some.yaml"))
    return str(caught.value)


@pytest.mark.parametrize("place", ["whole", "part"])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"count": "3"}, "'{}.count' is '3', but must be integer"),
        ({"count": True}, "'{}.count' is True, but must be integer"),
        ({"count": 3.0}, "'{}.count' is 3.0, but must be integer"),
        ({"count": None}, "'{}.count' is None, but must be integer"),
        ({"count": 0}, "'{}.count': 0 is less than the minimum of 1"),
        ({"rate": True}, "'{}.rate' is True, but must be number"),
        ({"rate": 1}, "'{}.rate': 1 is greater than or equal to the maximum of 1"),
        (
            {"number": "2e-5"},
            "'{}.number' is '2e-5', but must be number or null (YAML reads 2e-5 as text; write 2.0e-05)",
        ),
        ({"choice": "lst"}, "'{}.choice' is 'lst'; did you mean 'last'?"),
        ({"layers": 3}, "'{}.layers' is 3, but must be string or array"),
        ({"layers": [1, "a"]}, "'{}.layers[1]' is 'a', but must be integer"),
        ({"inner": {"rnk": 1}}, "unknown key '{0}.inner.rnk'; did you mean 'rank'?; '{0}.inner' needs the key 'rank'"),
        ({"inner": []}, "'{}.inner' is [], but must be object or null"),
        ({"named": {"a": {"rank": "x"}}}, "'{}.named.a.rank' is 'x', but must be integer"),
        ({"named": {"A b": {"rank": 1}}}, "'{}.named': the key 'A b' does not match '^[a-z][a-z0-9_]*$'"),
        ({"named": {1: {"rank": 1}}}, "'{}.named': the key 1 is no text; put it in quotation marks"),
        ({"once": ["a", "b", "a"]}, "'{}.once': 'a' stands there twice"),
        ({"cuont": 1}, "unknown key '{}.cuont'; did you mean 'count'?"),
    ],
)
def test_a_mistake_is_named_with_key_value_and_what_is_valid(place: str, content: Any, text: str) -> None:
    assert message({"whole": {}, place: content}) == f"some.yaml: {text.format(place)}"


def test_five_mistakes_are_told_at_once_the_outermost_first() -> None:
    found = message({"whole": {"count": 0, "rate": -1, "choice": "x", "layers": 1, "inner": {"rank": 0}}, "hole": 1})
    assert found.startswith("some.yaml: unknown key 'hole'; did you mean 'whole'?; 'whole.choice' is 'x'; choose from")
    assert "whole.count" in found
    assert "inner" not in found


def test_a_part_that_is_parsed_alone_is_named_by_its_place_in_the_file() -> None:
    with pytest.raises(DefinitionError, match=r"^f\.yaml: unknown key 'methods\.emoe\.rnk'; did you mean 'rank'"):
        parse({"rank": 1, "rnk": 2}, Inner, "f.yaml", "methods", "emoe")


def test_values_stay_as_they_are_written() -> None:
    """A run's id is a hash of JSON, where 1 is not 1.0, and a key with null is not one that is left out."""
    found = parse({"whole": {"number": 1, "inner": {"rank": 2}}, "part": {"number": 2.0, "inner": None}}, File, "f")
    dumped = found.whole.model_dump()
    assert repr(dumped["number"]) == "1"
    assert repr(dumped["inner"]["scale"]) == "1"
    assert "number" not in Whole().model_dump()
    result = changed(found)
    assert (result.number, result.inner, result.count) == (2.0, None, 3)

    class Source(AsGiven):
        hub: str | None = None
        revision: str | None = None
        digits: str = "all"

    assert Source.model_validate({"hub": "a", "revision": None}).model_dump() == {
        "hub": "a",
        "revision": None,
        "digits": "all",
    }
    assert Source.model_validate({"hub": "a"}).model_dump(exclude={"digits"}) == {"hub": "a"}


def test_a_method_takes_every_field_of_a_configuration() -> None:
    fields = {field.name for config in (EMoEConfig, GMoEConfig) for field in dataclasses.fields(config)} - {"version"}
    assert fields <= set(Method.model_fields)
    method = parse({"title": "A", "kind": "emoe", "capacity_factor": None, "top_k": 2}, Method, "f")
    assert method.config_values() == {"capacity_factor": None, "top_k": 2}
    with pytest.raises(DefinitionError, match=r"'router' is 'cosin'; did you mean 'cosine'"):
        parse({"title": "A", "kind": "emoe", "router": "cosin"}, Method, "f")


def test_every_yaml_file_names_a_schema_that_editors_can_read(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.harness.config.schemas.SCHEMAS", tmp_path)
    written = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in write_schemas()}
    for file in [*BENCHMARKS.glob("*.yaml"), *BENCHMARKS.glob("*/benchmark.yaml"), *CONFIG.glob("*.yaml")]:
        first = file.read_text(encoding="utf-8").splitlines()[0]
        named = (file.parent / first.removeprefix("# yaml-language-server: $schema=")).resolve()
        assert named.parent == BENCHMARKS / "schemas", file
        assert named.name in written, file
        if file.name == "benchmark.yaml":
            kind = kind_name(file.parent.name, yaml.safe_load(file.read_text(encoding="utf-8")))
            assert named.name == f"{kind}.schema.json"
    described = written["config.schema.json"]["properties"]["benchmarks"]["description"]
    assert described == "Benchmarks to run, in the order of the report."


@pytest.mark.parametrize(
    ("benchmark", "spec"),
    [("glue", TextSpec), ("glue_lora", TextSpec), ("glue_ood", EvaluationSpec), ("domainbed", ImageSpec)],
)
def test_a_spec_is_read_back_as_it_is_hashed(benchmark: str, spec: type[Strict]) -> None:
    for suite in ("smoke", "mini"):
        for run in plan([benchmark], suite):
            read = parse(run.spec, spec, "run.json")
            assert canonical_json(read.model_dump()) == run.to_json()
    with pytest.raises(DefinitionError, match=r"^run\.json: unknown key 'task\.sorce'; did you mean 'source'"):
        parse({**run.spec, "task": {**run.spec["task"], "sorce": {}}}, spec, "run.json")
