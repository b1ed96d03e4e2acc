"""Commands that are somebody's duty: budgets, the log's key, the pinned checkpoint, evidence. Each asks for the role first, then does one thing.

    open, raise             owner; a raise also needs a second person's approval ("NAME to EPSILON")
    reserve                 engineer
    show, plan, evidence    whoever may read
    rotate the log's key    owner
    accept a rollback       privacy officer
    one person's identifiers  privacy officer
    propose, approve        two people, each with a role; whoever proposed does not approve

Why here: the ledger and the log decide what is possible, `governance.access` who may; neither knows the other.

Does not cover: whoever calls `Ledger` and `Log` from Python, where `Access` is theirs to ask.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from discreet import dossier, pipeline
from discreet.errors import PlanInvalid, RecordInvalid, RequestInvalid, SourceMissing
from discreet.evidence.statement import JSON, Predicate, Statement
from discreet.governance import catalog
from discreet.governance.access import Action, current_user
from discreet.keys import Key
from discreet.ledger import Kind, Period, Reservation, Spend
from discreet.pipeline import House
from discreet.record import Digest, SubjectId
from discreet.store import write_atomically

_FORMS = {Action.RELEASE: re.compile(r"sha256:[0-9a-f]{64}"), Action.RAISE_BUDGET: re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,126} to [0-9.e+-]{1,16}")}
FACTORS = (0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)


def ask(house: House, action: Action) -> None:
    """Lets the user of this process act, or refuses. Errors as `Access.require`."""
    house.access.require(action, who=current_user())


def propose(house: House, action: Action, about: str) -> None:
    """Proposes what needs a second person. Errors as `Access.propose`; RequestInvalid when `about` is not of the action's form."""
    house.access.propose(action, who=current_user(), about=_bound_to(house, action, about))


def approve(house: House, action: Action, about: str) -> None:
    """Approves what somebody else proposed. Errors as `Access.approve`; RequestInvalid when `about` is not of the action's form."""
    house.access.approve(action, who=current_user(), about=_bound_to(house, action, about))


def break_glass(house: House, action: Action, reason: str) -> None:
    """Opens one action for an hour; the log keeps the reason without identifiers. Errors as `Access.break_glass`."""
    house.access.break_glass(action, who=current_user(), reason=pipeline.for_log(house, reason))


def _bound_to(house: House, action: Action, about: str) -> str:
    """What exactly an approval is for, of a closed form: the log keeps it, and a person is named in it by an HMAC alone."""
    if action is Action.REIDENTIFY:
        return pipeline.reidentification(house, about)
    form = _FORMS.get(action)
    if form is not None and not form.fullmatch(about):
        raise RequestInvalid(f"what {action.value} is about: an adapter's digest, or 'NAME to EPSILON'")
    return about


def open_budget(house: House, name: str, *, epsilon: float, delta: float, unit: str, query_delta: float, period: Period | None) -> dict[str, Any]:
    """Opens a budget. Errors as `Ledger.open` and `Access.require`."""
    house.access.require(Action.OPEN_BUDGET, who=current_user())
    held = house.ledger.open(name, epsilon=epsilon, delta=delta, unit=unit, query_delta=query_delta, period=period)
    return pipeline.budget_fields(held)


def raise_budget(house: House, name: str, *, epsilon: float, reason: str) -> dict[str, Any]:
    """Raises a budget, after the approval of a second person where roles are configured. Errors as `Ledger.raise_to` and `Access.require`."""
    if not reason.strip():
        raise PlanInvalid("a reason for raising a budget", remedy="Give --reason; the log keeps it, and it is public.")
    house.ledger.show(name)
    house.access.require(Action.RAISE_BUDGET, who=current_user(), about=f"{name} to {epsilon:g}")
    return pipeline.budget_fields(house.ledger.raise_to(name, epsilon, reason=pipeline.for_log(house, reason)))


def show_budgets(house: House, name: str | None) -> list[dict[str, Any]]:
    """Returns one budget, or all of them, each with what was spent by PLD had everything been fixed in advance; the filter decides."""
    house.access.require(Action.READ, who=current_user())
    shown = [house.ledger.show(name)] if name else house.ledger.budgets()
    return [pipeline.budget_fields(held) | {"spent_pld": house.ledger.composition(held.name).epsilon_pld} for held in shown]


def reserve(house: House, name: str, *, epsilon: float, delta: float, kind: Kind) -> Reservation:
    """Charges a query to everyone. Errors as `Ledger.charge` and `Access.require`."""
    house.access.require(Action.RUN, who=current_user())
    return house.ledger.charge(name, [Spend(kind=kind, epsilon=epsilon, delta=delta)])[0]


