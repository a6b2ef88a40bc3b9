"""What the smart-home sentences are about: one made-up home, and what is said in it.

The order of these lists is part of the data set: another order gives other rows.
"""

from __future__ import annotations

import re

FLOOR_OF = {
    "living room": "ground floor",
    "kitchen": "ground floor",
    "dining room": "ground floor",
    "hallway": "ground floor",
    "garage": "ground floor",
    "patio": "ground floor",
    "garden": "ground floor",
    "bedroom": "first floor",
    "bathroom": "first floor",
    "office": "first floor",
    "nursery": "first floor",
    "guest room": "top floor",
    "playroom": "top floor",
    "laundry room": "basement",
    "workshop": "basement",
}

# domain -> name -> area; "" is nowhere in particular, None is wherever it is sent.
DEVICES: dict[str, dict[str, str | None]] = {
    "light": {
        "floor lamp": "living room",
        "bookshelf": "living room",
        "island lights": "kitchen",
        "chandelier": "dining room",
        "sideboard": "dining room",
        "bedside lamp": "bedroom",
        "wardrobe": "bedroom",
        "mirror light": "bathroom",
        "desk lamp": "office",
        "night light": "nursery",
        "workbench": "workshop",
        "string lights": "patio",
        "ceiling light": "guest room",
    },
    "switch": {
        "coffee maker": "kitchen",
        "space heater": "office",
        "fountain": "garden",
        "tumble dryer": "laundry room",
    },
    "input_boolean": {"guest mode": "", "vacation mode": ""},
    "fan": {
        "ceiling fan": "bedroom",
        "extractor fan": "kitchen",
        "tower fan": "living room",
        "exhaust fan": "bathroom",
    },
    "media_player": {
        "TV": "living room",
        "soundbar": "living room",
        "radio": "kitchen",
        "smart speaker": "office",
        "projector": "playroom",
    },
    "climate": {
        "thermostat": "hallway",
        "air conditioner": "bedroom",
        "towel radiator": "bathroom",
        "heat pump": "workshop",
    },
    "cover": {
        "blackout blinds": "bedroom",
        "left curtain": "living room",
        "roller door": "garage",
        "skylight": "playroom",
        "venetian blinds": "office",
    },
    "valve": {"sprinkler valve": "garden", "water main": "laundry room"},
    "lock": {"front door": "hallway", "back door": "kitchen", "tool cabinet": "workshop"},
    "binary_sensor": {
        "mailbox": "garden",
        "fridge": "kitchen",
        "motion sensor": "hallway",
        "bay window": "living room",
    },
    "sensor": {
        "outdoor temperature": "",
        "humidity": "bathroom",
        "power meter": "garage",
        "solar output": "",
    },
    "person": {"Alice": "", "Ben": "", "Carla": "", "David": ""},
    "weather": {"Boston": "", "Lisbon": "", "cabin": ""},
    "todo": {"chores": "", "packing": "", "hardware store": "", "birthday": ""},
    "lawn_mower": {"Shaun": "garden", "robot": "garden"},
    "vacuum": {"Rosie": None, "Dusty": None},
    "scene": {
        "movie night": "living room",
        "dinner party": "dining room",
        "sunrise": "bedroom",
        "deep focus": "office",
    },
    "script": {"bedtime routine": "", "morning routine": "", "leaving home": ""},
    "button": {"doorbell": "hallway", "router restart": "office"},
}

MEDIA = {
    "artist": "Miles Davis|The Beatles|Nina Simone|Vivaldi|Daft Punk|Adele",
    "album": "Abbey Road|Dark Side of the Moon|Kind of Blue|Thriller|Rumours",
    "track": "Bohemian Rhapsody|Moonlight Sonata|Dancing Queen|Yesterday|Imagine",
    "playlist": "smooth jazz|rainy day blues|Sunday brunch|party hits",
    "podcast": "Radiolab|Serial|Planet Money",
    "movie": "Casablanca|Toy Story|Jaws|Amelie",
    "tv_show": "Planet Earth|Sherlock|Friends|Doctor Who",
}
CLASS_OF = {title: kind for kind, titles in MEDIA.items() for title in titles.split("|")}

# What is said where the grammar takes any text.
WILDCARDS: dict[str, list[str]] = {
    name: text.split("|")
    for name, text in {
        "message": "dinner is ready|the taxi is here|it is time to leave|we are home|"
        "lunch is served|breakfast is on the table|the movie starts in ten minutes|"
        "please come downstairs|the dog needs a walk|grandma has arrived|bath time is over|"
        "everyone outside|I am leaving now|the laundry is done|school starts soon|"
        "the pizza has arrived",
        "search_query": "|".join(CLASS_OF),
        "zone": "home|work|school|gym|library|airport",
        "timer_name": "pasta|pizza|tea|laundry|egg|cookies|nap|workout|homework|bread|rice|meeting",
        "timer_command": "turn off the lights|open the garage door|close the blinds|lock the front "
        "door|pause the music|turn on the coffee maker|start the vacuum|stop the fan",
        "shopping_list_item": "milk|eggs|apples|batteries|paper towels|olive oil|cat food|basil|"
        "light bulbs|brown bread|sunscreen|dish soap|orange juice|a birthday card|two lemons|"
        "coffee filters|toothpaste|rice",
        "todo_list_item": "water the plants|call the plumber|wood screws|sandpaper|passports|"
        "phone charger|clean the oven|bake a cake|buy balloons|take out the bins|wall paint|"
        "hiking boots|change the sheets|masking tape",
    }.items()
}

