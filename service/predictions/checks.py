"""Checks a question against its task and its method: which fields could never give an answer."""

from __future__ import annotations

from models.bundle import Bundle
from models.certificates.anytime import check_anytime, largest_target
from models.certificates.cascade import check_cascade, smallest_n_cascade
from models.certificates.evidence import total_variation
from models.certificates.rules import (
    check_certify,
    check_predict,
    smallest_n_certify,
    smallest_n_predict,
)
from models.demonstrations.limits import Demonstration
from models.kinds import gives_gradients
from service.errors import as_json
from service.jobs import Mode
from service.predictions.demonstrations import LARGEST_RESOLUTION, Asked, DemonstrationRequest
from service.predictions.question import (
    MOST_PURIFICATIONS,
    ONLY_METHOD,
    Method,
    PredictRequest,
)
from service.validation import invalid_field

DIFFUSION_KINDS = ("super-resolution", "unconditional")
"""Kinds of denoisers with the steps of a diffusion model."""


def check_question(question: Asked, bundle: Bundle) -> None:
    """Raise InvalidField for noise too strong for the task, and for rows that always abstain.

    Of a demonstration, for pictures too large to keep, and for networks without gradients.
    """
    sigma = max(question.sigmas, default=0.0)
    if sigma > bundle.largest_sigma:
        strongest = bundle.largest_sigma
        name = as_json(question.task)
        detail = f"sigma = {sigma:g}: the task {name} supports at most {strongest:g}"
        raise invalid_field("sigma", detail, sigma, strongest)
    if isinstance(question, DemonstrationRequest):
        _check_demonstration(question, bundle)
        return
    _check_method(question)
    if question.mode is Mode.PURIFY:
        _check_purification(question, bundle)
        return
    method, target = question.method, question.target_radius
    blur = total_variation((3, bundle.resolution, bundle.resolution), sigma)
    n0, n, alpha = question.n0, question.n, question.alpha
    try:
        if method is Method.BINOMIAL:
            check_predict(n, alpha, blur)
        elif method is Method.ANYTIME:
            check_anytime(n0, n, sigma, alpha, target, blur)
        elif method is Method.CASCADE:
            check_cascade(n0, n, question.sigmas, alpha)
        else:
            check_certify(n0, n, sigma, alpha, method)
    except ValueError as error:
        field = str(error).partition(" ")[0]
        limit: float | None = None
        if field == "n":
            limit = _smallest_n(question)
        elif field == "target_radius":
            limit = largest_target(n, sigma, alpha, blur)
        raise invalid_field(field, str(error), getattr(question, field), limit) from error


def _check_demonstration(question: DemonstrationRequest, bundle: Bundle) -> None:
    name, kind = as_json(question.task), bundle.classifier.kind
    if bundle.resolution > LARGEST_RESOLUTION:
        detail = (
            f"task = {name}: its images have {bundle.resolution} pixels a side; demonstrations "
            f"have at most {LARGEST_RESOLUTION}"
        )
        raise invalid_field("task", detail, question.task, LARGEST_RESOLUTION)
    if question.kind is Demonstration.ATTACK and not gives_gradients(kind):
        detail = (
            f"kind = {question.kind}: task {name} has a classifier of kind {kind}, which gives no "
            "gradients"
        )
        raise invalid_field("kind", detail, question.kind.value)


def _check_purification(question: PredictRequest, bundle: Bundle) -> None:
    """Raise InvalidField for too many purifications, and for a denoiser that has no steps."""
    if question.n > MOST_PURIFICATIONS:
        detail = f"n = {question.n}: mode purify takes at most {MOST_PURIFICATIONS} purifications"
        raise invalid_field("n", detail, question.n, MOST_PURIFICATIONS)
    if bundle.denoiser.kind not in DIFFUSION_KINDS:
        kinds = " or ".join(DIFFUSION_KINDS)
        detail = (
            f"mode = purify: task {as_json(question.task)} has a denoiser of kind "
            f"{bundle.denoiser.kind}; a purification needs {kinds}"
        )
        raise invalid_field("mode", detail, question.mode.value)


def _smallest_n(question: PredictRequest) -> int:
    if question.method is Method.BINOMIAL:
        return smallest_n_predict(question.alpha)
    if question.method is Method.CASCADE:
        return smallest_n_cascade(question.alpha, len(question.sigmas))
    has_target = question.target_radius is not None
    return smallest_n_certify(question.alpha, question.method, has_target)


def _check_method(question: PredictRequest) -> None:
    """Raise InvalidField for a method of another mode, and a target that it cannot have."""
    mode, method = question.mode, question.method
    if isinstance(question.sigma, tuple) is not (method is Method.CASCADE):
        detail = f"method = {method}: several sigma need cascade, and cascade needs several sigma"
        raise invalid_field("method", detail, method.value)
    if ONLY_METHOD.get(mode, method) is not method or (
        mode not in ONLY_METHOD and method in ONLY_METHOD.values()
    ):
        others = [each for each in Method if each not in ONLY_METHOD.values()]
        fitting = others if mode not in ONLY_METHOD else [ONLY_METHOD[mode]]
        detail = f"method = {method}: mode {mode} has {', '.join(fitting)}"
        raise invalid_field("method", detail, method.value)
    if question.target_radius is not None and method is not Method.ANYTIME:
        detail = f"target_radius = {question.target_radius:g}: only the method anytime has a target"
        raise invalid_field("target_radius", detail, question.target_radius)
