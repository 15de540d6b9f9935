"""Forms put together from parts, to train on: a property, how a text says it, how one asks for it, how one answers.

Written forms are few, and a model can learn each by heart. Of these there are millions, so that what pays is to read
what stands there: which thing, which of its properties, and where its value stands.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from segcore.tasks.forms.evaluation import EVAL
from segcore.tasks.forms.form import Form


@dataclass(frozen=True)
class _Property:
    """value: a kind of `segcore.tasks.words`. said, asked: what it is called in a text, and in a question."""

    value: str
    said: str
    asked: str


def _table(text: str) -> tuple[_Property, ...]:
    rows = (line.split(":") for line in text.split("\n") if line.strip())
    return tuple(
        _Property(kind.strip(), *(name.strip() for name in (said, *asked, said)[:2]))
        for kind, names in rows
        for said, *asked in (pair.split("|") for pair in names.split(","))
    )


# By kind of value: names in texts, and where it differs, | names in questions.
PROPERTIES = _table("""
    count: headcount | number of staff, seating capacity | number of seats, page count | length in pages
    count: stock level | amount in stock, number of steps, crew size | size of the crew, step count
    digits4: door code, phone extension | internal number, station number, form number
    digits5: odometer reading | mileage, yearly turnover, population, parish number
    digits6: customer number, membership number, case file | number of the file, policy number
    number: serial number, tax number, account number, library number
    code: batch code, inventory tag | tag in the inventory, booking reference, service code
    plate: licence plate | registration, locker | number of the locker, permit
    part: spare part | number of the spare part, drawing | number of the drawing
    hex: checksum, colour value, firmware hash
    uuid: device identifier
    phone: telephone number, emergency contact | number to ring in an emergency, fax number
    time: opening time | hour of opening, departure time | time of departure, curfew, feeding time
    spoken: time of the first service, closing hour | hour of closing, lunch break
    date: expiry date | day of expiry, date of the last inspection, christening | date of the christening
    day: collection day | day of the collection, day of rest, rehearsal | day of the rehearsal
    year: founding year | year of foundation, year of the fire, first harvest | year of the first harvest
    price: entry fee | price of admission, repair bill | cost of the repair, weekly rent | rent for a week, deposit
    sum: insured value | sum insured, ransom, fine | sum of the fine, reward
    version: software release | release of the software, protocol version, map edition
    address: network address, gateway
    mail: contact address | address for messages, billing contact
    path: log file | place of the log, configuration file, manual | file with the manual
    weight: gross weight | total weight, maximum load | load it can bear, ballast
    distance: cruising range | range, distance from the coast, length of the route
    temperature: melting point, storage temperature | temperature in storage, record low | lowest temperature
    percent: humidity, share of the vote, discount, alcohol content
    duration: running time, charging time | time to charge, longest voyage | length of the longest voyage
    ordinal: place in the queue | position in the queue, final rank | rank in the end
    bay: parking bay | place to park, storage bay, mooring | place of the mooring
    seat: reserved seat | seat that is reserved, seat in the theatre
    move: opening move | first move, winning move
    formula: active ingredient | formula of the active ingredient, main compound
    person: architect | name of the architect, caretaker | name of the caretaker, next of kin, emergency guardian
    person: previous tenant, best friend, rival, godparent, landlord
    titled: inspector in charge, commanding officer, medical adviser
    firm: supplier | name of the supplier, insurer, sponsor, law firm
    town: home port, birthplace | place of birth, destination, winter quarters, place of manufacture
    street: postal address | address for letters, workshop | address of the workshop, last residence
    house: summer residence, nearest neighbour
    place: spare key | place of the spare key, hiding place, back entrance
    name: given name of the founder, foster child, patron saint
    creature: mascot, heraldic beast | beast on the arms, pet
    animal: favourite animal, totem
    flower: emblem, favourite flower, buttonhole
    colour: livery | colour of the livery, colour of the door, uniform | colour of the uniform
    shade: roof paint | paint of the roof, trim
    material: main material, casing | material of the casing, roofing
    dish: favourite dish, speciality of the kitchen, Sunday lunch
    language: working language, second language, language of the archive
    sport: favourite sport, winter pastime
    instrument: instrument of choice, first instrument
    subject: field of study, evening class | subject of the evening class
    trade: former profession, trade
    quip: motto, last line of the anthem | last line of the song, slogan
    rhyme: nursery rhyme, toast
    described: nickname, code name, lucky charm, trademark | sign on the goods
    noun: password, watchword, safe word
    three: recovery phrase, secret phrase
    coded: user name, short name, token
    pair: release name, project name
    thing: greatest invention, most valuable possession, prize
    ship: flagship, training ship
    team: local club, favourite team
    title: best-known book, bedside book, first film
    handle: account | name of the account
    constant: feature flag, environment variable
    function: start-up routine, error handler
    reason: cause of the delay | reason for the delay, grounds for the refund | reason for the refund
    seat: seat at the opera
    degrees: angle of the roof, slope
