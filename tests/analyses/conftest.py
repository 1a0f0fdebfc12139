"""Small runs: fewer draws of what chance gives, which these tests do not look at; and one decomposition of each case."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest

from analyses.study.case import Case, Member
from analyses.study.family import BundledFamily
from decompclip.operators import roles


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roles, "CHANCE_DRAWS", 5)


@pytest.fixture(scope="session", autouse=True)
def each_case_once() -> Iterator[None]:
    """A bundled model with its images and terms, which analyses read and do not change, is made once for all tests."""
    make = BundledFamily.case

    @cache
    def made(family: str, name: str, images: int, seed: int) -> Case:
        own = BundledFamily(family)
        return make(own, own.select((name,))[0], images=images, seed=seed)

    def case(self: BundledFamily, member: Member, *, images: int, seed: int = 0) -> Case:
        return made(self.name, member.name, images, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BundledFamily, "case", case)
        yield
