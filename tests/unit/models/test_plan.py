"""Plans: what is refused, by field, and what makes two of them the same task."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from models.adaptation.limits import MOST_REFERENCES, PlanError
from models.adaptation.plan import PLAN, Plan, Status, locked, write_json

SECRET = b"s" * 32


def test_the_same_words_and_settings_are_the_same_task() -> None:
    """Defaults spelled out, spaces around and Unicode's other spelling change nothing."""
    plan = Plan.checked(["cat", "dog"])
    spelled = Plan.checked(
        [" cat", "dog "],
        template=plan.template,
        shots=plan.shots,
        steps=plan.steps,
        denoiser="nano",
    )
    assert spelled == plan
    assert spelled.identity(SECRET) == plan.identity(SECRET)
    accents = [
        Plan.checked([word, "dog"], allow_unknown_labels=True)
        for word in ("caf\u00e9", "cafe\u0301")
    ]
    assert accents[0] == accents[1]


@pytest.mark.parametrize(
    "changes", [{"shots": 5}, {"steps": 1}, {"epochs": 0}, {"seed": 1}, {"template": "A {}."}]
)
def test_any_other_setting_is_another_task(changes: dict[str, Any]) -> None:
    """Every setting, the labels' order and the secret are in the id."""
    plan, other = Plan.checked(["cat", "dog"]), Plan.checked(["cat", "dog"], **changes)
    assert plan.identity(SECRET) != other.identity(SECRET)
    assert plan.identity(SECRET) != Plan.checked(["dog", "cat"]).identity(SECRET)
    assert plan.identity(SECRET) != plan.identity(b"t" * 32)


def test_very_many_labels_have_fewer_references_each() -> None:
    """The default number of references never makes more of them than there may be."""
    words = [f"thing {number}" for number in range(1_000)]
    few = Plan.checked(["cat", "dog"]).shots
    assert Plan.checked(words[:10], allow_unknown_labels=True).shots == few > 10
    assert Plan.checked(words, allow_unknown_labels=True).shots == MOST_REFERENCES // 1_000 == 10


def test_every_reference_has_a_seed_of_its_own() -> None:
    """No two images of a plan start from the same noise; another seed, template or label has other
    images, and another number of shots the same first ones."""
    plan = Plan.checked(["cat", "dog", "ship"])
    assert len({plan.seed_of(label, shot) for label in range(3) for shot in range(64)}) == 192
    others = [
        Plan.checked(["cat", "dog"], seed=1),
        Plan.checked(["cat", "dog"], template="A {}."),
        Plan.checked(["ship", "dog"]),
    ]
    assert len({plan.seed_of(0, 0), *(other.seed_of(0, 0) for other in others)}) == 4
    assert Plan.checked(["dog", "cat"], shots=9, steps=1).seed_of(1, 3) == plan.seed_of(0, 3)


