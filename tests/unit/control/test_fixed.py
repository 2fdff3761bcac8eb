"""`fixed`, and the registry that makes controllers."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import paceline.control
from paceline.control import registry
from paceline.control.base import Controller, RoundContext
from paceline.control.fixed import Fixed, FixedOptions
from paceline.errors import OptionError
from paceline.records import Outlook
from unit.control.kit import costs


def context(*available: int, max_draft: int = 16) -> RoundContext:
    return RoundContext(0, 100, max_draft, tuple(Outlook(f"d{i}", n) for i, n in enumerate(available)))


def fixed(num_draft: int) -> Fixed:
    return Fixed(FixedOptions(num_draft=num_draft), costs())


@pytest.mark.parametrize(
    ("num_draft", "available", "max_draft", "expected"),
    [(4, 16, 16, 4), (4, 2, 16, 2), (4, 16, 1, 1), (4, 16, 0, 0), (0, 16, 16, 0), (4, 0, 16, 0)],
)
def test_drafts_its_length_within_the_limits(num_draft: int, available: int, max_draft: int, expected: int) -> None:
    plan = fixed(num_draft).plan(context(available, max_draft=max_draft))
    assert plan.num_draft == expected
    assert (plan.drafter is None) == (expected == 0)


def test_takes_the_first_drafter_that_has_something() -> None:
    assert fixed(4).plan(context(0, 3, 9)).drafter == "d1"


@pytest.mark.parametrize("num_draft", [-1, 64, 2.5, True])
def test_refuses_a_length_out_of_range(num_draft: object) -> None:
    with pytest.raises(OptionError, match="num_draft"):
        FixedOptions(num_draft=num_draft)  # type: ignore[arg-type]


def test_registry_makes_every_controller_with_its_defaults() -> None:
    for name in registry.names():
        controller = registry.create(name, costs())
        assert isinstance(controller, Controller)
        assert controller.name == name
        assert registry.info(name).summary


def test_registry_names_what_it_knows() -> None:
    with pytest.raises(OptionError, match=r"'fixd'.*fixed"):
        registry.create("fixd", costs())
    with pytest.raises(OptionError, match=r"'nummer'.*num_draft"):
        registry.create("fixed", costs(), {"nummer": 3})


def test_controllers_do_not_import_torch() -> None:
    folder = Path(paceline.control.__file__).parent
    modules = [f"paceline.control.{path.stem}" for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
    code = f"import importlib, sys\nfor m in {modules}: importlib.import_module(m)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_no_signature_of_the_interface_can_carry_target_data() -> None:
    of_batches = {"Sequence[RoundContext]", "list[Plan]"}
    allowed = {"RoundContext", "Plan", "Plan | None", "int", "str", "DraftFeatures", "bool", "StepRecord", "None"} | of_batches
    outside_rounds = {"calibration", "explain", "restore", "snapshot"}
    for name, method in inspect.getmembers(Controller, inspect.isfunction):
        if name in outside_rounds:
            continue
        types = {str(annotation) for annotation in inspect.get_annotations(method).values()}
        assert types <= allowed, f"{name} takes or returns {types - allowed}"
