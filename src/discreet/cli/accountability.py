"""People and money: budgets, consent, the catalogue, lineage, erasure, who may do what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from discreet.cli.privacy import Delta
from discreet.cli.shared import HERE, Folder, Json, flat, say
from discreet.errors import NotFound, RequestInvalid

commands = typer.Typer()
PublicSource = Annotated[str, typer.Option("--source", help="A public source, when SUBJECT is one of its records.")]


budget = typer.Typer(no_args_is_help=True, help="Privacy budgets: open, show, reserve.")
consent = typer.Typer(no_args_is_help=True, help="Grants and withdrawals of the people whose data it is.")
catalog = typer.Typer(no_args_is_help=True, help="What data exists, whose it is, what for.")
access = typer.Typer(no_args_is_help=True, help="Who may do what: approvals and the broken glass.")


@commands.command()
def trace(digest: str, project: Folder = HERE, as_json: Json = False) -> None:
    """Prints every statement about one record, model or snapshot, with its inclusion proof."""
    from discreet import pipeline

    with pipeline.open_house(project) as house:
        lines = pipeline.trace(house, digest)
    if not lines:
        raise NotFound("a digest that the log knows", value=digest)
    say(
        as_json,
        {"digest": digest, "statements": lines},
        [f"{e['index']:>6}  {e['time']}  {e['predicate']:<13} {json.dumps(e['fields'])}" for e in lines],
    )


@commands.command()
def erase(
    subject: Annotated[str | None, typer.Argument(help="The privacy unit as the source names it, e.g. the patient number.")] = None,
    request: Annotated[bool, typer.Option("--request", help="Only receive the request, and print the code for the address on file.")] = False,
    code: Annotated[str, typer.Option("--code", help="The code that the subject sends back: proves who asks.")] = "",
    source: PublicSource = "",
    resume: Annotated[bool, typer.Option("--resume", help="Finish what was killed, and whoever a restored backup brought back.")] = False,
    drill: Annotated[bool, typer.Option("--drill", help="Plant a generated person, erase them and search every byte; run it weekly.")] = False,
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Erases one person: their records, their key, their place in every snapshot; decides about every model; prints the certificate."""
    from discreet import pipeline

    if (subject is None) is not (resume or drill):
        raise RequestInvalid("a SUBJECT, or --resume, or --drill")
    with pipeline.open_house(project) as house:
        if subject is not None and not request and (seconds := house.project.erasure.answer_seconds):
            typer.echo(f"answered a multiple of {seconds:g} s after the identity was verified; killed meanwhile, the same command goes on", err=True)
        if subject is None:
            done: dict[str, Any] = pipeline.drill(house) if drill else {"resumed": pipeline.resume_erasures(house)}
        elif request:
            done = {"state": "received", "code": pipeline.request_erasure(house, subject, source=source)}
        elif code:
            done = pipeline.confirm_erasure(house, subject, code, source=source)
        else:
            done = pipeline.erase(house, subject, source=source)
    lines = [f"{name}: {value}" for name, value in flat(done) if name not in ("statement", "proof")]
    lines += [f"stores: {', '.join(done['stores'])}"] if "stores" in done else []
    lines += [f"model {said}" for said in done.get("models", [])]
    say(as_json, done, lines)


@commands.command()
def retention(project: Folder = HERE, as_json: Json = False) -> None:
    """Erases whoever is past retention, and closes requests past their backup horizon; run it daily."""
    from discreet import pipeline

    with pipeline.open_house(project) as house:
        done = pipeline.retention(house)
    say(as_json, done, [f"erased: {done['erased']}", f"closed: {done['closed']}", f"open: {len(done['open'])}"])