@pytest.mark.parametrize(
    ("labels", "settings", "field", "reason"),
    [
        (["cat"], {}, "labels", "labels has 1 entries; it must have 2 to 1000"),
        (["cat"] * 1001, {}, "labels", "labels has 1001 entries; it must have 2 to 1000"),
        (["cat", "  "], {}, "labels.1", "labels.1 has 0 characters; it must have 1 to 128"),
        (["cat", "x" * 129], {}, "labels.1", "labels.1 has 129 characters; it must have 1 to 128"),
        (["cat", "d\x07g"], {}, "labels.1", r"labels.1 holds the control character U\+0007"),
        (["cat", "d\u200dg"], {}, "labels.1", r"labels.1 holds the control character U\+200D"),
        (["cat", "dog", "Cat"], {}, "labels.2", 'labels.2 is the same as labels.0: "Cat"'),
        (["cat", "d{}g"], {}, "labels.1", r'labels.1 is "d{}g"; .* read as ".* of a d g\."'),
        (["A320", "dog"], {}, "labels.0", r'"A320"; "This .* A320\." would be read as ".* a \."'),
        (["cat", "\u732b"], {}, "labels.1", r'"\u732b"; .* would be read as ".* of a \."'),
        (["cat", "Airbus A320"], {}, "labels.1", r'"Airbus A320"; .* read as ".* of a airbus \."'),
        (["cat", "<![&"], {}, "labels.1", '"<!.&"; .* holds markup that cannot be parsed'),
        (["hot dog", "hot  dog"], {}, "labels.1", 'labels.1 is "hot  dog"; .* read as labels.0'),
        (["cat", ("Cat", "dog")], {}, "labels.1", 'labels.1 is the same as labels.0: "Cat"'),
        (["cat", ("feline", "CAT")], {}, "labels.1.prompt", 'is "CAT"; .* read as labels.0'),
        (["cat", ("A320", "a320")], {}, "labels.1.prompt", 'labels.1.prompt is "a320"; .* read as'),
        (["cat", ("dog", " ")], {}, "labels.1.prompt", "labels.1.prompt has 0 characters"),
        (["cat", ("dog", "x" * 129)], {}, "labels.1.prompt", "labels.1.prompt has 129 characters"),
        (["cat", ("dog", "unicorn")], {}, "labels.1.prompt", '"unicorn" is not a word that nano'),
        (["cat", "dog"], {"template": "Download {}"}, "template", '"Download thing" .* as "thing"'),
        (["cat", "unicorn"], {}, "labels.1", '"unicorn" is not a word that nano was trained on'),
        (["cat", "dog"], {"template": "A photo."}, "template", "template must hold {} once"),
        (["cat", "dog"], {"template": "{} {x}"}, "template", "template must hold {} once"),
        (["cat", "dog"], {"shots": 0}, "shots", "shots is 0; it must be 1 to 64"),
        (["cat", "dog"], {"steps": 10_001}, "steps", "steps is 10001; it must be 0 to 10000"),
        (["cat", "dog"], {"epochs": -1}, "epochs", "epochs is -1; it must be 0 to 1000"),
        (
            [f"label {i}" for i in range(1000)],
            {"shots": 11, "allow_unknown_labels": True},
            "shots",
            "1000 labels with shots = 11 make 11000 references; at most 10000 are made",
        ),
        (
            [f"label {i}" for i in range(1000)],
            {"shots": 10, "epochs": 101, "allow_unknown_labels": True},
            "epochs",
            "epochs = 101 over 10000 references is 1010000 rows; at most 1000000",
        ),
        (["cat", "dog"], {"seed": -1}, "seed", "seed is -1; it must be 0 to 2147483647"),
        (
            ["cat", "dog"],
            {"denoiser": "no"},
            "denoiser",
            'There is no denoiser set "no"',
        ),
        (["cat", "dog"], {"classifier": "no"}, "classifier", 'There is no classifier set "no"'),
        (
            ["cat", "dog"],
            {"template": "x" * 62 + " {}."},
            "template",
            "has 66 tokens; the classifier reads at most 64",
        ),
        (
            ["cat", "x" * 80],
            {"allow_unknown_labels": True},
            "labels.1",
            "has 103 tokens; the text encoder reads at most 77",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    labels: list[str | tuple[str, str]], settings: dict[str, Any], field: str, reason: str
) -> None:
    """The error names the field, the value and the limit."""
    with pytest.raises(PlanError, match=reason) as caught:
        Plan.checked(labels, **settings)
    assert caught.value.field == field


def test_a_word_outside_the_vocabulary_can_be_insisted_on() -> None:
    """The refusal lists the vocabulary and says how; insisting makes the plan."""
    with pytest.raises(PlanError, match=r"airplane, plane, .* Send allow_unknown_labels"):
        Plan.checked(["cat", "unicorn"])
    assert Plan.checked(["cat", "unicorn"], allow_unknown_labels=True).labels[1] == "unicorn"


@pytest.mark.parametrize("label", ["STRASSE", "stra\u00dfe", "red,blue", "\ufb01sh", "\u0130z"])
def test_letter_case_and_white_space_may_change(label: str) -> None:
    """A label that is read with other letter case or white space alone is taken as it is."""
    assert Plan.checked([label, "dog"], allow_unknown_labels=True).labels == (label, "dog")


@pytest.mark.parametrize("template", ["{}", "Animal: {}", "{}, a photo"])
def test_a_template_is_read_with_a_word_in_it(template: str) -> None:
    """A sign that is only lost where nothing stands beside it does not refuse the template."""
    assert Plan.checked(["cat", "dog"], template=template).template == template


def test_a_prompt_stands_for_its_label(tmp_path: Path) -> None:
    """The cascade and the classifier are given the prompt, answers the label; a plan is written
    with both, and its references start from the noise of the prompt's."""
    plan = Plan.checked([(" \u732b", "cat "), "dog"])
    plain = Plan.checked(["cat", "dog"])
    assert (plan.labels, plan.words) == (("\u732b", "dog"), ("cat", "dog"))
    assert plan.captions() == plain.captions()
    assert plan.seed_of(0, 3) == plain.seed_of(0, 3)
    assert plan.identity(SECRET) != plain.identity(SECRET)
    assert plan.document["prompts"] == {"\u732b": "cat"}
    write_json(tmp_path / PLAN, {"plan": plan.document})
    assert Plan.read(tmp_path) == plan


def test_a_plan_without_prompts_is_the_task_it_was() -> None:
    """Plans in which no prompt differs keep the id, and the document, of earlier releases."""
    plan = Plan.checked([("cat", "cat"), "dog"])
    assert plan == Plan.checked(["cat", "dog"])
    assert plan.identity(SECRET) == "60ae870ce3f63ae4f0b2cdf8f1ef86da"
    assert plan.seed_of(1, 3) == 6720977918792239898
    assert "prompts" not in plan.document


def test_a_status_is_whole_or_not_there(tmp_path: Path) -> None:
    """A job nobody began is queued; what was written is read; a later release's fields are let be;
    a document that cannot be written leaves the one before."""
    assert Status.read(tmp_path) == Status()
    running = Status("running", stage="finetuning", progress=0.5, losses={"finetuning": 1.0})
    running.write(tmp_path)
    assert Status.read(tmp_path) == running
    path = tmp_path / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "red"}))
    assert Status.read(tmp_path) == running
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"progress": float("nan")})
    assert Status.read(tmp_path) == running
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_a_folder_is_run_by_one_at_a_time(tmp_path: Path) -> None:
    """Whoever comes second waits for the first to let go."""
    entered = threading.Event()

    def second() -> None:
        with locked(tmp_path):
            entered.set()

    with locked(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(5)
    thread.join()
