"""Documents of the service: made by `make client` from its description, not by hand."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict


class Abstention(TypedDict):
    """The reason why there is no label."""

    reason: Literal["too_close", "too_few_rows", "hopeless"]
    rows_needed: int | None


class BatchResponse(TypedDict):
    """A batch, whether or not it has ended."""

    id: str
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    progress: float
    total: int
    done: int
    task: str
    mode: Literal["certify", "predict", "purify"]
    family_alpha: float
    alpha: float
    created: float
    finished: float | None
    problem: dict[str, Any] | None


class CertificateDocument(TypedDict):
    """Everything that a certificate states."""

    type: Literal["urn:vouchsafe:certificate:1"]
    id: str
    statement: str
    subject: Subject
    model: Model
    question: Question
    noise: Noise
    evidence: Evidence
    result: Result
    service: Issuer


class CheckResponse(TypedDict):
    """One check of a certificate."""

    name: str
    passed: bool | None
    detail: str


class DemonstrationResponse(TypedDict):
    """A demonstration. It proves nothing: it has no certificate, no radius and no answer."""

    id: str
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    kind: Literal["rows", "attack"]
    task: str
    sigma: float
    resolution: int
    rows: int
    seen: NotRequired[str | None]
    samples: NotRequired[list[Sample] | None]
    epsilon: NotRequired[float | None]
    image: NotRequired[str | None]
    l2: NotRequired[float | None]
    steps: NotRequired[int | None]
    problem: NotRequired[dict[str, Any] | None]


class DenoiserResponse(TypedDict):
    """A denoiser set that new tasks are made with."""

    name: str
    words: list[str] | None


class Evidence(TypedDict):
    """The votes; in a cascade those of the stage that answers, and of the passed ones."""

    selection_counts: dict[str, int]
    estimation_counts: dict[str, int]
    passed_counts: NotRequired[list[dict[str, int]] | None]
    looks: list[list[int]]
    total_variation: float


class HealthResponse(TypedDict):
    """A probe's response."""

    status: Literal["ok", "unavailable"]
    detail: str


class InferRequest(TypedDict):
    """A question about one image; `parameters` are fields of POST /predict."""

    id: NotRequired[str]
    parameters: NotRequired[dict[str, Any]]
    inputs: list[InputTensor]
    outputs: NotRequired[list[RequestedOutput] | None]


class InputParameters(TypedDict):
    """Where an input's data is."""

    binary_data_size: NotRequired[int | None]


class InputTensor(TypedDict):
    """One input."""

    name: str
    shape: list[int]
    datatype: str
    parameters: NotRequired[InputParameters]
    data: NotRequired[Any]


class Issuer(TypedDict):
    """The service that issued the certificate."""

    version: str
    issued_at: str


class JobResponse(TypedDict):
    """A job, whether or not it has ended."""

    id: str
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    progress: float
    rows_done: int
    rows: int
    task: str
    mode: Literal["certify", "predict", "purify"]
    created: float
    started: float | None
    finished: float | None
    result: PredictResponse | None
    problem: dict[str, Any] | None


class LabelCount(TypedDict):
    """The votes of one label."""

    label: str
    count: int


class ListedCertificate(TypedDict):
    """One certificate of a batch."""

    index: int
    id: str
    sha256: str


class Live(TypedDict):
    """The server's health."""

    live: NotRequired[bool]


class ManifestDocument(TypedDict):
    """Everything that a manifest states."""

    type: Literal["urn:vouchsafe:batch-manifest:1"]
    batch: str
    statement: str
    family_alpha: float
    alpha: float
    m: int
    certificates: list[ListedCertificate]
    service: Issuer


class Model(TypedDict):
    """The classifier under noise, in so far as labels depend on it."""

    task: str
    labels: list[str]
    bundle: str
    task_digest: str
    denoiser: Network
    adapter: str | None
    classifier: Network
    tuned: str | None
    numerics: dict[str, Any]


class ModelMetadata(TypedDict):
    """A task as a model of the protocol."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelResponse(TypedDict):
    """A task that callers can request."""

    task: str
    name: str
    id: str
    labels: list[str]
    resolution: int
    denoiser: str
    classifier: str
    licence: str
    k: float
    largest_sigma: float
    bundle: str | None
    ready: bool


class ModelsResponse(TypedDict):
    """Every task that callers can request, and what new tasks are made with."""

    models: list[ModelResponse]
    denoisers: list[DenoiserResponse]


class Network(TypedDict):
    """A base network: its kind, and the SHA-256 of each of its files."""

    kind: str
    files: dict[str, str]


class Noise(TypedDict):
    """The noise rows, and the commitment to the secret that they were drawn from."""

    format: str
    secret_commitment: str
    selection: list[int]
    estimation: list[int]


class Norms(TypedDict):
    """Changes that the radius covers, in gray levels (255 are the whole range of a value)."""

    l2_gray_levels: float
    linf_gray_levels: float
    brightness_gray_levels: float
    patch_gray_levels: dict[str, float]


class OutputParameters(TypedDict):
    """Where an output's data goes."""

    binary_data: NotRequired[bool | None]