""")
# Kinds of things, those that bear an article first.
WITH_ARTICLE = ("creature", "antique", "trader", "described", "ship", "thing")
ENTITIES = (
    *WITH_ARTICLE,
    "person",
    "house",
    "town",
    "pair",
    "owned",
    "firm",
    "team",
    "titled",
    "title",
    "street",
    "handle",
    "constant",
    "function",
    "numbered pair",
    "digits5",
    "code",
    "plate",
    "dish",
)
# {p}: the property; {p_}: as one word.
STATEMENTS = (
    "The {p} of {key} is {value}.",
    "{key} has {value} as {p}.",
    "{value} is the {p} of {key}.",
    "For {key}, the {p} was noted as {value}.",
    "{value}: this is what the register gives for {key} under the heading {p}.",
    "Nobody at the table doubted that the {p} of {key} was {value}.",
    "As to {key}, the {p}, {value}, has stayed the same for years.",
    "Asked about {key}, she named {value} as the {p}.",
    "When they checked {key}, they put {value} down as {p}.",
    "I had to look {key} up again. The {p} turned out to be {value}.",
    "The letter mentions {key} only in passing. It gives the {p} as {value}.",
    "Then {key} came up. '{value},' he said at once when they wanted the {p}.",
    "With {value} for its {p}, {key} stands alone in the district.",
    "They had changed the {p} to {value} by then, at least for {key}.",
    "Of all the entries, that of {key} alone lists {value} for the {p}.",
    "Not far from there lived those who knew {key}, whose {p} is {value}.",
    "My notes say: {p}, {key}, {value}.",
    "It was {value}, and not what the papers claimed, that {key} had for {p}.",
    "Whoever deals with {key} should remember {value}, the {p}.",
    "You'll recognise {key} easily: {value}, if you mean the {p}.",
    "Until last spring the {p} of {key} was a secret, but it is {value}.",
    "Somebody had scratched {value} into the wall, the {p} of {key}.",
    "{key}'s {p}? {value}, or so the older ones say.",
    "We argued about the {p}; in the case of {key} it is {value} after all.",
    "\n{key} -- {p}: {value}\n",
    "\n{p} ({key}) = {value}\n",
    "\n| {key} | {p} | {value} |\n",
    '\n{{"name": "{key}", "{p_}": "{value}"}}\n',
    '\n{{"{p_}": "{value}", "of": "{key}"}}\n',
    "\n[{key}]\n{p_} = {value}\n",
    "\n{key}:\n  {p_}: {value}\n",
    "\n- {p} {value} ({key})\n",
    "\nQ: {p} of {key}?\nA: {value}\n",
    "\n> {key}, {p}? -- {value}, as ever.\n",
    "\n{p}\t{key}\t{value}\n",
    "\n{value}\t{key}\t({p})\n",
    "\n# {key}: {p_}={value}\n",
    '\nset {p_} of "{key}" to "{value}";\n',
    "\n{p_}[{key}] -> {value}\n",
    "\n* {key} *\n{p}: {value}\n",
    "\n  {key} ......... {p} ......... {value}\n",
    "\nSubject: {p} of {key}\nIt is now {value}.\n",
    "\nA. {p} of {key}, please?\nB. {value}.\n",
    "\n1) {key}\n   a) {p} = {value}\n   b) nothing else\n",
    "\n{value} <- {p} of {key}\n",
    "\n+++ {key} +++ {p} now {value} +++\n",
    '\nassert lookup("{key}").{p_} == "{value}"\n',
    "\n% {key} & {value} \\\\ % {p}\n",
)
QUESTIONS = (
    "What is the {p} of {key}?",
    "Which {p} does {key} have?",
    "What does the text give as the {p} of {key}?",
    "Tell me the {p} of {key}.",
    "{key}: what is the {p}?",
    "What is noted as {p} for {key}?",
    "I need the {p} for {key}.",
    "When it comes to {key}, what is the {p}?",
    "Do you remember {key}? What was the {p}?",
    "Find {key} and report the {p}.",
    "What do we know of the {p} of {key}?",
    "Someone asked for the {p} of {key}. What should I reply?",
    "Fill in the {p}, for {key}.",
    "As {p} of {key}, what is given?",
    "Please name {key}'s {p}.",
    "Could you check the {p} in the entry on {key}?",
)
# Of these {value} is known, and {key} is asked for.
INVERSE_QUESTIONS = (
    "Whose {p} is {value}?",
    "What has {value} as its {p}?",
    "Which entry gives {value} as the {p}?",
    "{value} is the {p} of whom, or of what?",
    "I only know that the {p} is {value}. What is it that has it?",
    "To whom or what does the {p} {value} belong?",
)
ANSWERS = (
    "The {p} of {key} is {value}.",
    "{key} has the {p} {value}.",
    "{value} is the {p} of {key}.",
    "It is {value}.",
    "For {key} it is {value}.",
    "As {p} of {key}, {value} is given.",
)
INVERSE_ANSWERS = (
    "{value} is the {p} of {key}.",
    "That is {key}.",
    "{key} has {value} as {p}.",
    "The {p} {value} belongs to {key}.",
)
JUDGED = {frozenset((form.key, form.value)) for form in EVAL}
INVERSE_SHARE = 0.25


def compose(rng: random.Random, count: int) -> list[Form]:
    """Forms of different properties of one kind of thing, for training alone.

    No thing and value are of two kinds that a form for evaluation has.
    """
    entity = rng.choice(ENTITIES)
    usable = [p for p in PROPERTIES if p.value != entity and frozenset((entity, p.value)) not in JUDGED]
    return [_form(rng, entity, chosen) for chosen in rng.sample(usable, count)]


def _form(rng: random.Random, entity: str, chosen: _Property) -> Form:
    """{key} of the parts is the thing, {value} what is said of it; a form that asks for the thing has them swapped."""
    inverse = rng.random() < INVERSE_SHARE
    said = rng.choice(STATEMENTS)
    asked = rng.choice(INVERSE_QUESTIONS if inverse else QUESTIONS)
    answer = rng.choice(INVERSE_ANSWERS if inverse else ANSWERS)
    if entity in WITH_ARTICLE:
        said = said if said.startswith("\n") else _with_article(said)
        asked, answer = _with_article(asked), _with_article(answer)
    said, asked, answer = _named(said, chosen.said), _named(asked, chosen.asked), _named(answer, chosen.asked)
    name = f"{chosen.asked} of {entity}"
    if inverse:
        return Form(name, chosen.value, entity, _swapped(said), (_swapped(asked),), _swapped(answer))
    return Form(name, entity, chosen.value, said, (asked,), answer)


def _with_article(text: str) -> str:
    made = text.replace("{key}", "the {key}")
    return made[0].upper() + made[1:]


def _named(text: str, name: str) -> str:
    return text.replace("{p}", name).replace("{p_}", name.lower().replace(" ", "_").replace("-", "_"))


def _swapped(text: str) -> str:
    return "{value}".join(part.replace("{value}", "{key}") for part in text.split("{key}"))
