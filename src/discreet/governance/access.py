"""Who may do what: roles and actions as Cedar policies, deny by default, two pairs of eyes where one pair could cheat.

    owner            opens and raises budgets, registers sources, rotates the log's key
    engineer         runs the pipeline and proposes what two people have to want; searches, and asks for private answers
    privacy officer  erases, records consent, exports what a subject may see, approves; searches
    auditor          reads log, report, lineage and evidence, and changes nothing
    product          serves what was released; searches, and asks for private answers

Whose passages a search shows is not for the role alone to say: [retrieval] reads names the sources of each role, also behind broken glass.

A release, a raised budget and a re-identification need an approval: proposed by one person, approved by another whose role may, each bound to exactly that act and used once.
In an emergency `break_glass` opens one action for one person for an hour, with a reason, and says so in the log before it opens.

While `[access]` names nobody, the person at the keyboard holds all roles: a project of one person needs no set-up, and `Access.configured` lets the report say
so. A person is the operating system's user of this process (by user id, not by an environment variable); the gateway's callers are somebody else's to identify.

Guarantees: what no policy permits is refused; a `forbid` wins over every permit. Source: Cedar (Cutler et al. 2024), through cedarpy (extra: governance).
Does not cover: whoever can read the database file and the master key needs no permission; this separates duties among honest operators and leaves a trace.
"""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, final

from sqlalchemy import Column, ColumnElement, Float, Integer, String, Table, and_, delete, insert, select

from discreet.config import AccessSection
from discreet.errors import AccessDenied, NotFound, missing_extra
from discreet.evidence.log import Log
from discreet.evidence.statement import Predicate, Statement
from discreet.keys import Keyring
from discreet.record import Digest
from discreet.store import Store, metadata, now

BREAK_GLASS_S = 3600.0

_approvals = Table(
    "approvals",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("action", String(32), nullable=False),
    Column("about", String(80), nullable=False),
    Column("proposed_by", String(64), nullable=False),
    Column("approved_by", String(64), nullable=False),
)
_glass = Table(
    "broken_glass",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("action", String(32), nullable=False),
    Column("by", String(64), nullable=False),
    Column("until", Float, nullable=False),
)


class Role(StrEnum):
    """What somebody is to the project."""

    OWNER = "owner"
    ENGINEER = "engineer"
    PRIVACY_OFFICER = "privacy_officer"
    AUDITOR = "auditor"
    PRODUCT = "product"


class Action(StrEnum):
    """What somebody may want to do."""

    REGISTER_SOURCE = "register_source"
    OPEN_BUDGET = "open_budget"
    RAISE_BUDGET = "raise_budget"
    ROTATE_KEY = "rotate_key"
    RUN = "run"
    RELEASE = "release"
    SERVE = "serve"
    ERASE = "erase"
    CONSENT = "consent"
    ACCESS_EXPORT = "access_export"
    SEARCH = "search"
    ASK = "ask"
    REIDENTIFY = "reidentify"
    APPROVE = "approve"
    READ = "read"


TWO_PEOPLE = frozenset({Action.RAISE_BUDGET, Action.RELEASE, Action.REIDENTIFY})
"""Actions that one person proposes and another approves."""

POLICIES = """
permit(principal in Role::"owner", action in [Action::"register_source", Action::"open_budget", Action::"raise_budget", Action::"rotate_key", Action::"read"], resource);
permit(principal in Role::"engineer", action in [Action::"run", Action::"release", Action::"reidentify", Action::"search", Action::"ask", Action::"read"], resource);
permit(principal in Role::"privacy_officer", action in [Action::"erase", Action::"consent", Action::"access_export", Action::"approve", Action::"search", Action::"read"], resource);
permit(principal in Role::"auditor", action == Action::"read", resource);
permit(principal in Role::"product", action in [Action::"serve", Action::"search", Action::"ask"], resource);
permit(principal, action, resource) when { context.broken_glass };
forbid(principal, action, resource) when { context.needs_approval && !context.approved_by_another && !context.broken_glass };
forbid(principal, action == Action::"approve", resource) when { context.own_proposal };
"""


@final
@dataclass(frozen=True, slots=True)
class Principal:
    """A user of the operating system."""

    name: str


def current_user() -> Principal:
    """Returns the user of this process; the environment cannot change the answer."""
    try:
        return Principal(pwd.getpwuid(os.getuid()).pw_name)
    except KeyError:
        return Principal(f"uid-{os.getuid()}")


