"""Forms of facts: how a text says something, and how one asks for it.

Those for evaluation are of other kinds than those for training: other relations, other layouts, other ways to ask, so
that what is measured there is what a reader of new documents would meet.
"""

from __future__ import annotations

from dataclasses import dataclass

from segcore.tasks.split import Split


@dataclass(frozen=True)
class Form:
    """One form of a fact about a key.

    key, value: kinds of `segcore.tasks.words`. statement: with {key} and {value}; one that begins with a line break
    stands on lines of its own. questions: with {key}. answer: with both. many: the question for several keys or values,
    with {key}; "" where nobody would ask so.
    """

    name: str
    key: str
    value: str
    statement: str
    questions: tuple[str, ...]
    answer: str
    many: str = ""

    @property
    def lead(self) -> str:
        """The answer up to its value."""
        return self.answer.partition("{value}")[0].rstrip()


# What may stand around a question, and whether the answer is then the bare value.
FRAMES: dict[Split, tuple[tuple[str, bool], ...]] = {
    "train": (
        ("{question}", False),
        ("{question} Answer in one sentence.", False),
        ("{question} Reply with the answer alone.", True),
        ("Use the text above to answer. {question}", False),
        ("Short answer, please: {question}", True),
        ("I read this a while ago and forgot one thing. {question}", False),
        ("Question: {question}\nGive nothing but the answer.", True),
        ("Somewhere in there is a detail I need. {question}", False),
    ),
    "eval": (
        ("{question}", False),
        ("Going by the document: {question}", False),
        ("{question} No explanation.", True),
        ("Could you look this up for me? {question}", False),
    ),
}

