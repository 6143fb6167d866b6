from __future__ import annotations

import json
from base64 import b64encode
from typing import Any

import pytest
from pydantic import ValidationError

from service.errors import InvalidField
from service.jobs import Mode
from service.predictions.question import PredictRequest
from service.predictions.schemas import PredictResponse
from service.validation import invalid_fields

IMAGE = b64encode(b"picture").decode()


def read(**fields: Any) -> PredictRequest:
    body = json.dumps({"image": IMAGE, **fields})
    return PredictRequest.model_validate_json(body, strict=True)


def refusal(**fields: Any) -> InvalidField:
    with pytest.raises(ValidationError) as refused:
        read(**fields)
    return invalid_fields(refused.value.errors(), PredictRequest)


def test_defaults() -> None:
    """An image alone is a CERTIFY question of 100 and 1000 rows at sigma 0.25 and alpha 0.001."""
    asked = read()
    assert asked.image == b"picture"
    assert (asked.task, asked.mode, asked.sigma, asked.alpha) == ("default", "certify", 0.25, 0.001)
    assert (asked.n0, asked.n, asked.rows) == (100, 1000, 1100)


def test_predict_defaults_to_fewer_rows() -> None:
    """PREDICT takes 100 rows unless told otherwise, and has no selection rows whatever n0 says."""
    asked = read(mode="predict", n0=77)
    assert (asked.mode, asked.n, asked.selection_rows, asked.rows) == (Mode.PREDICT, 100, 0, 100)
    assert read(mode="predict", n=33).n == 33


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("sigma", 0.019, 0.02),
        ("sigma", 4.1, 4.0),
        ("alpha", 0.0, 0.0),
        ("alpha", 0.5, 0.5),
        ("n", 0, 1),
        ("n", 100_001, 100_000),
        ("n0", 0, 1),
        ("n0", 100_001, 100_000),
        ("task", "t" * 201, 200),
    ],
)
def test_limits_are_named(field: str, value: Any, limit: float) -> None:
    """Whatever is outside its limits is refused with the field, the value and the limit."""
    document = refusal(**{field: value}).document()
    (explained,) = document["errors"]
    assert (explained["field"], explained["limit"]) == (field, limit)
    assert str(explained["value"])[:70] == str(value)[:70]
    assert field in document["detail"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 10.5), ("n", "10"), ("n", True), ("sigma", "0.25"), ("mode", "guess"), ("task", 3)],
)
def test_other_types_are_refused(field: str, value: Any) -> None:
    """JSON values of another type are refused by name, never converted."""
    (explained,) = refusal(**{field: value}).document()["errors"]
    assert (explained["field"], explained["value"]) == (field, value)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_are_finite(value: str) -> None:
    """Not-a-number and infinity are refused, and the document is still JSON."""
    with pytest.raises(ValidationError) as refused:
        PredictRequest.model_validate({"image": b"", "sigma": value})
    document = invalid_fields(refused.value.errors(), PredictRequest).document()
    assert document["errors"][0]["field"] == "sigma"
    json.dumps(document, allow_nan=False)
    json.dumps(refusal(sigma=float(value)).document(), allow_nan=False)


def test_unknown_fields_are_named() -> None:
    """A field that resembles none is refused with those that there are, without its value."""
    document = refusal(purify=0.5).document()
    told = (
        "there is no field 'purify'; the fields are alpha, image, method, mode, n, n0, sigma, "
        "target_radius, task"
    )
    assert document["detail"] == told
    assert document["errors"] == [{"field": "purify", "detail": told}]


@pytest.mark.parametrize(("name", "meant"), [("sgima", "sigma"), ("N", "n"), ("img", "image")])
def test_the_nearest_field_is_suggested(name: str, meant: str) -> None:
    """A misspelt field is refused with the one that was probably meant."""
    detail = refusal(**{name: 1}).document()["detail"]
    assert detail == f"there is no field '{name}'; did you mean {meant}?"


def test_the_missing_field_is_suggested() -> None:
    """One unknown field where a required one is missing is taken for it, and reported once."""
    with pytest.raises(ValidationError) as refused:
        PredictRequest.model_validate({"file": b"GIF89a", "sgima": "1"})
    document = invalid_fields(refused.value.errors(), PredictRequest).document()
    assert [error["field"] for error in document["errors"]] == ["file", "sgima"]
    assert "there is no field 'file'; did you mean image?" in document["detail"]
    assert "GIF" not in json.dumps(document)


@pytest.mark.parametrize(
    ("value", "shown", "in_words"),
    [
        (True, True, "true"),
        (None, None, "null"),
        ("ten", "ten", '"ten"'),
        ([1, {"a": None}], [1, {"a": None}], '[1, {"a": null}]'),
        ("x" * 81, "x" * 77 + "...", '"' + "x" * 76 + "..."),
        ([7] * 99, "[" + "7, " * 25 + "7...", "[" + "7, " * 25 + "7..."),
        (float("nan"), "NaN", "NaN"),
        (10**99, "1" + "0" * 76 + "...", "1" + "0" * 76 + "..."),
    ],
)
def test_values_are_shown_as_json(value: Any, shown: Any, in_words: str) -> None:
    """A bad value comes back as JSON, cut to 80 characters, in the error and in the detail."""
    document = refusal(n=value).document()
    assert document["errors"][0]["value"] == shown
    assert document["detail"].endswith(f"(it is {in_words})")


def test_every_bad_field_is_named_at_once() -> None:
    """Several mistakes come back together."""
    errors = refusal(n=0, sigma=9).document()["errors"]
    assert [error["field"] for error in errors] == ["sigma", "n"]


@pytest.mark.parametrize("image", ["not base64!", "YWJj\nZGVm", "YWJ", 7, None])
def test_image_must_be_base64(image: Any) -> None:
    """An image that is not base64 is refused, without being sent back."""
    (explained,) = refusal(image=image).document()["errors"]
    assert explained["field"] == "image"
    assert "value" not in explained


def test_image_is_required() -> None:
    """A question without an image says which field is missing and repeats nothing else."""
    with pytest.raises(ValidationError) as refused:
        PredictRequest.model_validate_json('{"task": "default"}', strict=True)
    (explained,) = invalid_fields(refused.value.errors(), PredictRequest).document()["errors"]
    assert explained == {"field": "image", "detail": "Field required"}


def test_form_values_are_read_from_text() -> None:
    """A form's texts become the same question as JSON's numbers, by the same fingerprint."""
    form = {"image": b"picture", "n": "500", "sigma": "0.50", "mode": "certify"}
    asked = PredictRequest.model_validate(form)
    assert asked == read(n=500, sigma=0.5)
    assert asked.fingerprint() == read(n=500, sigma=0.5).fingerprint()


def test_fingerprint_tells_questions_apart() -> None:
    """Every field and the image's bytes change the fingerprint, defaults written out do not."""
    changed = [
        read(),
        read(image=b64encode(b"other").decode()),
        read(task="t"),
        read(sigma=0.5),
        read(alpha=0.01),
        read(n0=10),
        read(n=10),
        read(mode="predict"),
    ]
    assert len({asked.fingerprint() for asked in changed}) == len(changed)
    assert read(task="default", n=1000).fingerprint() == read().fingerprint()
    assert read(mode="predict", n0=5).fingerprint() == read(mode="predict").fingerprint()


@pytest.mark.parametrize("model", [PredictRequest, PredictResponse])
def test_every_field_is_described(model: type[PredictRequest | PredictResponse]) -> None:
    """/docs has a sentence for every field."""
    assert all(field.description for field in model.model_fields.values())