class PredictResponse(TypedDict):
    """An answer: certified means stable, not correct."""

    id: str
    task: str
    mode: Literal["certify", "predict", "purify"]
    label: str | None
    label_index: int | None
    labels: list[str]
    runner_up: str | None
    abstained: bool
    certified: bool
    radius: float | None
    attack_norms: Norms | None
    abstention: Abstention | None
    sigma: float | list[float]
    alpha: float
    n0: int
    n: int
    rows_used: int
    p_lower: float | None
    p_upper: float | None
    target_radius: float | None
    target_reached: bool | None
    counts: list[LabelCount]
    stages: list[Stage] | None
    method: Literal["two-sided", "anytime", "cohen", "cascade", "binomial", "majority"]
    alpha_shares: dict[str, float]
    looks: list[int]
    resolution: int
    bundle: str
    timing_ms: Timing
    certificate: NotRequired[SignedCertificate | None]


class Preprocessing(TypedDict):
    """The way from the uploaded file to the certified array."""

    resize: str
    crop: str
    resolution: int
    color: str


class ProvenStage(TypedDict):
    """What a stage of a cascade proves."""

    sigma: float
    p_lower: float | None
    p_upper: float | None
    radius: float


class Question(TypedDict):
    """The question, fixed before any row was drawn."""

    sigma: float | list[float]
    alpha: float
    alpha_shares: dict[str, float]
    n0: int
    n: int
    target_radius: float | None
    method: str
    looks: list[int] | None


class RequestedOutput(TypedDict):
    """One output that the caller wants."""

    name: str
    parameters: NotRequired[OutputParameters]


class Result(TypedDict):
    """What the evidence proves about the question."""

    label: str
    label_index: int
    p_lower: float
    runner_up: int | None
    p_upper: float | None
    radius: float
    stages: NotRequired[list[ProvenStage] | None]
    norms: Norms


class Sample(TypedDict):
    """One row: what the denoiser gets, what it returns, and the row's one vote."""

    noisy: str
    denoised: str
    label: str


class ServerMetadata(TypedDict):
    """This server."""

    name: str
    version: str
    extensions: list[str]


class SignedCertificate(TypedDict):
    """A certificate: the document, and a signature over its canonical bytes (RFC 8785)."""

    document: CertificateDocument
    jws: str


class SignedManifest(TypedDict):
    """A manifest: the document, and a signature over its canonical bytes (RFC 8785)."""

    document: ManifestDocument
    jws: str


class Stage(TypedDict):
    """A stage of a cascade: its votes, and what they prove."""

    sigma: float
    outcome: Literal["passed", "answered", "abstained"]
    counts: list[LabelCount]
    p_lower: float | None
    p_upper: float | None
    radius: float


class Subject(TypedDict):
    """The image: the certified array, and the file that it was made from."""

    array_sha256: str
    shape: list[int]
    file_sha256: str
    preprocessing: Preprocessing


class TaskResponse(TypedDict):
    """A task, whether or not it is ready."""

    id: str
    name: str
    state: Literal["queued", "running", "ready", "failed", "cancelled"]
    stage: str | None
    progress: float
    eta_seconds: float | None
    losses: dict[str, float]
    figures: dict[str, Any]
    problem: dict[str, Any] | None
    labels: list[str]
    prompts: dict[str, str]
    template: str
    settings: dict[str, Any]
    created: float
    started: float | None
    finished: float | None
    references: list[str]


class TasksResponse(TypedDict):
    """Tasks that were made from labels, the newest first, and the address of the next page."""

    tasks: list[TaskResponse]
    next: str | None


class TensorMetadata(TypedDict):
    """A tensor that a model takes or gives; -1 stands for any size."""

    name: str
    datatype: str
    shape: list[int]


class Timing(TypedDict):
    """Times of a job, in milliseconds."""

    queue: float
    inference: float
    total: float


class VerificationResponse(TypedDict):
    """The checks of a certificate by the keys of this service."""

    passed: bool
    document: CertificateDocument | None
    checks: list[CheckResponse]
