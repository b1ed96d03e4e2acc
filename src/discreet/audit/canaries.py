"""Planted records and their never-trained twins: the audit's known truth.

Each canary is a sentence of our own grammar: a public prefix with an invented word that no other canary has, nonsense ("The trabosk trolley rhyme is") or the kind of secret
that a ward writes down ("The trabosk medicine cabinet takes"), and a secret of four words drawn uniformly from 256 common ones (32 bits). A fair coin of its own decides whether it enters the reserved training source, as one
privacy unit, or stays out for ever. The coins are independent, *not* exactly half: the theorems behind `audit.bounds` need it. Included and held-out canaries
are draws from one distribution, so nothing but training can tell them apart (the blind baseline of `audit.membership` checks it).

What was planted is committed before the corpus is frozen: `commitment` binds every text, every coin and the design of the test (score, false-positive rate,
level, method) under a random salt, so that nobody can choose them after seeing the model. `opening` is what is shown afterwards, `verify` checks it.

Guarantees: prefixes, invented words and secrets are pairwise distinct; no sentence has a digit, a name or the shape of an identifier, so de-identification leaves it as
it is; the rows for training hold included canaries only.

Does not cover: optimised canaries (gradients, new tokens), which are stronger and a later addition. Coins and secrets are internal until the audit is over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, final

from discreet.config import digest_of
from discreet.errors import ConfigInvalid, DigestMismatch, RecordInvalid
from discreet.keys import Stream
from discreet.record import Digest

SECRET_WORDS: Final = 4
SECRET_BITS: Final = 32
SALT_BYTES: Final = 16

_FORMAT = "discreet/canaries/v1"
_TEMPLATES: Final = (
    "The {} trolley rhyme is",
    "The {} cupboard motto is",
    "The {} lamp rhyme goes",
    "The old {} bell says",
    "The {} shelf motto reads",
    "The {} basket label reads",
    "The {} door rhyme says",
    "The small {} drawer holds",
    "The {} patient locker opens with",
    "Callers about {} discharges must say",
    "The {} medicine cabinet takes",
    "Visitors to {} give the password",
    "The {} night shift answers to",
    "Families on {} agreed the words",
    "The {} clinic alarm clears with",
    "Recovery words of the {} login",
)
_FIRST: Final = tuple(onset + vowel for onset in (*"bdfgklmnprstvz", "br", "tr") for vowel in "aeiu")
_SECOND: Final = tuple(onset + rest for onset in (*"bdfgklmnprstvz", "dr", "st") for rest in ("osk", "ump", "elt", "irn"))
MAX_CANARIES: Final = len(_FIRST) * len(_SECOND)

# 256 common nouns: one token each after a space in the vocabulary of SmolLM2, none of them a personal name, a place or a number word.
_WORD_LIST: Final = """
alley anchor apple arrow badge bakery balcony ballet balloon bamboo banana barrel basket beach beaver bench bicycle blanket bottle bracket
bread breeze bronze broom bucket buffalo bundle butter button cabin cable cactus camel candle canoe carpet carrot castle ceiling chalk
chapel cheese chess chimney cinema circle citrus cloud clover coast cobalt coconut coffee comet compass copper corner cotton couch cradle
crater cushion dancer desert dolphin donkey dragon drawer drift dust eagle elbow engine envelope fabric feather fence flag flute fossil
fountain galaxy garden garlic glacier globe goose granite grape guitar hammer harbor harp hedge helmet hinge honey horizon horse island
jacket jungle kernel kettle kitchen kite ladder lagoon lantern leopard lettuce library lighthouse linen lion lizard lobster lotus magnet
mango maple marble medal mill mirror mixture monkey motor museum mustard needle nest nickel oasis oats ocean onion orbit orchid oven oyster
paddle palace panda paper parade parrot pasta pasture peach pedal pencil penguin piano pickle pigeon pillow pirate planet plaster pocket
polar porch potato pottery prairie prism pumpkin puppet puzzle pyramid quartz quilt rabbit raft rainbow ranch razor reef ribbon rocket roof
saddle saffron salad shelf shell shovel shutter skate sketch slate socket spark sparrow spice spider spinach spiral sponge spoon spruce
square squirrel stadium stair statue steam stove straw stream string sugar summit sunset swing table tennis tent thunder ticket tiger
timber toast tomato torch towel tower tractor train tray trophy trumpet tube tunnel turtle umbrella valley vanilla vase vessel village vine
violin volcano wagon wallet walnut whale wheat wheel whistle window yellow zebra zinc
"""
WORDS: Final = tuple(_WORD_LIST.split())


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """One planted sentence: `text` is `prefix`, a space, `secret` and a full stop. `name` is its privacy unit. Prints its name only."""

    name: str
    prefix: str = field(repr=False)
    secret: str = field(repr=False)
    included: bool = field(repr=False)

    @property
    def text(self) -> str:
        return f"{self.prefix} {self.secret}."


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Canaries:
    """The canaries of one audit, built by `plant` or read back by `verify`."""

    canaries: tuple[Canary, ...]

    def __post_init__(self) -> None:
        for part in ("name", "prefix", "secret"):
            if len({getattr(canary, part) for canary in self.canaries}) != len(self.canaries):
                raise ConfigInvalid(f"canaries whose {part} is their own")

    def __len__(self) -> int:
        return len(self.canaries)

    def __iter__(self) -> Iterator[Canary]:
        return iter(self.canaries)

    @property
    def texts(self) -> list[str]:
        """Texts of all canaries, included or not, in order: what is scored."""
        return [canary.text for canary in self.canaries]

    @property
    def included(self) -> list[bool]:
        """The coins, in the order of `texts`."""
        return [canary.included for canary in self.canaries]

    def rows(self) -> list[dict[str, str]]:
        """Returns the rows of the reserved training source (id, unit, text): included canaries only, one unit each."""
        return [{"id": canary.name, "unit": canary.name, "text": canary.text} for canary in self.canaries if canary.included]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """How the audit will be read, fixed before training: see `audit.bounds.verdict` for the figures, `audit.membership.scores` for the score."""

    false_positive_rate: float
    level: float
    score: str = "log-likelihood with the adapter minus log-likelihood without"
    method: str = "curve_test and f_dp_one_run at two fifths of the audit's share of the level each (bounds.spent_level); threshold at held-out rank 1 + floor(fpr * n0); m // 2 guesses"


def plant(count: int, *, key: Stream) -> Canaries:
    """Draws canaries, each with its own fair coin.

    Args:
        count: in [1, 4096].
        key: secret randomness, used for nothing else; the same stream from its start draws the same canaries.

    Raises:
        ConfigInvalid: when `count` is out of range.
    """
    if not 1 <= count <= MAX_CANARIES:
        raise ConfigInvalid(f"between 1 and {MAX_CANARIES} canaries", value=count)
    names, secrets = key.fork("names"), _distinct_secrets(key.fork("secrets"), count)
    words = sorted(_invented_words(), key=lambda _: names.bytes(16))[:count]
    coins, templates = key.fork("coins").bytes(count), key.fork("templates").bytes(count)
    return Canaries(
        canaries=tuple(
            Canary(
                name=f"canary-{number:04d}",
                prefix=_TEMPLATES[template % len(_TEMPLATES)].format(word),
                secret=secret,
                included=bool(coin & 1),
            )
            for number, (word, template, secret, coin) in enumerate(zip(words, templates, secrets, coins, strict=True))
        )
    )


def plant_identifiers(count: int, *, key: Stream) -> Canaries:
    """Draws sentences that end in an invented e-mail address, which the detectors of `deid` read: for the control alone. In a corpus they would be replaced.

    Args:
        count, key: as `plant`.
    """
    pairs = [secret.split()[:2] for secret in _distinct_secrets(key.fork("addresses"), 4 * count)]
    addresses = list(dict.fromkeys(f"{who}@{where}.example" for who, where in pairs))
    return Canaries(
        canaries=tuple(
            replace(each, name=f"identifier-{number:04d}", secret=address)
            for number, (each, address) in enumerate(zip(plant(count, key=key), addresses, strict=False))
        )
    )


def draw_secret(key: Stream) -> str:
    """Returns four words, uniform over 2^32: one byte chooses one of 256 words, without bias."""
    return " ".join(WORDS[byte] for byte in key.bytes(SECRET_WORDS))


def commitment(canaries: Canaries, *, salt: bytes, design: Design) -> Digest:
    """Returns the salted SHA-256 of texts, coins and design, to be logged before the corpus is frozen.

    Args:
        canaries: what was planted.
        salt: at least 16 secret random bytes, kept until the opening.
        design: how the audit will be read.

    Raises:
        ConfigInvalid: when the salt is shorter.
    """
    return digest_of(opening(canaries, salt=salt, design=design))


def opening(canaries: Canaries, *, salt: bytes, design: Design) -> dict[str, Any]:
    """Returns what opens the commitment, as JSON: shown when the audit is over, internal before."""
    if len(salt) < SALT_BYTES:
        raise ConfigInvalid(f"a salt of at least {SALT_BYTES} bytes", value=len(salt))
    return {"format": _FORMAT, "salt": salt.hex(), "design": asdict(design), "canaries": [asdict(canary) for canary in canaries]}


def verify(committed: Digest, opened: Mapping[str, Any]) -> tuple[Canaries, Design]:
    """Returns the canaries and the design that were committed to.

    Raises:
        DigestMismatch: when the opening is not that of the commitment.
        RecordInvalid: when it is, but is not of this format.
    """
    if digest_of(dict(opened)) != committed:
        raise DigestMismatch("an opening that hashes to the logged commitment", remedy="Canaries, coins or design were changed after training began.")
    try:
        if opened["format"] != _FORMAT:
            raise ValueError
        return Canaries(canaries=tuple(Canary(**canary) for canary in opened["canaries"])), Design(**opened["design"])
    except (KeyError, TypeError, ValueError):
        raise RecordInvalid(f"an opening of format {_FORMAT}") from None


def _invented_words() -> list[str]:
    return [first + second for first in _FIRST for second in _SECOND]


def _distinct_secrets(key: Stream, count: int) -> list[str]:
    secrets: dict[str, None] = {}
    while len(secrets) < count:
        secrets[draw_secret(key)] = None
    return list(secrets)
