"""Texts made here for benchmarks/deid.py: short clinical questions, court judgments, lines with and without credentials. Every value is drawn, every gold span is known, the seed is fixed.

The sentences are our own and none of them is in tagger/templates.txt; the same people wrote both, so these figures are kinder than those of texts by others.
"""

from __future__ import annotations

import base64
import random
import re
import string

import faker

Made = tuple[str, list[tuple[int, int, str]]]
_SLOT = re.compile(r"\{(\w+)\}")

QUERIES = (
    "{age}-year-old woman named {person} from {city} has had palpitations since {date}. TSH normal. What next?",
    "Pls advise: {person}, MRN {mrn}, creatinine went from 1.1 to 2.3 on lisinopril. Stop it?",
    "Can you draft a discharge note for {person}, born {date}, who leaves {hospital} tomorrow?",
    "Hi, I'm Dr. {last} at {hospital}. My patient {person} (phone {phone}) asks whether she may fly to {city} after a DVT.",
    "Wound culture of {last}, {first} grew MRSA on {date}; allergic to sulfa. Options?",
    "Write a sick note for {person}, {street}, {city}, from {date} on.",
    "Patient {first} {last}, SSN {ssn}, insured with policy {plan}, was denied an MRI. Draft the appeal.",
    "Reply to {email}: {first} should double the furosemide and weigh herself daily.",
    "Summarise: {person} fell at {street}, seen by Dr. {last}, head CT negative, INR 3.4 on warfarin.",
    "{first}'s mother {person} carries a BRCA1 mutation. When should {first} be screened?",
)
CLEAN = (
    "What is the half-life of apixaban in a patient with a GFR of 28?",
    "Which antibiotics cover Pseudomonas and are safe in penicillin allergy?",
    "Does the Centor score apply to adults over 45 years?",
    "How is Cushing syndrome told apart from pseudo-Cushing in an obese patient?",
    "A 62 year old man on metformin 1000 mg has an A1c of 9.1. Would you add a GLP-1 agonist or an SGLT2 inhibitor?",
    "List the causes of a raised anion gap. Is the MUDPILES mnemonic still taught?",
    "What did the SPRINT trial show about systolic targets below 120 mmHg?",
    "Explain Kaplan-Meier curves to a medical student in two sentences.",
    "In which trimester is the glucose tolerance test done, and what are the cut-offs?",
    "Patient takes Eliquis and Plavix after a stent three months ago. When can aspirin be stopped?",
    "Ranson criteria at 48 hours: BUN up by 5, calcium 7.8, base deficit 5. How severe is it?",
    "Compare Zoloft with Lexapro for panic disorder in a 30-year-old woman.",
    "Is a Babinski sign normal in a 9-month-old infant?",
    "How many days of doxycycline for erythema migrans? Thank you!",
    "Please rewrite this leaflet about Hashimoto thyroiditis at a sixth-grade level.",
    "Troponin 0.04 then 0.31 within 3 hours, ST depression in V4-V6: NSTEMI pathway?",
)
JUDGMENT = (
    "{person} brought this action against {company} on {date}.",
    "The appellant, Ms {person}, who was then living in {city}, was dismissed by {company} on {date}.",
    "Mr Justice {last} heard the parties in {city} on {date} and reserved judgment.",
    "{person}, of counsel, instructed by {company}, appeared for the respondent.",
    "By an order of {date} the {court} stayed the execution (case no. {docket}).",
    "The {court} took the view that Mr {last} had been warned in writing on {date}.",
    "According to the police report, {person} left the flat at {street}, {city}, at about 9 p.m.",
    "On {date} a chamber of the {court} rejected the complaint of {person} as out of time.",
    "Dr {person}, a psychiatrist at {hospital}, was called by the defence.",
    "The claimant relies on the decision in {last} v {company}, no. {docket}.",
    "It is common ground that the contract was governed by section 14 of the Act and that no notice was given.",
    "We allow the appeal on the second ground and dismiss the others.",
    "The burden of proof lies with the employer; the standard is the balance of probabilities.",
    "Costs are reserved. The matter is remitted for reassessment within three months.",
)
KEYED = (
    "{name} = '{secret}'", '{name}: "{secret}"', "export {upper}={secret}", '"{name}": "{secret}",', "<{name}>{secret}</{name}>", "{name}={secret}", "curl -H 'Authorization: Bearer {secret}' https://api.test",
    "db = connect('{user}', '{secret}')  # {name}", "jdbc:mysql://{user}:{secret}@db.internal:3306/app", 'const {camel} = "{secret}";', "-e {upper}={secret} \\", "{user}:{secret}@ftp.internal", "--password {secret}",
)  # fmt: skip
HARMLESS = (
    "{name} = os.environ['{upper}']", '{name}: "${{{upper}}}"', "def get_{name}(self, key): return self._{name}", "password = getpass.getpass()", "token = next(tokens)", "# set the {name} before you start the server",
    'sha256 = "{sha}"', "commit {hex}", 'id = "{uuid}"', "integrity: sha512-{b64}==", '{name} = "changeme"', '{name}: "<your-{name}>"', 'password_field = "user[password]"', "if token != expected_token: raise Unauthorized()",
    '{name} = None', '"{name}": "********"', 'key = "primary"', "secretName: web-tls", "version = '12.4.18-rc2'", 'src="/static/js/main.{short}.chunk.js"', "API_URL=https://api.example.org/v2/tokens", "xsrf_header_name = 'X-XSRF-TOKEN'",
    "key_file: /run/secrets/{name}", "ssl_certificate_key /etc/ssl/private/server-{short}.key;", "token: str = Field(min_length=20)", "{name}=args.{name}", "client = Client({name}=settings.{camel}, timeout=30)",
    "PASSWORD_MIN_LENGTH = 12", 'token_url = "https://auth.example.org/oauth2/v2.0/token"', "image: registry.example.org/app@sha256:{sha}", "github.com/pkg/errors v0.9.1 h1:{b64}=", 'ETag: "{hex}"',
    "trace_id={sha} span_id={short}", "{upper}=your-{name}-here", "{name}: xxxxxxxxxxxxxxxx", "{name} = YOUR_{upper}", "{name}: {{{{ vault_{name} }}}}", "{name}: <%= ENV['{upper}'] %>", "csrf_token: {{{{ csrf_token() }}}}",
    "secret_arn = arn:aws:secretsmanager:eu-west-1:000000000000:secret:prod/{name}", "color: #{short};", "if not check_password(user, {name}): return 403", "throw new Error('{name} is missing');", "request_id={uuid} {name}=[FILTERED]",
    "curl -H \"Authorization: Bearer ${upper}\" https://api.test", "--password-file /etc/app/{name}.txt", "data:image/png;base64,{b64}", "public_key = ssh-rsa {b64}", "return render(request, 'reset_password.html', {{'{name}_form': form}})",
)  # fmt: skip
NAMES = (
    "password",
    "api_key",
    "secret_key",
    "access_token",
    "client_secret",
    "auth_token",
    "db_password",
    "private_token",
    "passwd",
    "encryption_key",
    "smtp_pass",
    "token",
)
COURTS = ("{city} District Court", "Court of Appeal of {city}", "{city} Labour Court", "{city} Regional Court", "Administrative Court of {city}")


