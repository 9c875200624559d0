"""A small generated instruction set: an everyday request in a sentence -> a JSON record.

    {"kind":"order","who":"Priya","what":"oat milk","num":3,"day":"tue","at":"15:30"}

Whether a model has learnt it can be seen at a glance. The keys and their order, the three-letter
days, the 24-hour times and `null` for what is missing are conventions that no model can guess, so
the loss starts high and falls quickly. Names and things of the validation set never occur in the
training set: what is learnt is the task, not the words.
"""

import hashlib
import json
import random
from pathlib import Path

from posttrain.utils.cache import build_once, cache_root

TRAIN_ROWS = 2400
VALIDATION_ROWS = 240
SEED = 20_240
SYSTEM = "Answer with the record."

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = (
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
NAMES = """Maria|Tom|Priya|Hassan|Chloe|Diego|Yuki|Fatima|Oliver|Ingrid|Kofi|Elena|Marcus|Nadia
Liam|Sofia|Arjun|Greta|Pablo|Amara|Felix|Hana|Victor|Leila|George|Mei|Rosa|Ahmed|Julia|Samuel
Irene|Omar|Clara|Peter|Zoe|Bruno|Alice|Ravi|Emma|Stefan|Lucia|Daniel|Aisha|Hugo|Nora|Kenji|Paula
Simon|Tara|Viktor|Wendy|Adam|Bella|Carlos"""
THINGS = """oat milk|printer paper|blue mugs|garden chairs|coffee filters|rye bread|desk lamps
running socks|hex bolts|paint rollers|tulip bulbs|wine glasses|notebooks|bath towels
phone chargers|eggs|light bulbs|olive oil|pillow cases|whiteboard pens|tennis balls
storage boxes|dinner plates|rain jackets|bicycle tubes|name badges|picture frames|apples
safety vests|tea candles|water filters|wool blankets|extension leads|birthday cards|door handles
lemon tarts|mouse pads|ceramic pots|cotton shirts|folding tables|ink cartridges|marble tiles
cinnamon buns|screwdrivers|velvet cushions"""
TOPICS = """the budget|the new website|hiring|the product launch|the lease|payroll|the audit
her thesis|the trade fair|the roof repair|holiday plans|the merger|onboarding|the school trip
the survey results|the marketing plan|the contract|the tax return|the charity run|stock levels
the training plan|the office move|the press release|the data migration|the safety review
the summer party|the pension scheme|the road map|the insurance claim|the exhibition"""
PLACES = """Luigi's|the Blue Door|Casa Verde|Sakura House|the Old Mill|Bistro Nine
the Lamplighter|Taj Garden|Chez Anne|the Harbour Grill|Noodle Bar|the Red Fox|Little Athens
Olive Tree|the Copper Pot|Saffron|the Garden Room|Pizza Roma|the Smokehouse|Dragon Palace
the Corner Table|Lotus|the Salt Cellar|Mama Rosa|the Wheatsheaf"""
CITIES = """Leeds|Lisbon|Oslo|Prague|Dublin|Geneva|Porto|Vienna|Cardiff|Athens|Turin|Bergen|Lyon
Krakow|Seville|Ghent|Munich|Zagreb|Malmo|Bristol|Naples|Tallinn|Bordeaux|Glasgow|Basel|Riga
Valencia|York|Utrecht|Dresden"""
DEVICES = """boiler|dishwasher|laptop|front door lock|washing machine|garage door|oven|lift
coffee machine|shower|fridge|heating|alarm system|projector|tumble dryer|kitchen tap|doorbell
air conditioner|phone screen|piano|sewing machine"""

# kind -> (things, whether they are counted, templates). A sentence with {num}, {day} or {at} left
# out has null there.
KINDS: dict[str, tuple[str, bool, tuple[str, ...]]] = {
    "order": (
        THINGS,
        True,
        (
            "{who} needs {num} {what} {day} {at}.",
            "Please send {num} {what} to {who} {day} {at}.",
            "Can you order {num} {what} for {who}? Delivery {day} {at}, please.",
            "{num} {what} for {who}, to arrive {day} {at}.",
            "We are out of {what}: {who} asks for {num} {day} {at}.",
            "Put {who} down for {num} {what}, delivered {day} {at}.",
        ),
    ),
    "meeting": (
        TOPICS,
        False,
        (
            "{who} wants to talk about {what} {day} {at}.",
            "Set up a call with {who} about {what} {day} {at}.",
            "Could we meet {who} {day} {at} to go over {what}?",
            "{day} {at} I am seeing {who} about {what}.",
            "Put a meeting with {who} in the diary {day} {at}, topic: {what}.",
            "Let {who} know that we discuss {what} {day} {at}.",
        ),
    ),
    "table": (
        PLACES,
        True,
        (
            "Book a table for {num} at {what} {day} {at}, name of {who}.",
            "{who} is taking {num} people to {what} {day} {at}.",
            "Dinner at {what} {day} {at} for {num}, please, under {who}.",
            "Can you reserve {what} {day} {at}? We are {num}, ask for {who}.",
            "{who} would like to eat at {what} {day} {at}, party of {num}.",
        ),
    ),
    "trip": (
        CITIES,
        True,
        (
            "{who} needs {num} tickets to {what} {day} {at}.",
            "Get {num} seats on the train to {what} {day} {at} for {who}.",
            "{day} {at} {who} travels to {what}, {num} people in all.",
            "Please book {num} flights to {what} for {who}, leaving {day} {at}.",
            "{who} and family, {num} in total, go to {what} {day} {at}.",
        ),
    ),
    "repair": (
        DEVICES,
        False,
        (
            "{who} says the {what} is broken, someone should come {day} {at}.",
            "The {what} at {who}'s place stopped working; send a technician {day} {at}.",
            "Can somebody look at the {what} {day} {at}? Ask for {who}.",
            "{day} {at} works for {who} to have the {what} fixed.",
            "Please fix the {what} for {who} {day} {at}.",
        ),
    ),
}


def ensure_sentences(cache_dir: str | Path | None = None) -> Path:
    """Return a directory with train.jsonl and validation.jsonl, one `{"messages": [...]}` per line.

    Args:
        cache_dir: the cache's root; None: the user's, see `posttrain.utils.cache.cache_root`.
    """
    files = {}
    for name, rows in make_rows().items():
        files[f"{name}.jsonl"] = "".join(_line(*row) for row in rows).encode()
    digest = hashlib.sha256(b"".join(files.values())).hexdigest()

    def write(out: Path) -> None:
        for name, content in files.items():
            (out / name).write_bytes(content)

    return build_once(cache_root(cache_dir) / "data" / f"sentences-{digest[:12]}", write)


def make_rows() -> dict[str, list[tuple[str, dict]]]:
    """Return {"train": [(sentence, record), ...], "validation": [...]}; the same on every machine."""
    return {
        "train": _rows("train", TRAIN_ROWS),
        "validation": _rows("validation", VALIDATION_ROWS),
    }


def _rows(split: str, count: int) -> list[tuple[str, dict]]:
    rng = random.Random(f"{SEED} {split}")
    rows: dict[str, dict] = {}
    while len(rows) < count:
        sentence, record = _row(rng, split)
        rows.setdefault(sentence, record)
    return list(rows.items())


def _row(rng: random.Random, split: str) -> tuple[str, dict]:
    """One sentence and its record. The order of the draws decides the data: keep it."""
    kind = rng.choice(list(KINDS))
    things, counted, templates = KINDS[kind]
    who = rng.choice(_of_split(split, NAMES))
    what = rng.choice(_of_split(split, things))
    num_text, num = _number(rng) if counted else ("", None)
    day_text, day = _day(rng) if rng.random() < 0.85 else ("", None)
    at_text, at = _time(rng) if rng.random() < 0.75 else ("", None)
    template = rng.choice(templates)
    sentence = template.format(who=who, what=what, num=num_text, day=day_text, at=at_text)
    record = {"kind": kind, "who": who, "what": what, "num": num, "day": day, "at": at}
    return _tidy(sentence), record


def _of_split(split: str, values: str) -> list[str]:
    """The values of a split out of a list like THINGS: every fourth is for validation only."""
    of_split = []
    for index, value in enumerate(values.replace("\n", "|").split("|")):
        if (index % 4 == 3) == (split == "validation"):
            of_split.append(value)
    return of_split


def _number(rng: random.Random) -> tuple[str, int]:
    number = rng.randint(2, 12)
    return rng.choice((str(number), NUMBERS[number - 2])), number


def _day(rng: random.Random) -> tuple[str, str]:
    day = rng.choice(DAYS)
    return rng.choice(("on {}", "on {}", "this {}", "next {}")).format(day), day[:3].lower()


def _time(rng: random.Random) -> tuple[str, str]:
    """A time of day from 8:00 to 20:45 in one of the ways people write it, and as HH:MM."""
    hour = rng.randint(8, 20)
    minute = rng.choice((0, 0, 0, 15, 30, 30, 45))
    half = "am" if hour < 12 else "pm"
    hour_of_half = (hour - 1) % 12 + 1
    texts = [f"at {hour}:{minute:02}", f"at {hour_of_half}:{minute:02} {half}"]
    if minute == 0:
        texts += [f"at {hour_of_half} {half}", f"at {hour_of_half}{half}"]
    if (hour, minute) == (12, 0):
        texts.append("at noon")
    return rng.choice(texts), f"{hour:02}:{minute:02}"


def _tidy(sentence: str) -> str:
    """Close the gaps of what was left out and start with a capital."""
    sentence = " ".join(sentence.split())
    for stop in ",.?;":
        sentence = sentence.replace(f" {stop}", stop)
    return sentence[0].upper() + sentence[1:]


def _line(sentence: str, record: dict) -> str:
    answer = json.dumps(record, separators=(",", ":"), ensure_ascii=False)
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": sentence},
        {"role": "assistant", "content": answer},
    ]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
