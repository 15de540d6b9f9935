"""Names and values to draw: words of two splits that share none, and numbers that can't be in both."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import cache

from segcore.errors import ConfigError
from segcore.tasks.split import Split, split_of


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words("""
    old quiet narrow bright heavy patient distant rusty gentle crooked pale stubborn hollow careful muddy golden silent
    broken curious empty northern clumsy thin borrowed wooden ragged cheerful bitter smooth faded wild humble foreign
    sharp tired warm shallow noisy steep generous frozen modest damp ancient brisk lonely polished crowded plain nervous
    velvet tilted dusty loyal secret salty copper awkward lazy marble purple woven tangled solemn bold eager fragile
    grim hasty idle jolly keen lively mellow nimble obscure placid quick rural sturdy tender upright vivid weary young
    zealous amber bronze coastal dented elegant fierce glossy hidden inner jagged knotted linen mossy neat oval painted
    rapid spotted trim urban vast windy striped scarlet sunken leaning folded chalky brittle cloudy drowsy earthy
""")
NOUNS = _words("""
    river lantern garden clerk engine orchard letter sailor window kettle bridge teacher market ladder painter harbour
    coat piano miller forest basket doctor chimney map farmer clock valley tailor ferry chapel rope soldier mirror
    barrel widow tower hammer cousin meadow candle judge wagon island baker violin cellar stove traveller fence pilot
    stable button gardener saddle printer cabin blanket anchor notebook shepherd quarry balcony cook drawer fountain
    mason acorn beacon compass dagger easel feather glacier helmet inkwell jug kite locket mitten needle oar pebble
    quill ribbon sundial thimble umbrella vase whistle yarn zither apron bucket cradle dome envelope flute goblet hinge
    icicle jacket kiln loom mill nest oven pillow raft sickle trumpet urn valve wreath bell canoe drum ember fossil
    gate heron iris jewel knot lemon magnet nutmeg otter parrot rooster spindle turnip vineyard walnut badger cedar
""")
TOWNS = _words("""
    Aldersea Bramwick Corvale Dunmarrow Eastholm Farrowby Glenmore Harrowgate Ilverton Juniper Kestrelford Lindenau
    Marrowby Netherfield Oakhampton Pellworth Quarrendon Rosewick Silverdale Thornbury Underhill Valdane Westmere
    Yarrowdale Zellham Ashcombe Birchover Coldwater Driftwood Elmsworth Fennimore Grantley Hollowell Inverbeck Jarrowden
    Kirkstead Larkhaven Mossley Northwick Otterburn Pinefold Quillham Ravensby Stonecross Tamarind Ulverstone Vexford
    Wrenfield Yewtree Zeddlebury Amberley Blackthorn Cinderford Dovecote Evershot Foxbourne Galloway Hawkshead
    Ironbridge Longmere Mistley Nettlecombe Orford Penhallow Redmire Saltash Tilbrook Upwell Wickham
""")
NAMES = _words("""
    Agnes Bernard Cecily Dorian Edith Felix Greta Hugo Irene Jasper Klara Leopold Mabel Nathan Olive Percy Quentin Rosa
    Silas Thea Ursula Victor Wanda Xavier Yvonne Zachary Anselm Beatrix Conrad Delia Amara Bao Chidi Daria Emeka Farah
    Goran Hana Ibrahim Jun Kofi Leila Mateo Nadia Omar Priya Qadir Ravi Saskia Tomas Usha Vera Wei Ximena Yusuf Zofia
    Alba Boris Carmen Dmitri Elif Fumiko Giulia Henrik Ines Jamal Katya Luca Mirela Niko Oona Pavel Rania Stefan Tova
""")
SURNAMES = _words("""
    Abbott Brandt Castell Draper Ellison Fairfax Gorman Hale Ingram Jessop Keller Lindqvist Marsh Novak Okafor Pereira
    Quist Rahman Sorensen Tanaka Ulrich Vasquez Whitlock Xu Yamada Zeller Ashdown Birkin Crane Dubois Esposito Falk
    Grieve Holm Ivanov Janssen Kowalski Leroux Mbeki Nakamura Osei Petrov Rossi Silva Thorne Umar Varga Wolff Yilmaz
""")
THINGS = _words("""
    telescope bicycle typewriter accordion wheelbarrow chessboard lighthouse thermometer microscope sewing-machine
    tractor printing-press rowing-boat barometer gramophone globe pendulum hourglass cash-register turntable projector
    espresso-machine kiln lathe weathervane theodolite harpsichord loudspeaker snowplough cable-car windmill aquarium
    greenhouse trampoline metronome sextant periscope dynamo abacus parachute
""")
COLOURS = _words("""
    crimson turquoise ochre indigo lavender maroon teal saffron ivory charcoal emerald magenta beige cobalt coral khaki
    lilac mauve olive peach plum rust sage sapphire sepia silver tan vermilion violet mustard
""")
ANIMALS = _words("""
    heron badger otter falcon lynx tortoise raven hedgehog salamander gazelle walrus pelican mongoose ibex puffin ferret
    cormorant weasel marmot kestrel newt stork tapir wombat beaver jackal lemur narwhal ocelot quail sparrow vole
""")
TRADES = _words("""
    locksmith baker cartographer beekeeper translator welder florist plumber surveyor notary glazier midwife carpenter
    archivist brewer cobbler dentist electrician falconer geologist jeweller librarian optician potter roofer sculptor
    tanner upholsterer vet watchmaker weaver botanist
""")
MONTHS = _words("January February March April May June July August September October November December")
SUBJECTS = _words("""
    geometry drainage heraldry metallurgy rhetoric bookkeeping navigation botany acoustics masonry astronomy grammar
    irrigation cartography phonetics logic weaving optics ballistics forestry calligraphy dentistry folklore statistics