class Access:
    """The permissions of one project."""

    def __init__(self, section: AccessSection, *, store: Store, keyring: Keyring, log: Log) -> None:
        self._section = section
        self._store = store
        self._keyring = keyring
        self._log = log

    @property
    def configured(self) -> bool:
        """Whether `[access]` names anybody; else the local operator holds all roles."""
        return any(getattr(self._section, role.value) for role in Role)

    def roles(self, who: Principal) -> list[Role]:
        """Returns the roles of a person."""
        return [role for role in Role if not self.configured or who.name in getattr(self._section, role.value)]

    def require(self, action: Action, *, who: Principal, about: str = "") -> None:
        """Lets a person act, or refuses. An approval that was needed is used up.

        Args:
            action: what they want to do.
            who: the person.
            about: to what exactly an approval is bound (an adapter's digest, "default to 12").

        Raises:
            AccessDenied: when no policy permits it.
            MissingExtra: when `[access]` is configured and cedarpy is not installed.
        """
        if not self.configured:
            return
        approved = self._approved(action, who, about)
        if not self._decide(action, who, approved=approved, glass=self._has_broken_glass(action, who)):
            needs = action in TWO_PEOPLE and not approved
            remedy = f"Have another person approve it: `discreet access approve {action}`." if needs else "Ask somebody whose role may, see [access]."
            raise AccessDenied(f"a role that may {action.value.replace('_', ' ')}", value=", ".join(self.roles(who)) or "no role", remedy=remedy)
        if approved:
            self._use_up(action, who, about)

    def propose(self, action: Action, *, who: Principal, about: str) -> None:
        """Proposes an act that needs a second person. Idempotent.

        Raises:
            AccessDenied: when the person could not do it even with an approval.
            NotFound: when the action needs no approval.
        """
        if action not in TWO_PEOPLE:
            raise NotFound(f"an action out of {', '.join(sorted(TWO_PEOPLE))}", value=action.value)
        if self.configured and not self._decide(action, who, approved=True, glass=False):
            raise AccessDenied(f"a role that may {action.value.replace('_', ' ')}", value=", ".join(self.roles(who)) or "no role")
        with self._store.transaction() as tx:
            same = (_approvals.c.action == action.value) & (_approvals.c.about == about) & (_approvals.c.proposed_by == who.name)
            if tx.execute(select(_approvals.c.number).where(same)).first() is None:
                tx.execute(insert(_approvals).values(action=action.value, about=about, proposed_by=who.name, approved_by=""))

    def approve(self, action: Action, *, who: Principal, about: str) -> None:
        """Approves what somebody else proposed, and logs it.

        Raises:
            AccessDenied: when it is one's own proposal, or the role may not approve.
            NotFound: when nobody proposed it.
        """
        with self._store.transaction() as tx:
            same = (_approvals.c.action == action.value) & (_approvals.c.about == about) & (_approvals.c.approved_by == "")
            rows = tx.execute(select(_approvals).where(same).order_by(_approvals.c.number)).all()
        if not rows:
            raise NotFound("a proposal to approve", value=action.value)
        others = [row for row in rows if row.proposed_by != who.name]
        if self.configured and not self._decide(Action.APPROVE, who, approved=False, glass=False, own=not others):
            raise AccessDenied("an approval by another person whose role may", value=", ".join(self.roles(who)) or "no role")
        row = (others or rows)[0]
        with self._store.transaction() as tx:
            tx.execute(_approvals.update().where(_approvals.c.number == row.number).values(approved_by=who.name))
            fields = {
                "kind": "approval",
                "action": action.value,
                "about": about,
                "by": who.name,
                "proposed_by": row.proposed_by,
                "role": ", ".join(self.roles(who)),
            }
            self._log.append(tx, Statement(predicate=Predicate.ACCESS_GRANTED, subjects=(self._digest(action, who),), fields=fields))

    def break_glass(self, action: Action, *, who: Principal, reason: str) -> float:
        """Opens one action for one person for an hour, and logs it first. Returns when it closes, in seconds since 1970.

        Raises:
            AccessDenied: when no reason is given, or the person has no role at all.
        """
        if len(reason.strip()) < 10 or not self.roles(who):
            raise AccessDenied("a role in this project and a reason of at least ten characters", remedy="Say why it cannot wait.")
        with self._store.transaction() as tx:
            until = now(tx) + BREAK_GLASS_S
            tx.execute(insert(_glass).values(action=action.value, by=who.name, until=until))
            fields = {"kind": "break-glass", "action": action.value, "by": who.name, "reason": reason.strip(), "role": ", ".join(self.roles(who))}
            self._log.append(tx, Statement(predicate=Predicate.ACCESS_GRANTED, subjects=(self._digest(action, who),), fields=fields))
        return until

    def _decide(self, action: Action, who: Principal, *, approved: bool, glass: bool, own: bool = False) -> bool:
        try:
            import cedarpy  # Rust, in an extra; only projects with roles pay
        except ImportError:
            raise missing_extra("governance", "cedarpy") from None
        entities: list[dict[Any, Any]] = [
            {"uid": {"type": "User", "id": who.name}, "attrs": {}, "parents": [{"type": "Role", "id": role.value} for role in self.roles(who)]},
            *({"uid": {"type": "Role", "id": role.value}, "attrs": {}, "parents": []} for role in Role),
        ]
        request = {
            "principal": {"type": "User", "id": who.name},
            "action": {"type": "Action", "id": action.value},
            "resource": {"type": "Project", "id": "this"},
            "context": {"needs_approval": action in TWO_PEOPLE, "approved_by_another": approved, "broken_glass": glass, "own_proposal": own},
        }
        return bool(cedarpy.is_authorized(request, POLICIES, entities).allowed)

    def _approved(self, action: Action, who: Principal, about: str) -> bool:
        if action not in TWO_PEOPLE:
            return False
        with self._store.transaction() as tx:
            return tx.execute(select(_approvals.c.number).where(_of(action, who, about))).first() is not None

    def _use_up(self, action: Action, who: Principal, about: str) -> None:
        with self._store.transaction() as tx:
            if tx.execute(delete(_approvals).where(_of(action, who, about))).rowcount < 1:
                raise AccessDenied("an approval that was not used yet")

    def _has_broken_glass(self, action: Action, who: Principal) -> bool:
        with self._store.transaction() as tx:
            mine = (_glass.c.action == action.value) & (_glass.c.by == who.name) & (_glass.c.until > now(tx))
            return tx.execute(select(_glass.c.number).where(mine)).first() is not None

    def _digest(self, action: Action, who: Principal) -> Digest:
        return Digest("sha256:" + self._keyring.hmac("access", f"{action.value}/{who.name}".encode()).hex())


def _of(action: Action, who: Principal, about: str) -> ColumnElement[bool]:
    """The approvals by another person of what this person proposed."""
    return and_(
        _approvals.c.action == action.value,
        _approvals.c.about == about,
        _approvals.c.proposed_by == who.name,
        _approvals.c.approved_by != "",
        _approvals.c.approved_by != who.name,
    )
