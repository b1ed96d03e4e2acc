"""Access: deny by default, two people where one could cheat, the broken glass on the record, and no set-up for a project of one."""

from __future__ import annotations

import time

import pytest

from discreet.config import AccessSection
from discreet.errors import AccessDenied, NotFound
from discreet.evidence.statement import Predicate
from discreet.governance.access import BREAK_GLASS_S, Access, Action, Principal, Role

ROLES = {"owner": ["olga"], "engineer": ["emil", "eva"], "privacy_officer": ["petra", "emil"], "auditor": ["axel"], "product": ["pia"]}
ANN, EMIL, EVA, PETRA, AXEL = (Principal(name) for name in ("ann", "emil", "eva", "petra", "axel"))


def access(house, **section):
    return Access(AccessSection(**section), store=house.store, keyring=house.keyring, log=house.log)


def test_a_project_of_one_needs_no_set_up(house):
    alone = access(house)
    assert not alone.configured
    assert alone.roles(ANN) == list(Role)
    for action in Action:
        alone.require(action, who=ANN)


def test_what_no_policy_permits_is_refused(house):
    guarded = access(house, **ROLES)
    guarded.require(Action.RUN, who=EVA)
    guarded.require(Action.ERASE, who=PETRA)
    guarded.require(Action.READ, who=AXEL)
    for who, action in [(ANN, Action.READ), (EVA, Action.ERASE), (AXEL, Action.RUN), (Principal("pia"), Action.READ), (PETRA, Action.RUN)]:
        with pytest.raises(AccessDenied):
            guarded.require(action, who=who)


def test_a_release_needs_a_second_person_and_an_approval_is_used_once(house):
    guarded = access(house, **ROLES)
    with pytest.raises(AccessDenied, match="approve"):
        guarded.require(Action.RELEASE, who=EMIL, about="sha256:1")
    guarded.propose(Action.RELEASE, who=EMIL, about="sha256:1")
    with pytest.raises(AccessDenied):
        guarded.approve(Action.RELEASE, who=EMIL, about="sha256:1")  # he may approve, but not his own
    with pytest.raises(AccessDenied):
        guarded.approve(Action.RELEASE, who=EVA, about="sha256:1")
    guarded.approve(Action.RELEASE, who=PETRA, about="sha256:1")
    with pytest.raises(AccessDenied):
        guarded.require(Action.RELEASE, who=EMIL, about="sha256:2")
    with pytest.raises(AccessDenied):
        guarded.require(Action.RELEASE, who=EVA, about="sha256:1")
    guarded.require(Action.RELEASE, who=EMIL, about="sha256:1")
    with pytest.raises(AccessDenied):
        guarded.require(Action.RELEASE, who=EMIL, about="sha256:1")
    with pytest.raises(NotFound):
        guarded.approve(Action.RELEASE, who=PETRA, about="sha256:3")


def test_broken_glass_is_logged_and_closes(house, monkeypatch):
    guarded = access(house, **ROLES)
    with pytest.raises(AccessDenied):
        guarded.break_glass(Action.ERASE, who=ANN, reason="a stranger with a good reason")
    with pytest.raises(AccessDenied):
        guarded.break_glass(Action.ERASE, who=EVA, reason="because")
    guarded.break_glass(Action.ERASE, who=EVA, reason="the officer is ill and the month ends today")
    guarded.require(Action.ERASE, who=EVA)
    with pytest.raises(AccessDenied):
        guarded.require(Action.CONSENT, who=EVA)
    [entry] = house.log.select(Predicate.ACCESS_GRANTED)
    assert entry.fields["kind"] == "break-glass"
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + BREAK_GLASS_S + 1)
    with pytest.raises(AccessDenied):
        guarded.require(Action.ERASE, who=EVA)
