"""Line 8: the model attacked with canaries and controls, and the control that says what privacy cost."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from discreet import corpus, model
from discreet.audit import bounds, deployed, extraction, membership, records, risk
from discreet.audit import canaries as canary
from discreet.audit.canaries import Canaries
from discreet.audit.external import LooseTradeOff
from discreet.config import ModelSection, TrainSection
from discreet.dp import accounting
from discreet.errors import DigestMismatch, NotFound, TrackRefused
from discreet.evidence.statement import JSON, Predicate, Statement
from discreet.keys import Key
from discreet.model import Base, PublicText
from discreet.pipeline.admission import audit_design, plant_canaries
from discreet.pipeline.continuing import promise_of, runs_above
from discreet.pipeline.house import House, Observer, config_of, finished_result, keep_result, needed_result, run_config, subject_of
from discreet.pipeline.pricing import plan_of
from discreet.pipeline.weights import all_texts, frozen_public, last_public, load_base, rounded_curve, setup_of, shown_to
from discreet.record import Basis, Digest, Sensitivity, Snapshot
from discreet.train import loop

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

CONTROL_BATCH = 16
OF_RECORDS, OF_CHILDREN = 0.1, 0.1
"""Shares of an audit's level for real records and for deployed children; the rest is the canaries'."""
RECITED = 40
"""Planted canaries that both models are asked to recite."""
IDENTIFIERS = 40
"""Sentences with an invented identifier, half of which the control is taught: whether reading what a model writes would find any."""


def audit(house: House, observer: Observer) -> dict[str, Any]:
    """Attacks the trained model with its canaries, beside a control that must be caught; logs the verdict.

    The control and every reference see canaries and public text only, never a sensitive record; the control lives in memory and is gone when this returns.

    Raises:
        NotFound: when nothing has been trained yet.
    """
    trained = needed_result(house, "train")
    done = finished_result(house, "audit")
    if done is not None:
        return done
    observer.stage("audit")
    canaries, plan, promised = plant_canaries(house), plan_of(house, trained["run"]), promise_of(house, trained["run"])
    base = load_base(house, None, observer)
    adapter = house.project.state / "runs" / trained["run"] / "adapter"
    if base.digest != trained["base"]:
        raise DigestMismatch("the base model that was trained on", remedy="Restore the files; another model cannot be audited in their place.")
    private = model.load_adapter(base, adapter, digest=Digest(trained["adapter"]))
    untouched = _log_likelihoods(house, base.module, base, canaries)
    scored = _log_likelihoods(house, private, base, canaries) - untouched
    observer.note("scored the private model; training the control on canaries alone")
    identifying = canary.plant_identifiers(IDENTIFIERS, key=house.keyring.purpose("identifiers").stream("plant"))
    control = _control(house, base, [*canaries, *identifying], observer)
    controlled = _log_likelihoods(house, control, base, canaries) - untouched
    level, claim = _level_of_this(house), _claimed_curve(promised)
    rounded = _children(house, private, base, canaries, untouched, scored, trade_off=claim, level=OF_CHILDREN * level)
    leaked = {
        name: extraction.leaks(module, base.tokenizer, identifying, key=house.keyring.purpose("identifiers").stream("answers"))
        for name, module in (("private", private), ("control", control))
    }
    sees = leaked["control"]["planted"].low > leaked["control"]["held_out"].high
    attacked = _attack(house, trained, base, private, observer, sees_identifiers=sees, trade_off=claim, level=OF_RECORDS * level)
    found = bounds.verdict(
        scored,
        canaries.included,
        control=controlled,
        negatives={
            "bag of words": membership.blind(canaries.texts, canaries.included),
            "untouched model": bounds.area_under_curve(untouched, canaries.included),
        },
        epsilon=promised.epsilon,
        delta=promised.delta,
        trade_off=claim,
        fpr=house.project.audit.false_positive_rate,
        level=(1 - OF_CHILDREN - OF_RECORDS) * level,
        mechanism=[
            _committed(house, Digest(trained["snapshot"]), canaries),
            bounds.mechanism_layer(
                accounted_steps=plan.steps, executed_steps=trained["steps"], trainable=trained["parameters"], moved=trained["moved"]
            ),
            *(
                bounds.Layer(name=each["name"], verdict=bounds.Verdict(each["verdict"]), figures=each["figures"])
                for each in trained.get("mechanism", ())
            ),
            *rounded,
            *(_told(each) for each in attacked["layers"]),
        ],
    )
    observer.note(f"verdict {found.verdict}; asking both models to recite")
    result = found.to_json() | {"adapter": trained["adapter"], "run": trained["run"], "canaries": len(canaries), "level": level}
    result["records"] = attacked
    result["recitation"] = _recitation(house, base, {"private": (private, scored), "control": (control, controlled)}, canaries) | {
        "identifiers": {name: {side: share.figures() for side, share in found.items()} for name, found in leaked.items()}
    }
    if found.verdict is not bounds.Verdict.PASS:
        result["recitation"]["example"]["private"] = "(not shown: the audit did not pass)"
    del control
    with house.store.transaction() as tx:
        subject = (Digest(trained["adapter"]),)
        house.log.append(tx, Statement(predicate=Predicate.AUDITED, subjects=subject, fields=_audit_fields(result)))
        inside: dict[str, JSON] = {"adapter": trained["adapter"], "run": trained["run"], **attacked}
        house.log.append(tx, Statement(predicate=Predicate.ATTACKED, subjects=subject, fields=inside))
        fields = {"control": f"control of {trained['run']}", "run": trained["run"], "kind": "non-private, canaries only", "reason": "audit done"}
        house.log.append(tx, Statement(predicate=Predicate.CONTROL_DESTROYED, subjects=subject, fields=fields))
        keep_result(tx, "audit", config_of(house, "audit"), result)
    return result


def audit_child(house: House, base: Base, adapter: Path, child: nn.Module, *, kind: str) -> tuple[bounds.Layer, float]:
    """Attacks the merged child of an audited adapter with the canaries of its parent.

    Args:
        child: as it will run; `kind` names what it is stored as.

    Returns:
        the layer, and the level that it was tested at: a child's audit is an audit more.
    """
    canaries, promised = plant_canaries(house), promise_of(house, needed_result(house, "audit")["run"])
    untouched = _log_likelihoods(house, base.module, base, canaries)
    parent, scored = (_log_likelihoods(house, each, base, canaries) - untouched for each in (model.load_adapter(base, adapter), child))
    level, fpr = _level_of_this(house), house.project.audit.false_positive_rate
    return deployed.layer(kind, scored, parent, canaries.included, trade_off=_claimed_curve(promised), fpr=fpr, level=level), level


def _level_of_this(house: House) -> float:
    """What is left of the level that all audits of a project share."""
    number = 1 + sum(len(house.log.select(kind)) for kind in (Predicate.AUDITED, Predicate.CHILD_AUDITED))
    return bounds.spent_level(house.project.audit.level, number)


def _claimed_curve(promised: accounting.Guarantee) -> bounds.TradeOff:
    """The curve of the event where PLD knows it; of a search, that of its (epsilon, delta) alone."""
    if accounting.has_pld(promised.event):
        return accounting.trade_off(promised.event)
    return LooseTradeOff(epsilon=promised.epsilon, delta=promised.delta)


def _committed(house: House, snapshot: Digest, canaries: Canaries) -> bounds.Layer:
    """FAIL when the corpus does not hold the canaries that are said to be in, and no other; INCONCLUSIVE when they, or how they are read, were committed to after it was frozen."""
    committed = canary.commitment(canaries, salt=house.keyring.purpose("canaries").mac(b"commitment"), design=audit_design(house))
    when = min((entry.index for entry in house.log.select(Predicate.COMMITTED) if entry.fields["commitment"] == committed), default=None)
    frozen = min(entry.index for entry in house.log.select(Predicate.FROZEN) if snapshot in entry.subjects)
    units = corpus.open_snapshot(snapshot, keyring=house.keyring, folder=house.snapshots).units.reveal()
    found = [subject_of(house, each.name) in units for each in canaries]
    early, right = when is not None and when < frozen, found == canaries.included
    figures = {"canaries": len(canaries), "committed_before_freezing": early, "planted_as_committed": right}
    said = bounds.Verdict.FAIL if not right else bounds.Verdict.PASS if early else bounds.Verdict.INCONCLUSIVE
    return bounds.Layer(name="canaries as committed", verdict=said, figures=figures)


def _log_likelihoods(house: House, module: nn.Module, base: Base, canaries: Canaries) -> NDArray[np.float64]:
    return membership.log_likelihoods(module, base.tokenizer, canaries.texts, token_budget=house.project.run.token_budget)


def _children(
    house: House,
    private: nn.Module,
    base: Base,
    canaries: Canaries,
    untouched: NDArray[np.float64],
    parent: NDArray[np.float64],
    *,
    trade_off: bounds.TradeOff,
    level: float,
) -> list[bounds.Layer]:
    """Audits the model as it will be deployed, with the same canaries."""
    kinds, found = house.project.audit.deployed, []
    for kind, child in deployed.children(private, kinds):
        scored = _log_likelihoods(house, child, base, canaries) - untouched
        fpr = house.project.audit.false_positive_rate
        found.append(deployed.layer(kind, scored, parent, canaries.included, trade_off=trade_off, fpr=fpr, level=level / len(kinds)))
    return found


def _attack(
    house: House,
    trained: Mapping[str, Any],
    base: Base,
    private: nn.Module,
    observer: Observer,
    *,
    sees_identifiers: bool,
    trade_off: bounds.TradeOff,
    level: float,
) -> dict[str, Any]:
    """Layers 3 and 4 on the records of those who were trained on and of those whom the coin withheld; and the most exposed, without names. All of it stays inside."""
    rules = house.project.audit
    if trained.get("withheld") is None:
        said = bounds.Verdict.INCONCLUSIVE
        layers = [bounds.Layer(name=name, verdict=said, figures={"withheld": rules.withheld}).to_json() for name in records.NAMES]
        return {"layers": layers, "people": [], "roc": {}}
    observer.note("attacking real records")
    found = records.attack(
        _attacked(house, trained), _means(house, base, private, observer, sees_identifiers=sees_identifiers), trade_off=trade_off, level=level
    )
    exposed = risk.ranked(found.scores, found.members, trade_off=trade_off) if len(found.scores) else []
    return {
        "layers": [layer.to_json() for layer in found.layers],
        "people": [each.figures() for each in exposed],
        "roc": {name: [list(point) for point in points] for name, points in found.roc.items()},
    }


def _told(layer: Mapping[str, Any]) -> bounds.Layer:
    """What leaves of a layer on real records: FAIL, or that it did not fail. PASS and INCONCLUSIVE differ by how many people there are, which is private."""
    failed = layer["verdict"] == bounds.Verdict.FAIL
    return bounds.Layer(name=layer["name"], verdict=bounds.Verdict.FAIL if failed else bounds.Verdict.INCONCLUSIVE, figures={})


def _attacked(house: House, trained: Mapping[str, Any]) -> records.Attacked:
    """At most `[audit] people` on each side who have not withdrawn, chosen by a keyed hash, with two records each. Whom a run above this one saw is no outsider."""
    key, planted = house.keyring.purpose("attacked"), {subject_of(house, each.name) for each in plant_canaries(house)}
    roots = [house.ledger.of_run(run).snapshot for run in runs_above(house, trained["run"])]
    seen = {subject for root in roots if root for subject in _opened(house, root).units.reveal()}
    rows: list[tuple[str, str, bool]] = []
    for root, inside in ((trained["snapshot"], True), (trained["withheld"], False)):
        snapshot = _opened(house, Digest(root))
        recorded = corpus.digests(snapshot, house.keyring)
        gone = {digest for digest, _ in house.consent.revoked(recorded, house.project.purpose)}
        units = {
            subject: positions
            for subject, positions in snapshot.units.reveal().items()
            if subject not in planted and (inside or subject not in seen) and gone.isdisjoint(recorded[position] for position in positions)
        }
        chosen = sorted(units, key=lambda subject: key.mac(subject.encode()))[: house.project.audit.people]
        where = [(subject, position) for subject in chosen for position in units[subject][:2]]
        texts = corpus.texts(snapshot, [position for _, position in where], house.keyring)
        rows += [(text, subject, inside) for text, (subject, _) in zip(texts, where, strict=True)]
    return records.Attacked(texts=[row[0] for row in rows], subjects=[row[1] for row in rows], members=np.array([row[2] for row in rows]))


def _opened(house: House, root: Digest) -> Snapshot:
    return corpus.open_snapshot(root, keyring=house.keyring, folder=house.snapshots)


def _means(house: House, base: Base, private: nn.Module, observer: Observer, *, sees_identifiers: bool) -> records.Means:
    """What the attacker has: the base, adapters trained on public text alone, public beginnings."""
    rules, held_out = house.project.audit, frozen_public(house, "evaluation")
    key = house.keyring.purpose("attack")
    return records.Means(
        module=private,
        reference=base.module,
        tokenizer=base.tokenizer,
        key=key.stream("draws"),
        references=_references(house, base, held_out, key, observer),
        population=held_out,
        neighbours=rules.neighbours,
        prompts=[" ".join(held_out[number % len(held_out)].split()[: 4 + number % 5]) for number in range(rules.answers)],
        sees_identifiers=sees_identifiers,
        token_budget=min(512, house.project.run.token_budget),
    )


def _references(house: House, base: Base, held_out: Sequence[str], key: Key, observer: Observer) -> list[nn.Module]:
    """Reference adapters of the audited kind, each on a random half of the project's public text: never on a sensitive record (PITFALLS 38). They live in memory only."""
    text, made = frozen_public(house, "public"), []
    for number in range(house.project.audit.references if text else 0):
        coins = key.stream("half", number).bytes(len(text))
        half = PublicText.of(
            [each for each, coin in zip(text, coins, strict=True) if coin & 1][:128], sensitivity=Sensitivity.PUBLIC, basis=Basis.CONSENT
        )
        setup = setup_of(house, base, held_out=PublicText(tuple(held_out[:1])), evaluations=1)
        steps = -(-len(half.texts) // CONTROL_BATCH)
        made.append(
            loop.fit(
                half, setup=setup, steps=steps, batch=CONTROL_BATCH, order=key.stream("order", number), on_step=shown_to(observer, "reference")
            ).module
        )
    return made


def _recitation(house: House, base: Base, models: Mapping[str, tuple[nn.Module, NDArray[np.float64]]], canaries: Canaries) -> dict[str, Any]:
    """Asks both models, each with its scores, to complete canaries: the same prompts, side by side. Canaries are generated text, so they may be shown."""
    planted, held_out = ([each for each in canaries if each.included is side][:RECITED] for side in (True, False))
    budget = house.project.run.token_budget
    said = {name: extraction.recite(module, base.tokenizer, [*planted, *held_out], token_budget=budget) for name, (module, _) in models.items()}
    shown = max(range(len(planted)), key=lambda row: said["control"][row].matched_fraction)
    return {
        "tried": len(planted),
        "control": sum(each.exact for each in said["control"][: len(planted)]),
        "private": sum(each.exact for each in said["private"][: len(planted)]),
        "extraction": {name: extraction.measured(said[name], scores, canaries.included) for name, (_, scores) in models.items()},
        "example": {"prompt": planted[shown].prefix, **{name: said[name][shown].continuation for name in ("control", "private")}},
    }


def _control(house: House, base: Base, canaries: Sequence[canary.Canary], observer: Observer) -> nn.Module:
    """Trains the positive control without privacy on the planted canaries alone, all weights of the last blocks. It lives in memory only.

    It has more room to memorise than the private model, so that what the audit can see is not limited by what a small adapter can hold.
    """
    rules = house.project.audit
    planted = PublicText.of([each.text for each in canaries if each.included], sensitivity=Sensitivity.INTERNAL, basis=Basis.GENERATED)
    steps = rules.control_epochs * -(-len(planted.texts) // CONTROL_BATCH)
    setup = replace(
        setup_of(house, base, held_out=PublicText(planted.texts[:1]), evaluations=1),
        model=ModelSection(train=model.top_blocks(base), max_tokens=house.project.model.max_tokens),
        train=TrainSection(learning_rate=rules.control_learning_rate),
    )
    order = house.keyring.purpose("control order").stream("order")
    return loop.fit(planted, setup=setup, steps=steps, batch=CONTROL_BATCH, order=order, on_step=shown_to(observer, "control")).module


def _audit_fields(result: Mapping[str, Any]) -> dict[str, Any]:
    names = (
        "adapter",
        "run",
        "verdict",
        "epsilon_lower",
        "ceiling",
        "detectable",
        "detectable_mu",
        "claimed_epsilon",
        "claimed_delta",
        "level",
        "layers",
        "canaries",
        "recitation",
        "roc",
        "control_roc",
    )
    return {name: result[name] for name in names}


def utility_control(house: House, *, generated: Mapping[str, str], observer: Observer) -> list[list[float]]:
    """Trains the same adapter on the same frozen text without privacy, to say what privacy cost; gives its curve and destroys it.

    Args:
        generated: file name -> SHA-256 of text that our own code wrote.

    Raises:
        TrackRefused: when a training source is anything else. A sensitive source never gets here.
    """
    _refuse_sensitive(house, generated)
    trained = needed_result(house, "train")
    done = finished_result(house, "utility")
    if done is not None:
        return list(done["curve"])
    observer.stage("utility control (non-private, generated text only)")
    snapshot = corpus.open_snapshot(Digest(trained["snapshot"]), keyring=house.keyring, folder=house.snapshots)
    public, held_out = (last_public(house, name) for name in ("public", "evaluation"))
    if held_out is None:
        raise NotFound("the held-out text that training froze")
    fitted = loop.fit(
        PublicText.of(all_texts(house, snapshot), sensitivity=snapshot.sensitivity, basis=Basis.GENERATED),
        setup=setup_of(house, load_base(house, public, observer), held_out=held_out),
        steps=house.project.privacy.steps,
        batch=house.project.privacy.expected_batch,
        order=house.keyring.purpose("control order").stream("utility"),
        on_step=shown_to(observer, "control"),
    )
    result = {"curve": rounded_curve(fitted.curve)}
    fields = {"run": f"utility-{trained['run']}", "track": "public", "base": trained["base"], "adapter": None, "plan": None, "guarantee": None}
    fields |= {"public_loss": result["curve"], "kind": "utility control"}
    with house.store.transaction() as tx:
        house.log.append(tx, Statement(predicate=Predicate.TRAINED, subjects=(Digest(trained["base"]),), fields=fields))
        gone = {"control": fields["run"], "run": trained["run"], "kind": "non-private, generated text", "reason": "curve measured"}
        house.log.append(tx, Statement(predicate=Predicate.CONTROL_DESTROYED, subjects=(Digest(trained["base"]),), fields=gone))
        keep_result(tx, "utility", run_config(house), result)
    return list(result["curve"])


def _refuse_sensitive(house: House, generated: Mapping[str, str]) -> None:
    for section in house.project.source:
        source = house.project.path(section.path)
        if not source.is_file() or hashlib.sha256(source.read_bytes()).hexdigest() != generated.get(section.path):
            raise TrackRefused(
                "a corpus that our own code generated, byte for byte", value=section.name, remedy="Non-private controls never see a source."
            )
