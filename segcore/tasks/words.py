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


FOODS = _words("""
    leek barley mushroom rhubarb lentil cabbage salmon apricot pumpkin chestnut spinach quince beetroot mackerel almond
    parsnip venison onion cherry radish herring cinnamon chickpea artichoke tomato ginger pear celery rabbit hazelnut
    fennel oyster raisin garlic carrot trout asparagus potato kale sardine lobster pepper cucumber fig gooseberry bacon
    goose pheasant spelt buckwheat
""")
DISHES = _words("""
    pie soup stew dumpling pudding casserole fritter salad curry broth pancake tart chowder gratin risotto pickle
    omelette porridge sandwich goulash crumble terrine pasty skewer ragout pilaf strudel waffle turnover chutney sorbet
    trifle hotpot bake dip loaf schnitzel souffle quiche bisque mousse hash flan roulade fondue paella lasagne
""")
INSTRUMENTS = _words("""
    cello oboe bassoon clarinet mandolin banjo trombone harmonica ukulele saxophone harp cornet lute viola piccolo tuba
    xylophone organ marimba sitar tambourine balalaika spinet celesta concertina bugle euphonium
    glockenspiel dulcimer tabla theremin fiddle vibraphone recorder didgeridoo ocarina cittern lyre
    gong psaltery shawm sackbut clavichord kazoo cowbell carillon bodhran mbira koto shamisen
""")
MATERIALS = _words("""
    granite brass porcelain leather plywood slate bamboo concrete pewter limestone felt cardboard glass rubber clay
    sandstone iron cork wool cotton alabaster bakelite zinc plaster terracotta mahogany steel basalt canvas nylon
    parchment ebony titanium soapstone asphalt wax straw flint graphite
""")
LANGUAGES = _words("""
    Icelandic Basque Hungarian Swahili Welsh Finnish Turkish Latvian Maltese Quechua Tagalog Georgian Armenian Catalan
    Breton Yoruba Tibetan Mongolian Estonian Romanian Greek Danish Bengali Tamil Korean Arabic Hebrew Persian Albanian
    Bulgarian Galician Slovak Czech Polish Norwegian Zulu Amharic Nepali Khmer Hausa Croatian Serbian Lithuanian Flemish
    Frisian Xhosa Somali Burmese Pashto Urdu Punjabi Samoan Maori Gaelic Sinhala Thai Malay
""")
SPORTS = _words("""
    fencing curling archery rowing judo badminton handball croquet sailing wrestling cycling lacrosse bowling swimming
    weightlifting skating hurdling snooker cricket rugby volleyball surfing karate bobsleigh tobogganing orienteering
    triathlon squash hockey canoeing trampolining gliding parkour abseiling netball billiards darts kayaking climbing
    skiing rafting softball baseball boxing rounders
""")
FLOWERS = _words("""
    hollyhock foxglove marigold bluebell chrysanthemum dahlia peony gladiolus primrose snapdragon geranium begonia lupin
    hyacinth petunia cornflower oleander jasmine magnolia wisteria lobelia delphinium anemone camellia buttercup
    daffodil honeysuckle heather clematis aster hydrangea carnation gentian edelweiss azalea gardenia freesia verbena
    zinnia cowslip mimosa crocus tulip snowdrop poppy nasturtium pansy hellebore larkspur periwinkle phlox thistle
    rosemary orchid
""")
MISHAPS = _words("""
    cracked vanished overheated rusted collapsed melted burst jammed split warped leaked exploded rotted slipped toppled
    drowned snapped sagged shattered crumbled stalled flooded shrunk swollen derailed capsized blistered tarnished
    buckled drifted smouldered withered curdled frayed dissolved bent fermented sprouted unravelled
""")
# These are the same in both splits: what is drawn with them belongs to one by its other words, or as a whole.
WEEKDAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
UNITS = _words("one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen")
TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
ORDINALS = _words("first second third fourth fifth sixth seventh eighth ninth")
PIECES = _words("knight bishop rook queen king pawn")
RANKS = _words("Captain Colonel Doctor Professor Sergeant Bishop Inspector Admiral Senator Baroness")
QUIPS = (
    "Every {0} {1} finds its {2} in the end",
    "No {0} {1} ever thanked the {2}",
    "Better the {0} {1} than the {2}",
    "Only the {0} {1} forgives the {2}",
    "Ask the {2} before you trust the {0} {1}",
)


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