class Maker:
    """Draws values; `fill` puts them into a template and says where."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.fakes = [faker.Faker(code) for code in ("en_US", "en_GB", "de_DE", "fr_FR", "pl_PL", "es_ES", "en_IN", "tr_TR")]
        for number, fake in enumerate(self.fakes):
            fake.seed_instance(seed + number)

    def value(self, slot: str) -> tuple[str, str | None]:
        rng, fake = self.rng, self.rng.choice(self.fakes)
        us = self.fakes[0]
        if slot == "court":
            return rng.choice(COURTS).replace("{city}", fake.city()), "ORG"
        return {
            "person": lambda: (f"{fake.first_name()} {fake.last_name()}", "PERSON"),
            "first": lambda: (fake.first_name(), "PERSON"),
            "last": lambda: (fake.last_name(), "PERSON"),
            "city": lambda: (fake.city(), "LOCATION"),
            "company": lambda: (fake.company(), "ORG"),
            "hospital": lambda: (f"{fake.last_name()} {rng.choice(('General Hospital', 'Clinic', 'Medical Center'))}", "ORG"),
            "street": lambda: (us.street_address().replace("\n", ", "), "ADDRESS"),
            "date": lambda: (rng.choice((us.date("%m/%d/%Y"), us.date("%d %B %Y"), us.date("%B %d, %Y"), us.date("%Y-%m-%d"))), "DATE"),
            "age": lambda: (str(rng.randrange(18, 89)), None),
            "mrn": lambda: (str(rng.randrange(10**6, 10**8)), "MRN"),
            "phone": lambda: (us.numerify("(2##) 555-01##"), "PHONE"),
            "ssn": lambda: (us.ssn(), "SSN"),
            "plan": lambda: (us.bothify("???#########").upper(), "HEALTH_PLAN"),
            "email": lambda: (us.ascii_safe_email(), "EMAIL"),
            "docket": lambda: (f"{rng.randrange(1000, 99999)}/{rng.randrange(10, 25)}", "ID"),
            "user": lambda: (us.user_name(), None),
            "secret": lambda: (self.secret(), "SECRET"),
            "sha": lambda: (us.sha256(), None),
            "hex": lambda: (us.sha1(), None),
            "short": lambda: (us.sha1()[:8], None),
            "uuid": lambda: (us.uuid4(), None),
            "b64": lambda: (base64.b64encode(rng.randbytes(62)).decode().rstrip("="), None),
        }[slot]()

    def secret(self) -> str:
        rng = self.rng
        letters = string.ascii_letters + string.digits
        return rng.choice(
            (
                lambda: "".join(rng.choices(letters, k=rng.randrange(16, 48))),
                lambda: "".join(rng.choices("0123456789abcdef", k=rng.choice((32, 40)))),
                lambda: "".join(rng.choices(letters + "!@#$%^*-_", k=rng.randrange(8, 16))),
                lambda: f"{self.fakes[0].word()}{rng.randrange(10, 9999)}{rng.choice('!#$@')}",
                lambda: f"{self.fakes[0].word().capitalize()}{self.fakes[0].word()}{rng.randrange(10, 99)}",
            )
        )()

    def fill(self, template: str) -> Made:
        name = self.rng.choice(NAMES)
        words = {"name": name, "upper": name.upper(), "camel": name.split("_")[0] + "".join(w.capitalize() for w in name.split("_")[1:])}
        text, spans, at = "", [], 0
        for match in _SLOT.finditer(template):
            text += template[at : match.start()].replace("{{", "{").replace("}}", "}")
            value, label = (words[match[1]], None) if match[1] in words else self.value(match[1])
            if label:
                spans.append((len(text), len(text) + len(value), label))
            text += value
            at = match.end()
        return text + template[at:].replace("{{", "{").replace("}}", "}"), spans


def queries(seed: int) -> list[Made]:
    maker = Maker(seed)
    return [maker.fill(t) for t in QUERIES * 20] + [(text, []) for text in CLEAN]


def judgments(seed: int) -> list[Made]:
    maker = Maker(seed)
    made = []
    for _ in range(40):
        text, spans = "", []
        for number in range(1, 25):
            sentence, places = maker.fill(maker.rng.choice(JUDGMENT))
            lead = f"{number}. "
            spans += [(s + len(text) + len(lead), e + len(text) + len(lead), label) for s, e, label in places]
            text += lead + sentence + "\n"
        made.append((text, spans))
    return made


def secrets(seed: int) -> list[Made]:
    """Lines, two without a credential for each one with."""
    maker = Maker(seed)
    return [maker.fill(maker.rng.choice(KEYED)) for _ in range(500)] + [maker.fill(maker.rng.choice(HARMLESS)) for _ in range(1000)]