def plan(house: House, name: str, *, sampling_probability: float, noise_multiplier: float) -> dict[str, Any]:
    """Returns what a budget still buys now at this utility, and at more and less noise. Errors as `Ledger.affordable`."""
    house.access.require(Action.READ, who=current_user())
    held = house.ledger.show(name)
    rates = [noise_multiplier * factor for factor in FACTORS]
    curve: list[dict[str, Any]] = [
        {"noise_multiplier": sigma, "steps": house.ledger.affordable(name, sampling_probability=sampling_probability, noise_multiplier=sigma)}
        for sigma in rates
    ]
    steps = curve[FACTORS.index(1.0)]["steps"]
    asked = {"sampling_probability": sampling_probability, "noise_multiplier": noise_multiplier}
    bought = {"steps": steps, "epochs": steps * sampling_probability, "curve": curve}
    return {"budget": name, "epsilon": held.epsilon, "remaining": held.remaining_epsilon, "unlocked": held.unlocked, **asked, **bought}


def export_evidence(house: House, out: Path, *, public: bool) -> tuple[Path, Path]:
    """Writes the officer's folder and the public key beside it. Errors as `dossier.write`."""
    house.access.require(Action.READ, who=current_user())
    return dossier.export(house.log, house.store, out, public=public)


def rotate_key(house: House, out: Path) -> dict[str, Any]:
    """Gives the log a new key and writes the public keys, oldest first, where they were asked for."""
    house.access.require(Action.ROTATE_KEY, who=current_user())
    keys = house.log.rotate()
    write_atomically(out, (keys + "\n").encode())
    return {"keys": keys.split("\n"), "file": str(out)}


def accept_rollback(folder: Path, *, by: str, reason: str) -> dict[str, Any]:
    """Goes on with a database that lost entries, in the name of a person, in the log; the suppressions of the journal are applied as at every start."""
    if not by.strip() or not reason.strip():
        raise PlanInvalid("the name and the reason of whoever accepts the loss", remedy="Give --by and --reason.")
    with pipeline.open_house(folder, lost=(by, reason)) as house:
        return {"checkpoint": house.log.pin().decode()}


def same_person(house: House, file: Path) -> int:
    """Reads a CSV of subject and same_as, and makes each subject one person with the other from now on; all of them or none. Returns how many are new.

    Whom same_as names is not checked: they need not have been collected yet.

    Raises:
        SourceMissing, RecordInvalid: when it cannot be read, or an identifier was collected, erased or spoken for already; nothing is declared.
    """
    house.access.require(Action.CONSENT, who=current_user())
    try:
        rows = list(csv.DictReader(file.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError):
        raise SourceMissing("a readable CSV file in UTF-8") from None
    pairs = [(str(row.get("subject") or "").strip(), str(row.get("same_as") or "").strip()) for row in rows]
    for place, (second, first) in enumerate(pairs, start=1):
        if not second or not first:
            raise RecordInvalid("a subject and whom it is the same as", value=f"pair {place}")

    def agree(tx: Connection, new: Mapping[int, SubjectId]) -> None:
        for place, own in new.items():
            if house.consent.has_heard_of(tx, own):
                raise RecordInvalid(
                    "an identifier under which nobody has spoken or was erased yet",
                    value=f"pair {place}",
                    remedy="Declare it as the first of the two.",
                )
        about = Digest(
            "sha256:" + Key.random().stream("same").bytes(32).hex()
        )  # nobody in particular: no leaf is to link to them once they are erased
        fields: dict[str, JSON] = {"change": "identifiers declared to be one person", "pairs": len(new), "by": current_user().name}
        house.log.append(tx, Statement(predicate=Predicate.CONSENT_CHANGED, subjects=(about,), fields=fields))

    return catalog.declare_same(house.keyring, unit=house.project.privacy.unit, pairs=pairs, agree=agree)


def pin(house: House) -> dict[str, Any]:
    """Returns the checkpoint that is kept outside the database."""
    house.access.require(Action.READ, who=current_user())
    return {"checkpoint": house.log.pin().decode()}


def tiles(house: House, out: Path) -> dict[str, Any]:
    """Writes the log's tiles for mirrors and monitors."""
    house.access.require(Action.READ, who=current_user())
    folder = house.log.export_tiles(out)
    return {"folder": str(folder), "tiles": sum(path.is_file() for path in (folder / "tile").rglob("*")) if (folder / "tile").is_dir() else 0}