""")


@cache
def pool(words: tuple[str, ...], split: Split) -> tuple[str, ...]:
    """The words of a split."""
    return tuple(word for word in words if split_of(word) == split)


@dataclass(frozen=True)
class Source:
    """Draws names and values for one split."""

    rng: random.Random
    split: Split

    def word(self, words: tuple[str, ...]) -> str:
        return self.rng.choice(pool(words, self.split))

    def words(self, words: tuple[str, ...], count: int) -> list[str]:
        """Different ones."""
        return self.rng.sample(pool(words, self.split), count)

    def fresh(self, make: Callable[[random.Random], str]) -> str:
        """What `make` draws, until it belongs to the split."""
        while split_of(drawn := make(self.rng)) != self.split:
            pass
        return drawn

    def draw(self, kind: str) -> str:
        """A name or value of a kind, one of KINDS."""
        return KINDS[kind](self)

    def different(self, kind: str, count: int, taken: Container[str] = ()) -> list[str]:
        """So many, all different, none of them in `taken`. Raises ConfigError if there aren't."""
        found: dict[str, None] = {}  # a set that keeps its order
        for _ in range(100 * count + 100):
            if len(found) == count:
                return list(found)
            drawn = self.draw(kind)
            if drawn not in taken:
                found[drawn] = None
        raise ConfigError(f"there aren't {count} different names of kind {kind!r}: ask for fewer")


def _letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=count))


def _numbers(low: int, high: int, form: str = "{}") -> Callable[[Source], str]:
    return lambda source: form.format(source.fresh(lambda rng: str(rng.randint(low, high))))


def _fresh(make: Callable[[random.Random], str]) -> Callable[[Source], str]:
    return lambda source: source.fresh(make)


KINDS: dict[str, Callable[[Source], str]] = {
    "number": _numbers(1_000_000, 9_999_999),
    "digits4": _numbers(1_000, 9_999),
    "digits5": _numbers(10_000, 99_999),
    "digits6": _numbers(100_000, 999_999),
    "count": _numbers(100, 9_999),
    "uuid": _fresh(lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4))),
    "code": _fresh(lambda rng: f"{_letters(rng, 2)}-{rng.randint(10, 99)}-{_letters(rng, 3)}"),
    "plate": _fresh(lambda rng: f"{_letters(rng, 3)} {rng.randint(100, 999)}"),
    "hex": _fresh(lambda rng: f"{rng.getrandbits(28):07x}"),
    "phone": _fresh(lambda rng: f"{rng.randint(200, 989)}-{rng.randint(1000, 9999)}"),
    "time": _fresh(lambda rng: f"{rng.randint(1, 23)}:{rng.randint(0, 59):02d}"),
    "date": _fresh(lambda rng: f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1620, 1998)}"),
    "price": _fresh(lambda rng: f"{rng.randint(11, 979)}.{rng.randint(10, 99)}"),
    "version": _fresh(lambda rng: f"{rng.randint(1, 29)}.{rng.randint(0, 49)}.{rng.randint(0, 99)}"),
    "address": _fresh(lambda rng: f"10.{rng.randint(1, 250)}.{rng.randint(1, 250)}.{rng.randint(1, 250)}"),
    "weight": _numbers(102, 9_870, "{} kilograms"),
    "degrees": _fresh(lambda rng: f"{rng.randint(1, 89)}.{rng.randint(100, 999)}"),
    "variable": _fresh(lambda rng: _letters(rng, 5)),
    "coded": _fresh(lambda rng: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6))),
    "noun": lambda source: source.word(NOUNS),
    "town": lambda source: source.word(TOWNS),
    "name": lambda source: source.word(NAMES),
    "person": lambda source: f"{source.word(NAMES)} {source.word(SURNAMES)}",
    "colour": lambda source: source.word(COLOURS),
    "animal": lambda source: source.word(ANIMALS),
    "trade": lambda source: source.word(TRADES),
    "house": lambda source: f"{source.word(TOWNS)} {source.word(NOUNS).title()}",
    "subject": lambda source: source.word(SUBJECTS),
    "thing": lambda source: source.word(THINGS).replace("-", " "),
    "creature": lambda source: f"{source.word(ADJECTIVES)} {source.word(ANIMALS)}",
    "antique": lambda source: f"{source.word(ADJECTIVES)} {source.word(THINGS).replace('-', ' ')}",
    "trader": lambda source: f"{source.word(TRADES)} of {source.word(TOWNS)}",
    "pair": lambda source: f"{source.word(ADJECTIVES)}-{source.word(NOUNS)}",
    "numbered pair": lambda source: f"{source.draw('pair')}-{source.rng.randint(10, 99)}",
    "described": lambda source: f"{source.word(ADJECTIVES)} {source.word(NOUNS)}",
    "three": lambda source: " ".join(source.words(NOUNS, 3)),
    "place": lambda source: f"under the {source.word(ADJECTIVES)} {source.word(NOUNS)}",
    "owned": lambda source: f"{source.word(NAMES)}'s {source.word(THINGS).replace('-', ' ')}",
    "rhyme": lambda source: (
        f"the {source.word(ADJECTIVES)} {source.word(ANIMALS)} sells a {source.word(NOUNS)} to the"
        f" {source.word(TRADES)}"
    ),
    "mail": lambda source: f"{source.word(NAMES)}.{source.word(SURNAMES)}@{source.word(TOWNS)}.example".lower(),
    "path": lambda source: f"/{source.word(NOUNS)}/{source.word(ADJECTIVES)}/{source.word(NOUNS)}.txt",
}