# The numbers that people say, where the grammar takes any of a range.
NUMBERS: dict[str, list[int | float]] = {
    "temperature": [16, 17, 18, 18.5, 19, 19.5, 20, 20.5, 21, 21.5, 22, 23, 24, 25, 26, 27, 28],
    "color_temperature": list(range(2000, 6600, 100)),
    "timer_seconds": [5, 10, 15, 20, 25, 30, 40, 45, 50, 55, 75, 90],
    "timer_minutes": [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 20, 25, 30, 35, 40, 45, 50, 55, 90],
    "timer_hours": [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 24],
    "volume_step_up": [5, 10, 15, 20, 25, 30],
    "volume_step_down": [5, 10, 15, 20, 25, 30],
}
PERCENTAGES: list[int | float] = list(range(5, 101, 5))

THE = r"(?:the|my|our)"
ROOM = "(?:" + "|".join([*FLOOR_OF, "basement"]) + ")"
PLACE = f"(?:{THE} )?(?:{ROOM}|(?:ground|first|top) floor)"
STATE = "(?:open|opening|closed|closing|shut|shutting|locked|unlocked|on|off)"
THING = "(?:light|lamp|fan|switch|door|window|gate|blind|curtain|shade|shutter|awning|lock)"
CALLED = "|".join(name for kind in ("person", "vacuum", "weather") for name in DEVICES[kind])
UNIT = "(?:hour|minute|second)"
# The templates allow these; nobody says them.
UNSPOKEN = re.compile(
    "|".join(
        [
            r"\b(\w+) \1\b",
            r"\b(?:light|lamp)s? (?:light|lamp)(?:s|ing)?\b",
            # an article too many, or one before a person's name
            rf"\b(?:{THE}|there) (?:{THE}|any|some|all|each|every)\b",
            rf"\b{THE} (?:{CALLED}|Shaun|home|work|school)\b(?! light)",
            rf"\b{ROOM} {THE}\b|\bbasement floor\b|\bwhat of\b|\bof there\b",
            rf"\bany {THE}\b|\bare (?:each|every)\b",
            rf"\b(?:is|are) (?:{THE}|there) (?:securely )?{STATE}\b",
            # a preposition that is missing, or the wrong one
            rf"\b(?:temperature|brightness|color|speed) {THE}\b|\bspeed (?:fans?|{PLACE})\b",
            rf"\b(?:off|out|open|closed|shut|\w+ing|\w*locked|\w+ed|empty|clear) {PLACE}$",
            rf"\b(?:on|at) (?:{THE} )?{ROOM}(?: to\b| by\b| \d|$)",
            rf"\b(?:around|across|throughout) (?:{THE} )?{ROOM}\b",
            rf"\b(?:in|at) (?:{THE} )?(?:ground|first|top) floor\b",
            r"\b(?:of|on|around|across|throughout|in) (?:home|work|school)\b",
            r"(?<!the )\b(?:gym|library|airport)\b|\b(?:is|are|\w+one|\w+body) the (?:gym|lib|air)",
            rf"\b(?:skip|next|item|track|song|volume|music|media|players?|shows?) {PLACE}\b",
            rf"\b(?:item|track|song|volume|music|media|\w+rs?|fans?) {THE} (?:area|space|room)\b",
            # one or many
            rf"\b(?:all|some|many|any of|which of)(?: of)?(?: {THE})? (?:{PLACE} )?{THING}\b",
            rf"\b(?:each|every)\b.*\b{THING}e?s\b",
            rf"\b{THING}e?s is\b|\b{THING} are\b|\b(?:is|are) (?:any|some) {THING} \b",
            rf"\b1[ -]{UNIT}s\b|(?<!\d)(?!1\b)\d+[ -]{UNIT}\b(?! timer)",
            rf"\d-{UNIT}\b(?! timer)|\d-{UNIT}s|\d[ -]{UNIT}s timer|half an? {UNIT}s",
            r"\d degree\b| [°%]|1/2|\b1 and (?:a )?half \w+r\b|\ba an\b",
            r"\ba (?:8|11|18)|\ban (?!8|11|18)\d",
            # verbs that do not go with their words
            r"^(?:change|bring)\b.*\b(?:on|off|out)\b|\bswitch out\b|\bcomplete off\b",
            r"\btell me\b.*\blike\b|\bturn (?:in|de)crease\b|\dkelvin",
        ]
    ),
    re.IGNORECASE,
)