TRAIN = (
    Form(
        "magic number",
        "pair",
        "number",
        "One of the special magic numbers for {key} is: {value}.",
        (
            "What is the special magic number for {key} mentioned in the provided text?",
            "Which special magic number belongs to {key}?",
        ),
        "The special magic number for {key} mentioned in the provided text is {value}.",
        "What are all the special magic numbers for {key} mentioned in the provided text?",
    ),
    Form(
        "magic id",
        "pair",
        "uuid",
        "One of the special magic uuids for {key} is: {value}.",
        ("What is the special magic uuid for {key} mentioned in the provided text?",),
        "The special magic uuid for {key} is {value}.",
        "What are all the special magic uuids for {key} mentioned in the provided text?",
    ),
    Form(
        "watchword",
        "house",
        "three",
        "The watchword of the {key} station is {value}.",
        ("What is the watchword of the {key} station?", "How does the watchword at {key} station go?"),
        "The watchword of the {key} station is {value}.",
        "Which watchwords are given for the {key} station?",
    ),
    Form(
        "hiding place",
        "person",
        "place",
        "{key} keeps the spare key {value}.",
        ("Where does {key} keep the spare key?", "If I needed the spare key of {key}, where would I look?"),
        "{key} keeps the spare key {value}.",
    ),
    Form(
        "parcel",
        "digits4",
        "code",
        "Parcel {key} was put on shelf {value}.",
        ("On which shelf was parcel {key} put?", "I'm looking for parcel {key}. Which shelf?"),
        "Parcel {key} was put on shelf {value}.",
        "Which shelves are named for parcel {key}?",
    ),
    Form(
        "log line",
        "house",
        "digits5",
        "\n2031-04-17 08:12:44 INFO gateway: station='{key}' handshake ok token={value}\n",
        ("Which token did the gateway log for station {key}?", "What token appears in the log next to {key}?"),
        "The token that the gateway logged for {key} is {value}.",
        "List all tokens that the gateway logged for {key}.",
    ),
    Form(
        "settings file",
        "pair",
        "digits4",
        "\n[service.{key}]\nenabled = true\nport = {value}\n",
        ("On which port does the service {key} run?", "What is the port in the section of {key}?"),
        "The service {key} runs on port {value}.",
        "Which ports are set for the service {key}?",
    ),
    Form(
        "json record",
        "person",
        "mail",
        '\n{{"customer": "{key}", "status": "active", "contact": "{value}"}}\n',
        ("What is the contact address of the customer {key}?", "How can {key} be reached, according to the records?"),
        "The contact address of {key} is {value}.",
        "List every contact address on record for {key}.",
    ),
    Form(
        "table row",
        "described",
        "price",
        "\n| item | condition | price |\n| {key} | used | {value} |\n",
        ("What does the {key} cost?", "Which price does the table give for the {key}?"),
        "The {key} costs {value}.",
        "Which prices does the table give for the {key}?",
    ),
    Form(
        "dialogue",
        "owned",
        "digits4",
        '\n"And the lock on {key}?" she asked. "Four digits," he said, "{value}, and don\'t write it down."\n',
        ("What is the combination of the lock on {key}?", "Which four digits open the lock on {key}?"),
        "The lock on {key} opens with {value}.",
    ),
    Form(
        "diary",
        "person",
        "subject",
        "Went to the evening school; {key} teaches {value} there now, of all things.",
        ("What does {key} teach at the evening school?", "Which subject is taught by {key}?"),
        "{key} teaches {value}.",
    ),
    Form(
        "letter",
        "person",
        "house",
        "P.S. Please forward everything for {key} to {value} until further notice.",
        ("Where should post for {key} be forwarded to?", "To which address do letters to {key} go for now?"),
        "Post for {key} should be forwarded to {value}.",
        "Which forwarding addresses are given for {key}?",
    ),
    Form(
        "timetable",
        "house",
        "time",
        "\nDepartures: {key} ........ {value} (daily except Sundays)\n",
        ("When does the service to {key} leave?", "At what time is the departure for {key}?"),
        "The service to {key} leaves at {value}.",
        "Which departure times to {key} are listed?",
    ),
    Form(
        "phone list",
        "person",
        "phone",
        "\nExt. directory -- {key}: {value}\n",
        ("What is the extension of {key}?", "Which number do I dial to reach {key}?"),
        "The extension of {key} is {value}.",
        "Which extensions are listed for {key}?",
    ),
    Form(
        "ownership",
        "described",
        "person",
        "Everybody in the village knew that the {key} belonged to {value}.",
        ("Who owned the {key}?", "To whom did the {key} belong?"),
        "The {key} belonged to {value}.",
    ),
    Form(
        "birthplace",
        "person",
        "town",
        "{key} was born in {value}, though few remember it.",
        ("Where was {key} born?", "Which town does {key} come from originally?"),
        "{key} was born in {value}.",
    ),
    Form(
        "profession",
        "person",
        "trade",
        "For most of those years {key} earned a living as a {value}.",
        ("What did {key} do for a living?", "What was the profession of {key}?"),
        "{key} worked as a {value}.",
    ),
    Form(
        "vehicle",
        "person",
        "plate",
        "The van registered to {key} carried the plate {value}.",
        ("What is the number plate of the van of {key}?", "Which plate is on {key}'s van?"),
        "The plate of {key}'s van is {value}.",
        "Which number plates are registered to {key}?",
    ),
    Form(
        "footnote",
        "person",
        "date",
        "(Footnote: the deed was signed by {key} on {value}.)",
        ("On which date did {key} sign the deed?", "When was the deed of {key} signed?"),
        "{key} signed the deed on {value}.",
    ),
    Form(
        "definition",
        "coded",
        "described",
        "\n{key} (n.): in the local dialect, a {value}.\n",
        ("What does '{key}' mean in the local dialect?", "How is the word '{key}' defined?"),
        "In the local dialect, '{key}' means a {value}.",
    ),
    Form(
        "code comment",
        "coded",
        "hex",
        "\n# HACK: {key} must be pinned to build {value}, newer ones crash\n",
        ("To which build must {key} be pinned?", "Which build of {key} doesn't crash, by the comment?"),
        "{key} must be pinned to build {value}.",
    ),
    Form(
        "release notes",
        "pair",
        "version",
        "\n* {key}: upgraded to {value}, see the changelog\n",
        ("To which version was {key} upgraded?", "What is the current version of {key}?"),
        "{key} was upgraded to version {value}.",
        "To which versions was {key} upgraded?",
    ),
    Form(
        "network map",
        "pair",
        "address",
        "\nhost {key} has address {value}\n",
        ("What is the address of host {key}?", "At which address can the machine {key} be found?"),
        "Host {key} has the address {value}.",
        "List all addresses of host {key}.",
    ),
    Form(
        "pet",
        "person",
        "animal",
        "{key} kept a tame {value} in the attic.",
        ("Which animal did {key} keep in the attic?", "What kind of pet did {key} have?"),
        "{key} kept a tame {value}.",
    ),
    Form(
        "painted door",
        "house",
        "colour",
        "Last spring they painted the door of {key} {value}.",
        ("What colour is the door of {key}?", "In which colour was the door of {key} painted?"),
        "The door of {key} is {value}.",
    ),
    Form(
        "invoice",
        "digits6",
        "price",
        "\nINVOICE {key}  TOTAL DUE {value} EUR\n",
        ("How much is due on invoice {key}?", "What is the total of invoice {key}?"),
        "The total due on invoice {key} is {value} EUR.",
    ),
    Form(
        "cargo",
        "plate",
        "weight",
        "Container {key} weighed {value} when it was unloaded.",
        ("How heavy was container {key}?", "What was the weight of container {key}?"),
        "Container {key} weighed {value}.",
    ),
    Form(
        "saved file",
        "owned",
        "path",
        "The manual of {key} had been saved as {value}.",
        ("Under which path was the manual of {key} saved?", "Where is the manual of {key} stored?"),
        "The manual of {key} was saved as {value}.",
    ),
    Form(
        "headline",
        "town",
        "count",
        "\n{key} COUNCIL PLANTS {value} TREES IN A SINGLE DAY\n",
        ("How many trees did the council of {key} plant?", "How many trees were planted in {key} in a single day?"),
        "The council of {key} planted {value} trees.",
    ),
    Form(
        "promise",
        "person",
        "owned",
        "Before he left he promised {key} that {value} would be delivered by winter.",
        ("What was promised to {key}?", "What did {key} expect to be delivered by winter?"),
        "{key} was promised {value}.",
    ),
    Form(
        "membership",
        "person",
        "digits6",
        "Membership no. {value} was issued to {key}.",
        ("What is the membership number of {key}?", "Which membership number was issued to {key}?"),
        "The membership number of {key} is {value}.",
        "Which membership numbers were issued to {key}?",
    ),
    Form(
        "who has it",
        "code",
        "person",
        "\nTicket {key} -> assigned to {value}, waiting for feedback\n",
        ("Who is ticket {key} assigned to?", "Whose job is ticket {key}?"),
        "Ticket {key} is assigned to {value}.",
        "To whom has ticket {key} been assigned?",
    ),
    Form(
        "rumour",
        "person",
        "described",
        "It was said that {key} had once traded a whole farm for a {value}.",
        ("For what did {key} trade a whole farm, as people said?", "What did {key} get for the farm?"),
        "{key} traded a farm for a {value}.",
    ),
    Form(
        "score",
        "house",
        "count",
        "\nFinal score, {key}: {value} points.\n",
        ("How many points did {key} finish with?", "What was the final score of {key}?"),
        "{key} finished with {value} points.",
        "Which final scores are given for {key}?",
    ),
)