@commands.command()
def lineage(
    digest: Annotated[str, typer.Argument(help="A snapshot or model; left out with --subject.")] = "",
    subject: Annotated[str, typer.Option("--subject", help="A person as the sources name them.")] = "",
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Shows what was made from a person's records or from an artifact, as OpenLineage events."""
    from discreet import pipeline

    if bool(digest) is bool(subject):
        raise RequestInvalid("a DIGEST or --subject")
    with pipeline.open_house(project, exclusive=False) as house:
        events = pipeline.lineage_export(house, unit=subject, digest=digest)
    say(as_json, {"events": events}, [f"{e['job']['name']}: {made['name']}" for e in events for made in e["outputs"]])


@access.command("export")
def access_export(subject: str, project: Folder = HERE, as_json: Json = False) -> None:
    """Prints everything the project holds about one person, for that person (GDPR Art. 15). It holds their text."""
    from discreet import pipeline

    with pipeline.open_house(project, exclusive=False) as house:
        held = pipeline.access_export(house, subject)
    say(as_json, held, [json.dumps(held, indent=2, ensure_ascii=False)])


@access.command("show")
def access_show(project: Folder = HERE, as_json: Json = False) -> None:
    """Says which roles you hold."""
    from discreet import pipeline
    from discreet.governance.access import current_user

    with pipeline.open_house(project, exclusive=False) as house:
        who = current_user()
        document = {"user": who.name, "roles": [role.value for role in house.access.roles(who)], "configured": house.access.configured}
    said = "" if document["configured"] else " ([access] names nobody: the local operator holds all roles)"
    say(as_json, document, [f"{who.name}: {', '.join(house.access.roles(who)) or 'no role'}{said}"])


@access.command("propose")
def access_propose(action: str, about: str, project: Folder = HERE, as_json: Json = False) -> None:
    """Proposes a release (ABOUT: the adapter's digest), a raised budget ("NAME to EPSILON") or a re-identification (the person), which another person has to approve."""
    _approval("propose", action, about, project, as_json)


@access.command("approve")
def access_approve(action: str, about: str, project: Folder = HERE, as_json: Json = False) -> None:
    """Approves what somebody else proposed; the log names both."""
    _approval("approve", action, about, project, as_json)


@access.command("break-glass")
def access_break_glass(
    action: str, reason: Annotated[str, typer.Option("--reason", help="Why it cannot wait.")], project: Folder = HERE, as_json: Json = False
) -> None:
    """Opens one action for you for an hour, and says so in the log before it opens."""
    _approval("break_glass", action, reason, project, as_json)


def _approval(verb: str, action: str, about: str, project: Path, as_json: bool) -> None:
    from discreet import duties, pipeline
    from discreet.governance.access import Action, current_user

    if action not in Action.__members__.values():
        raise RequestInvalid(f"an action out of {', '.join(Action)}", value=action)
    with pipeline.open_house(project, exclusive=False) as house:
        {"propose": duties.propose, "approve": duties.approve, "break_glass": duties.break_glass}[verb](house, Action(action), about)
    document = {
        "action": action,
        "state": {"propose": "proposed", "approve": "approved", "break_glass": "open for an hour"}[verb],
        "by": current_user().name,
    }
    say(as_json, document, [f"{action}: {document['state']}"])


@budget.command("open")
def budget_open(
    name: str,
    epsilon: Annotated[float, typer.Option("--epsilon")],
    delta: Delta,
    unit: Annotated[str, typer.Option("--unit")] = "record",
    query_delta: Annotated[float, typer.Option("--query-delta", help="The part of delta kept for queries with a delta of their own.")] = 0.0,
    periods: Annotated[int, typer.Option("--periods", help="Number of periods, each of which unlocks an equal share; 0: all from the start.")] = 0,
    period_days: Annotated[float, typer.Option("--period-days", help="Length of a period.")] = 91.0,
    carry_over: Annotated[str, typer.Option("--carry-over", help="What becomes of an unused share: none, one (period more) or all.")] = "none",
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Opens a budget: nothing spent of it comes back."""
    from discreet import duties, pipeline
    from discreet.ledger import CarryOver, Period

    if carry_over not in set(CarryOver):
        raise RequestInvalid(f"--carry-over out of {', '.join(CarryOver)}", value=carry_over)
    period = Period(days=period_days, count=periods, carry_over=CarryOver(carry_over)) if periods else None
    with pipeline.open_house(project) as house:
        opened = duties.open_budget(house, name, epsilon=epsilon, delta=delta, unit=unit, query_delta=query_delta, period=period)
    say(as_json, opened, [f"{k}: {v}" for k, v in flat(opened)])


@budget.command("raise")
def budget_raise(
    name: str,
    epsilon: Annotated[float, typer.Option("--epsilon", help="The new, larger epsilon.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; the log keeps it, and it is public.")],
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Raises a budget; where roles are set, after another person approved "NAME to EPSILON"."""
    from discreet import duties, pipeline

    with pipeline.open_house(project) as house:
        raised = duties.raise_budget(house, name, epsilon=epsilon, reason=reason)
    say(as_json, raised, [f"{k}: {v}" for k, v in flat(raised)])


@budget.command("show")
def budget_show(name: Annotated[str | None, typer.Argument()] = None, project: Folder = HERE, as_json: Json = False) -> None:
    """Shows what was spent and what remains, and warns from half on."""
    from discreet import duties, pipeline

    with pipeline.open_house(project) as house:
        budgets = duties.show_budgets(house, name)
    lines = []
    for b in budgets:
        lines.append(f"{b['name']}: epsilon {b['remaining']:.3f} of {b['epsilon']:g} left, delta {b['delta']:.2g}, unit {b['unit']}")
        if b["spent"] and b["spent_pld"] is not None:
            lines.append(f"  spent: {b['spent']:.3f} as the filter counts, {b['spent_pld']:.3f} by PLD had everything been fixed in advance")
    say(as_json, {"budgets": budgets}, [*lines, *(f"ALERT {alert}" for b in budgets for alert in b["alerts"])])


@budget.command("reserve")
def budget_reserve(
    name: str,
    epsilon: Annotated[float, typer.Option("--epsilon")],
    delta: Annotated[float, typer.Option("--delta", help="Of the query; taken from what the budget kept for queries.")] = 0.0,
    kind: Annotated[str, typer.Option("--kind", help="training, search, statistics, retrieval or synthetic.")] = "statistics",
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Charges an (epsilon, delta)-DP query to everyone, or refuses it (exit 3)."""
    from discreet import duties, pipeline
    from discreet.ledger import Kind

    if kind not in set(Kind):
        raise RequestInvalid(f"--kind out of {', '.join(Kind)}", value=kind)
    with pipeline.open_house(project) as house:
        held = duties.reserve(house, name, epsilon=epsilon, delta=delta, kind=Kind(kind))
    document = {"reservation": held.id, "remaining": held.remaining_epsilon}
    say(as_json, document, [f"reserved {held.id}; epsilon left: {held.remaining_epsilon:.4f}"])


@budget.command("plan")
def budget_plan(
    name: str,
    sampling_probability: Annotated[float, typer.Option("--sampling-probability", help="Chance of a unit to take part in a step.")],
    noise_multiplier: Annotated[
        float, typer.Option("--noise-multiplier", help="The utility you need: noise over clip norm (`discreet plan` shows it).")
    ],
    plot: Annotated[Path | None, typer.Option("--plot", help="Write the trade-off of noise against steps as an SVG file.")] = None,
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Says what can still be trained now at this utility, and what more noise would buy. Charges nothing."""
    from discreet import duties, pipeline
    from discreet import report as reports
    from discreet.store import write_atomically

    with pipeline.open_house(project) as house:
        document = duties.plan(house, name, sampling_probability=sampling_probability, noise_multiplier=noise_multiplier)
    if plot:
        points = [(row["noise_multiplier"], int(row["steps"])) for row in document["curve"]]
        write_atomically(plot, reports.affordable_chart(points, chosen=noise_multiplier).encode())
        document["plot"] = str(plot)
    lines = [
        f"{name}: epsilon {document['remaining']:.3f} of {document['epsilon']:g} left, {document['unlocked']:.0%} unlocked",
        f"at noise multiplier {noise_multiplier:g}: {document['steps']} more steps ({document['epochs']:.1f} epochs)",
    ]
    say(as_json, document, [*lines, *(f"  noise multiplier {row['noise_multiplier']:6.3g}: {row['steps']:>8} steps" for row in document["curve"])])


@consent.command("withdraw")
def consent_withdraw(subject: str, source: PublicSource = "", project: Folder = HERE, as_json: Json = False) -> None:
    """Records that a person withdrew: none of their records is admitted from now on."""
    from discreet import pipeline

    with pipeline.open_house(project, exclusive=False) as house:  # a training run asks for it every half minute
        who = pipeline.may_record_consent(house, subject, source=source)
        house.consent.withdraw(who, house.project.purpose)
    say(as_json, {"subject": who, "purpose": house.project.purpose.name, "state": "withdrawn"}, ["withdrawn"])


@consent.command("grant")
def consent_grant(subject: str, source: PublicSource = "", project: Folder = HERE, as_json: Json = False) -> None:
    """Records a person's consent for the project's purpose."""
    from discreet import pipeline

    with pipeline.open_house(project, exclusive=False) as house:
        who = pipeline.may_record_consent(house, subject, source=source)
        house.consent.grant(who, house.project.purpose)
    say(as_json, {"subject": who, "purpose": house.project.purpose.name, "state": "granted"}, ["granted"])


@consent.command("history")
def consent_history(subject: str, source: PublicSource = "", project: Folder = HERE, as_json: Json = False) -> None:
    """Shows everything a person said about their data, oldest first."""
    from discreet import pipeline

    with pipeline.open_house(project, exclusive=False) as house:
        words = house.consent.history(pipeline.may_record_consent(house, subject, source=source))
    said = [
        {"purpose": w.purpose, "state": "granted" if w.basis else "withdrawn", "basis": w.basis.value if w.basis else None, "at": w.at} for w in words
    ]
    say(as_json, {"history": said}, [f"{w['at']:.0f}  {w['state']}  {w['purpose']}" for w in said])


@consent.command("import")
def consent_import(
    file: Annotated[Path, typer.Argument(help="CSV with the columns subject, purpose (* for every purpose) and basis (empty: withdrawn).")],
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Records the words of many people at once, all or none."""
    from discreet import pipeline

    with pipeline.open_house(project, exclusive=False) as house:
        changed = pipeline.import_consent(house, file)
    say(as_json, {"changed": changed}, [f"changed: {changed}"])


@consent.command("same-person")
def consent_same_person(
    file: Annotated[
        Path,
        typer.Argument(
            help="CSV with the columns subject and same_as: a second identifier, and the first one of the same person, which is not looked up."
        ),
    ],
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Declares which identifiers are one person, before the second is collected: one budget, one consent, one erasure. All or none."""
    from discreet import duties, pipeline

    with pipeline.open_house(project) as house:
        declared = duties.same_person(house, file)
    say(as_json, {"declared": declared}, [f"declared: {declared}"])


@catalog.command("confirm")
def catalog_confirm(
    name: str,
    by: Annotated[str, typer.Option("--by", help="The person who read the sample.")],
    reason: Annotated[str, typer.Option("--reason")],
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Confirms by name that a source in whose new rows the detectors found more than it is declared is what it is declared."""
    from discreet import pipeline

    with pipeline.open_house(project) as house:
        pipeline.confirm_sensitivity(house, name, by=by, reason=reason)
        sources = house.catalog.sources()
    say(as_json, {"sources": sources}, [f"confirmed {name}"])


@catalog.command("classify")
def catalog_classify(name: str, project: Folder = HERE, as_json: Json = False) -> None:
    """Proposes a sensitivity for a source by running a sample of it through the detectors. Applies nothing."""
    from discreet import pipeline

    with pipeline.open_house(project) as house:
        done = pipeline.propose_sensitivity(house, name)
    lines = [f"{name}: declared {done['declared']}, proposed {done['proposed']} from {done['sampled']} records"]
    say(as_json, done, [*lines, *(f"  {label}: in {share:.1%} of them" for label, share in done["shares"].items())])


@catalog.command("list")
def catalog_list(project: Folder = HERE, as_json: Json = False) -> None:
    """Lists the registered sources."""
    from discreet import duties, pipeline
    from discreet.governance.access import Action

    with pipeline.open_house(project) as house:
        duties.ask(house, Action.READ)
        sources = house.catalog.sources()
    say(as_json, {"sources": sources}, [f"{s['name']}: {s['sensitivity']}, owner {s['owner']}, purposes {', '.join(s['purposes'])}" for s in sources])


@catalog.command("register")
def catalog_register(
    name: Annotated[str, typer.Argument(help="Name of the [[source]] in discreet.toml.")],
    again: Annotated[bool, typer.Option("--again", help="Take the present bytes and declaration in place of the registered ones.")] = False,
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Registers a source, or with --again what became of it since; its name, and so its budget, stay."""
    from discreet import duties, pipeline
    from discreet.governance.access import Action

    with pipeline.open_house(project) as house:
        duties.ask(house, Action.REGISTER_SOURCE)
        section = next((section for section in house.project.source if section.name == name), None)
        if section is None:
            raise NotFound("a [[source]] of that name in discreet.toml", value=name)
        (house.catalog.register_again if again else house.catalog.register)(house.project, section)
        sources = house.catalog.sources()
    say(as_json, {"sources": sources}, [f"registered {name}"])