def _spelled(rng: random.Random) -> str:
    """From twenty-one to nine hundred and ninety-nine."""
    hundreds = rng.choice(("", *(f"{unit} hundred and " for unit in UNITS[:9])))
    return f"{hundreds}{rng.choice(TENS)}-{rng.choice(UNITS[:9])}"


def _quip(source: Source) -> str:
    words = source.word(ADJECTIVES), source.word(NOUNS), source.word(TRADES)
    return source.rng.choice(QUIPS).format(*words)


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
    "year": _numbers(1301, 1999),
    "distance": _fresh(lambda rng: f"{rng.randint(11, 97)}.{rng.randint(1, 9)} {rng.choice(('kilometres', 'miles'))}"),
    "temperature": _fresh(lambda rng: f"{rng.choice(('-', ''))}{rng.randint(11, 48)}.{rng.randint(1, 9)} degrees"),
    "percent": _fresh(lambda rng: f"{rng.randint(11, 97)}.{rng.randint(1, 9)} percent"),
    "duration": _fresh(lambda rng: f"{rng.choice(UNITS[1:])} hours and {rng.randint(11, 59)} minutes"),
    "spoken": _fresh(lambda rng: f"{rng.choice(UNITS)} minutes {rng.choice(('to', 'past'))} {rng.choice(UNITS[:12])}"),
    "day": _fresh(lambda rng: f"{rng.choice(WEEKDAYS)}, {rng.choice(MONTHS)} {rng.randint(1, 28)}"),
    "spelled": _fresh(_spelled),
    "sum": _fresh(lambda rng: f"{_spelled(rng)} {rng.choice(('crowns', 'florins', 'guilders', 'shillings'))}"),
    "ordinal": _fresh(lambda rng: f"{rng.choice(TENS)}-{rng.choice(ORDINALS)}"),
    "bay": _fresh(lambda rng: f"{rng.randint(10, 99)}{_letters(rng, 1)}"),
    "seat": _fresh(lambda rng: f"row {rng.randint(10, 59)}, seat {rng.randint(10, 59)}"),
    "move": _fresh(lambda rng: f"{rng.choice(PIECES)} to {rng.choice('abcdefgh')}{rng.randint(1, 8)}"),
    "part": _fresh(lambda rng: f"{rng.randint(10, 99)}/{rng.randint(1000, 9999)}-{rng.randint(1, 9)}"),
    "formula": _fresh(lambda rng: f"C{rng.randint(11, 39)}H{rng.randint(11, 69)}O{rng.randint(2, 9)}"),
    "instrument": lambda source: source.word(INSTRUMENTS),
    "material": lambda source: source.word(MATERIALS),
    "language": lambda source: source.word(LANGUAGES),
    "sport": lambda source: source.word(SPORTS),
    "flower": lambda source: source.word(FLOWERS),
    "dish": lambda source: f"{source.word(FOODS)} {source.word(DISHES)}",
    "shade": lambda source: f"{source.word(ADJECTIVES)} {source.word(COLOURS)}",
    "reason": lambda source: f"the {source.word(ADJECTIVES)} {source.word(NOUNS)} had {source.word(MISHAPS)}",
    "quip": _quip,
    "street": lambda source: (
        f"{source.rng.randint(2, 198)} {source.word(NOUNS).title()} {source.rng.choice(('Street', 'Lane', 'Row'))}"
    ),
    "ship": lambda source: f"{source.word(ADJECTIVES)} {source.word(ANIMALS)}".title(),
    "team": lambda source: f"{source.word(TOWNS)} {source.rng.choice(('Rovers', 'United', 'Athletic', 'Wanderers'))}",
    "firm": lambda source: f"{source.word(SURNAMES)} & {source.word(SURNAMES)}",
    "titled": lambda source: f"{source.rng.choice(RANKS)} {source.word(SURNAMES)}",
    "title": lambda source: f"The {source.word(ADJECTIVES)} {source.word(NOUNS)}".title(),
    "handle": lambda source: f"@{source.word(ADJECTIVES)}_{source.word(ANIMALS)}",
    "constant": lambda source: f"{source.word(ADJECTIVES)}_{source.word(NOUNS)}".upper(),
    "function": lambda source: f"{source.word(MISHAPS)}_{source.word(ADJECTIVES)}_{source.word(NOUNS)}",
}