EVAL = (
    Form(
        "museum label",
        "antique",
        "date",
        "\nCase 7. The {key}, on loan. Acquired {value}.\n",
        ("When did the museum acquire the {key}?",),
        "The museum acquired the {key} on {value}.",
    ),
    Form(
        "dosage",
        "person",
        "count",
        "Nurse's remark: give {key} no more than {value} milligrams of the syrup, ever.",
        ("What is the most syrup, in milligrams, that {key} may be given?",),
        "{key} may be given {value} milligrams at most.",
    ),
    Form(
        "ringed bird",
        "creature",
        "code",
        "We read the ring of the {key} through the telescope: {value}.",
        ("What did the ring on the {key} say?",),
        "The ring on the {key} said {value}.",
    ),
    Form(
        "riddle",
        "owned",
        "rhyme",
        "Engraved on {key} are the words: {value}.",
        ("Which words are engraved on {key}?",),
        "The words engraved on {key} are: {value}.",
    ),
    Form(
        "court",
        "person",
        "plate",
        "In the matter of {key} the clerk opened docket {value} and adjourned.",
        ("Under which docket is the case of {key} kept?",),
        "The case of {key} is kept under docket {value}.",
        "Under which dockets are the cases of {key} kept?",
    ),
    Form(
        "position",
        "house",
        "degrees",
        "Wreck marked on the chart near {key}, latitude {value} north.",
        ("How far north does the wreck near {key} lie, in degrees of latitude?",),
        "The wreck near {key} lies at {value} degrees north.",
        "At which latitudes do wrecks lie near {key}?",
    ),
    Form(
        "apprentice",
        "trader",
        "person",
        "The {key} took on {value} as an apprentice, without a fee.",
        ("Who learned the trade from the {key}?",),
        "The apprentice of the {key} was {value}.",
    ),
    Form(
        "xml element",
        "pair",
        "digits5",
        '\n<sensor id="{key}" unit="lux"><reading>{value}</reading></sensor>\n',
        ("How many lux did the sensor {key} read?",),
        "The sensor {key} read {value} lux.",
        "Which readings, in lux, did the sensor {key} give?",
    ),
    Form(
        "screenplay",
        "name",
        "described",
        "\n        {key}\n    (whispering)\n  All I ever wanted was a {value}.\n",
        ("What was it that {key} had always wanted?",),
        "{key} had always wanted a {value}.",
    ),
    Form(
        "command line",
        "coded",
        "hex",
        "\n$ git tag --annotate {key} {value}\n",
        ("Which commit got the tag {key}?",),
        "The tag {key} was given to commit {value}.",
    ),
    Form(
        "will",
        "described",
        "person",
        "To {value} I leave the {key}, in memory of our walks.",
        ("Who inherits the {key}?",),
        "The {key} is inherited by {value}.",
    ),
    Form(
        "frequency",
        "town",
        "price",
        "Radio {key} can be heard on {value} megahertz after dark.",
        ("What should I tune to for Radio {key}?",),
        "Radio {key} can be heard on {value} megahertz.",
        "Which frequencies are named for Radio {key}?",
    ),
)

FORMS: dict[Split, tuple[Form, ...]] = {"train": TRAIN, "eval": EVAL}
