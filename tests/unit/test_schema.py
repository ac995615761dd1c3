"""Read files into models: strictly, and with every mistake named."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from benchmarks.domainbed.definition import ImageSpec
from benchmarks.glue_ood.definition import EvaluationSpec
from benchmarks.harness.base import BENCHMARKS, CONFIG, DefinitionError
from benchmarks.harness.config.methods import Method, MethodFile
from benchmarks.harness.config.overlay import Changes, overlay
from benchmarks.harness.config.runs import canonical_json
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
    read,
)
from benchmarks.text.definition import TextSpec
from emoe.config import EMoEConfig, GMoEConfig
from tests.planned import plan


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
    return overlay(
        Whole, ("some.yaml", ("whole",), file.whole.model_dump(exclude_unset=True)), ("some.yaml", ("part",), file.part)
    )


def message(content: object) -> str:
    with pytest.raises(DefinitionError) as caught:
        changed(parse(content, File, "some.yaml"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"count": "3"}, "'whole.count' is '3': Input should be a valid integer"),
        (
            {"number": "2e-5"},
            "'whole.number' is '2e-5': Input should be a valid number (YAML reads 2e-5 as text; write 2.0e-05)",
        ),
        ({"layers": 3}, "'whole.layers' is 3: Input should be a valid string or Input should be a valid list"),
        ({"layers": [1, "a"]}, "'whole.layers[1]' is 'a': Input should be a valid integer"),
        ({"inner": {}}, "'whole.inner' needs the key 'rank'"),
        ({"once": ["a", "b", "a"]}, "'whole.once': 'a' stands there twice"),
        (
            {"inner": {"rank": 0}, "count": 0, "choice": "lst"},  # the outermost first
            "'whole.count' is 0: Input should be greater than or equal to 1; 'whole.choice' is 'lst'; did you mean 'last'?; "
            "'whole.inner.rank' is 0: Input should be greater than or equal to 1",
        ),
    ],
)
def test_a_mistake_is_named_with_key_value_and_what_is_valid(content: Any, text: str) -> None:
    assert message({"whole": content}) == f"some.yaml: {text}"
    assert message({"whole": {}, "part": content}) == f"some.yaml: {text.replace('whole', 'part')}"


BOMB = "[&a [x, x, x], " + ", ".join(f"&{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghijk")) + "]"


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("kind: dense, noise: 0.15", "kind: dens", "'methods.noisy_tuning.kind' is 'dens'; did you mean 'dense'"),
        ("kind: dense, noise: 0.15", "knd: dense", "unknown key 'methods.noisy_tuning.knd'; did you mean 'kind'"),
        ("noise: 0.15", "noise: -1", "'methods.noisy_tuning.noise' is -1: Input should be greater than"),
        ("noise: 0.15", "noise: .nan", "'methods.noisy_tuning.noise' is nan: Input should be"),
        ("noise: 0.15", "noise: 2024-13-45", "is not valid YAML: month must be in 1..12"),
        ("noise: 0.15", "noise: *nope", "found undefined alias"),
        ("noise: 0.15", "noise: &r [*r]", "is not valid YAML: it is too large or too deep"),
        ("noise: 0.15", f"noise: {BOMB}", "is not valid YAML: it is too large or too deep"),
        ("noise: 0.15", "noise: !!bool maybe", "is not valid YAML: the tag 'tag:yaml.org,2002:bool' is not allowed"),
        ("noise: 0.15", "noise: 0.15, noise: 0.2", "the key 'noise' is given twice"),
        ("noise: 0.15}", "noise: 0.15", "is not valid YAML: while parsing"),
        ("methods:\n", "methods: 3\nrest:\n", "unknown key 'rest'"),
        ("noisy_tuning:", "Noisy Tuning:", "'methods.Noisy Tuning' is 'Noisy Tuning': String should match pattern"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, old: str, new: str, text: str) -> None:
    content, path = (BENCHMARKS / "methods.yaml").read_text(), tmp_path / "methods.yaml"
    path.write_text(content.replace(old, new, 1))
    with pytest.raises(DefinitionError) as caught:
        read(path, MethodFile)
    assert str(caught.value).startswith(str(path))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_stay_as_they_are_written() -> None:
    """Keep 1 from becoming 1.0, and null from being left out, because a run's id is a hash of JSON."""
    file = parse({"whole": {"number": 1, "inner": {"rank": 2}}, "part": {"number": 2.0, "inner": None}}, File, "f")
    dumped = file.whole.model_dump()
    assert (repr(dumped["number"]), repr(dumped["inner"]["scale"])) == ("1", "1")
    assert "number" not in Whole().model_dump()
    result = changed(file)
    assert (result.number, result.inner, result.count) == (2.0, None, 3)

    class Source(AsGiven):
        hub: str | None = None
        revision: str | None = None
        digits: str = "all"

    dumped = Source.model_validate({"hub": "a", "revision": None}).model_dump()
    assert dumped == {"hub": "a", "revision": None, "digits": "all"}
    assert Source.model_validate({"hub": "a"}).model_dump(exclude={"digits"}) == {"hub": "a"}


def test_a_method_takes_every_field_of_a_configuration() -> None:
    fields = {field.name for config in (EMoEConfig, GMoEConfig) for field in dataclasses.fields(config)} - {"version"}
    assert fields <= set(Method.model_fields)
    method = parse({"title": "A", "kind": "emoe", "capacity_factor": None, "top_k": 2}, Method, "f")
    assert method.config_values() == {"capacity_factor": None, "top_k": 2}
    with pytest.raises(DefinitionError, match=r"'router' is 'cosin'; did you mean 'cosine'"):
        parse({"title": "A", "kind": "emoe", "router": "cosin"}, Method, "f")


def test_every_yaml_file_names_a_schema_that_editors_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.harness.config.schemas.SCHEMAS", tmp_path)
    written = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in write_schemas()}
    for file in [*BENCHMARKS.glob("*.yaml"), *BENCHMARKS.glob("*/benchmark.yaml"), *CONFIG.glob("*.yaml")]:
        first = file.read_text(encoding="utf-8").splitlines()[0]
        named = (file.parent / first.removeprefix("# yaml-language-server: $schema=")).resolve()
        assert named.parent == BENCHMARKS / "schemas", file
        assert named.name in written, file
    described = written["config.schema.json"]["properties"]["benchmarks"]["description"]
    assert described.startswith("Benchmarks to run, in the order of the report")


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
