"""Pairs of emoji that differ in one visible attribute, in the layout of MMVP-VLM.

MMVP-VLM (Tong et al. 2024, github.com/tsb0601/MMVP, scripts/evaluate_vlm.py) keeps `Questions.csv` with rows
(id, type, statement), where consecutive rows are a pair and the odd id is its first picture, beside
`MMVP_VLM_Images/TYPE/ID.jpg`. We add a fourth column `split`: the side of the concept split that the picture's
concept is on. A pair of training pictures is no leak of its kind: attributes are tested here, not concepts.

`PAIRS` is the table. A line is "first emoji | what it shows | second emoji | what it shows"; every statement
was checked against the drawings of OpenMoji 17.0.0 (not against the names: some drawings differ from theirs).
"""

# ruff: noqa: E501  (a pair is one line of the table)
from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

PAIRS = {
    "Orientation": """
        left arrow | an arrow pointing left | right arrow | an arrow pointing right
        up arrow | an arrow pointing up | down arrow | an arrow pointing down
        up-left arrow | an arrow pointing to the top left | down-right arrow | an arrow pointing to the bottom right
        up-right arrow | an arrow pointing to the top right | down-left arrow | an arrow pointing to the bottom left
        left-right arrow | a double arrow that is horizontal | up-down arrow | a double arrow that is vertical
        backhand index pointing left | a finger pointing left | backhand index pointing right | a finger pointing right
        backhand index pointing up | a finger pointing up | backhand index pointing down | a finger pointing down
        leftwards hand | a hand reaching to the left | rightwards hand | a hand reaching to the right
        left-facing fist | a fist facing left | right-facing fist | a fist facing right
        thumbs up | a thumb pointing up | thumbs down | a thumb pointing down
        magnifying glass tilted left | a magnifying glass with its lens at the top left | magnifying glass tilted right | a magnifying glass with its lens at the top right
        person walking | a person walking to the left | person walking facing right | a person walking to the right
        person running | a person running to the left | person running facing right | a person running to the right
        person kneeling | a person kneeling and facing left | person kneeling facing right | a person kneeling and facing right
        person in manual wheelchair | a person in a wheelchair facing left | person in manual wheelchair facing right | a person in a wheelchair facing right
        red triangle pointed up | a triangle pointing up | red triangle pointed down | a triangle pointing down
        fast reverse button | double arrowheads pointing left | fast-forward button | double arrowheads pointing right
        fast up button | double arrowheads pointing up | fast down button | double arrowheads pointing down
        airplane departure | an airplane taking off | airplane arrival | an airplane landing
        slightly smiling face | a smiling face the right way up | upside-down face | a smiling face upside down
    """,
    "Quantity": """
        musical note | two musical notes joined by a beam | musical notes | three separate musical notes
        red heart | one heart | two hearts | two hearts
        bust in silhouette | the silhouette of one person | busts in silhouette | the silhouettes of two people
        house | one house | houses | two houses
        beer mug | one beer mug | clinking beer mugs | two beer mugs
        wine glass | one glass | clinking glasses | two glasses
        paperclip | one paperclip | linked paperclips | two paperclips
        closed book | one book | books | three books
        red exclamation mark | one exclamation mark | double exclamation mark | two exclamation marks
        curly loop | one loop | double curly loop | two loops
        camel | a camel with one hump | two-hump camel | a camel with two humps
        eye | one eye | eyes | two eyes
        person standing | one person | people holding hands | two people
        family adult child | one adult and one child | family adult adult child | two adults and one child
        family adult child child | one adult and two children | family adult adult child child | two adults and two children
        dagger | one blade | crossed swords | two crossed blades
        raised hand | one hand | raising hands | two hands
        white flag | one flag | crossed flags | two flags
        sparkle | one star | sparkles | three stars
        droplet | one drop of water | sweat droplets | three drops of water
    """,
    "Color": """
        red circle | a red circle | blue circle | a blue circle
        green circle | a green circle | purple circle | a purple circle
        yellow circle | a yellow circle | brown circle | a brown circle
        orange circle | an orange circle | black circle | a black circle
        red square | a red square | green square | a green square
        blue square | a blue square | yellow square | a yellow square
        orange square | an orange square | purple square | a purple square
        red heart | a red heart | blue heart | a blue heart
        green heart | a green heart | orange heart | an orange heart
        black heart | a black heart | white heart | a white heart
        yellow heart | a yellow heart | purple heart | a purple heart
        pink heart | a pink heart | brown heart | a brown heart
        green book | a green book | blue book | a blue book
        orange book | an orange book | closed book | a red book
        large orange diamond | an orange diamond | large blue diamond | a blue diamond
        red apple | a red apple | green apple | a green apple
        red question mark | a red question mark | white question mark | a white question mark
        black flag | a black flag | white flag | a white flag
        lemon | a yellow citrus fruit | lime | a green citrus fruit
    """,
    "State": """
        locked | a closed padlock | unlocked | an open padlock
        closed mailbox with lowered flag | a mailbox with its flag down | closed mailbox with raised flag | a mailbox with its flag up
        closed mailbox with raised flag | a closed mailbox | open mailbox with raised flag | an open mailbox
        speaker low volume | a speaker with little sound | speaker high volume | a speaker with much sound
        hourglass done | an hourglass with all its sand at the bottom | hourglass not done | an hourglass with sand in its upper half
        battery | a well charged battery | low battery | a nearly empty battery
        closed umbrella | a closed umbrella | umbrella | an open umbrella
        closed book | a closed book | open book | an open book
        file folder | a closed folder | open file folder | an open folder
        red heart | a whole heart | broken heart | a broken heart
        rose | a fresh flower | wilted flower | a wilted flower
        empty nest | an empty nest | nest with eggs | a nest with eggs in it
        chains | unbroken chains | broken chain | a broken chain
        deciduous tree | a tree with leaves | leafless tree | a tree without leaves
        raised fist | a closed hand | raised hand | an open hand
        egg | an egg | hatching chick | a chick coming out of an egg
    """,
    "Text": """
        keycap 1 | the digit one | keycap 2 | the digit two
        keycap 3 | the digit three | keycap 8 | the digit eight
        keycap 4 | the digit four | keycap 7 | the digit seven
        keycap 5 | the digit five | keycap 6 | the digit six
        keycap 9 | the digit nine | keycap 0 | the digit zero
        keycap # | a number sign | keycap * | an asterisk
        A button (blood type) | the letter A | B button (blood type) | the letter B
        O button (blood type) | the letter O | AB button (blood type) | the letters AB
        OK button | the word OK | NG button | the letters NG
        NEW button | the word NEW | FREE button | the word FREE
        TOP arrow | an arrow above the word TOP | SOON arrow | an arrow above the word SOON
        BACK arrow | an arrow above the word BACK | END arrow | an arrow above the word END
        copyright | the letter C in a circle | registered | the letter R in a circle
        plus | a plus sign | minus | a minus sign
        multiply | a multiplication sign | divide | a division sign
        input latin uppercase | capital letters | input latin lowercase | small letters
        check mark button | a check mark on a button | cross mark button | a cross on a button
        heavy dollar sign | a dollar sign | heavy equals sign | an equals sign
        club suit | the club of a card game | spade suit | the spade of a card game
        female sign | the female sign | male sign | the male sign
    """,
    "Time": """
        three o’clock | a clock showing three o'clock | nine o’clock | a clock showing nine o'clock
        twelve o’clock | a clock showing twelve o'clock | six o’clock | a clock showing six o'clock
        one o’clock | a clock showing one o'clock | seven o’clock | a clock showing seven o'clock
        two o’clock | a clock showing two o'clock | eight o’clock | a clock showing eight o'clock
        four o’clock | a clock showing four o'clock | ten o’clock | a clock showing ten o'clock
        five o’clock | a clock showing five o'clock | eleven o’clock | a clock showing eleven o'clock
        three o’clock | a clock showing three o'clock | three-thirty | a clock showing half past three
        nine o’clock | a clock showing nine o'clock | nine-thirty | a clock showing half past nine
        one-thirty | a clock showing half past one | seven-thirty | a clock showing half past seven
        two-thirty | a clock showing half past two | ten-thirty | a clock showing half past ten
        new moon | a dark new moon | full moon | a bright full moon
        first quarter moon | a half moon lit on the right | last quarter moon | a half moon lit on the left
        waxing crescent moon | a thin moon lit on the right | waning crescent moon | a thin moon lit on the left
        waxing gibbous moon | a nearly full moon dark on the left | waning gibbous moon | a nearly full moon dark on the right
        waxing crescent moon | a thin crescent moon | waxing gibbous moon | a nearly full moon
    """,
    "Expression": """
        slightly smiling face | a smiling face | slightly frowning face | a frowning face
        face with tears of joy | a laughing face with tears | loudly crying face | a sad face crying
        neutral face | a face with a straight mouth | astonished face | a face with raised eyebrows and an open mouth
        winking face | a winking face | expressionless face | a face with short lines as eyes
        angry face | an angry face | relieved face | a calm face with closed eyes
        face with tongue | a face sticking out its tongue | zipper-mouth face | a face with a zipped mouth
        smiling face with heart-eyes | a face with hearts as eyes | face with crossed-out eyes | a face with crosses as eyes
        kissing face | a kissing face with open eyes | kissing face with closed eyes | a kissing face with closed eyes
        grinning face with big eyes | a laughing face with open eyes | grinning squinting face | a laughing face with squinting eyes
        grinning cat | a happy cat | crying cat | a crying cat
        smiling face with horns | a smiling devil | angry face with horns | an angry devil
        face with rolling eyes | a face looking up | pensive face | a face looking down with closed eyes
        sleeping face | a sleeping face | face with open mouth | a face awake with an open mouth
        star-struck | a face with stars as eyes | smiling face with hearts | a face with hearts around it
    """,
    "Size": """
        small orange diamond | a small orange diamond | large orange diamond | a large orange diamond
        small blue diamond | a small blue diamond | large blue diamond | a large blue diamond
        black small square | a small black square | black large square | a large black square
        white small square | a small white square | white large square | a large white square
        black medium-small square | a rather small black square | black medium square | a rather large black square
        white medium-small square | a rather small white square | white medium square | a rather large white square
        black small square | a very small black square | black medium square | a black square of medium size
        white medium-small square | a white square of medium size | white large square | a very large white square
        white small square | a very small white square | white medium square | a white square of medium size
        sun behind small cloud | the sun behind a small cloud | sun behind large cloud | the sun behind a large cloud
    """,
    "Skin": "\n".join(
        f"{name} with light skin tone | {what} with light skin | {name} with dark skin tone | {what} with dark skin"
        for name, what in {
            "thumbs up": "a thumb", "waving hand": "a waving hand", "raised fist": "a fist", "ear": "an ear",
            "victory hand": "two spread fingers", "OK hand": "a hand making a ring", "nose": "a nose",
            "flexed biceps": "a bent arm", "clapping hands": "clapping hands", "baby": "a baby", "girl": "a girl",
            "man": "a man", "woman": "a woman", "foot": "a foot", "person running": "a running person",
        }.items()
    ),
    "Gender": "\n".join(
        f"man {name} | a man {what} | woman {name} | a woman {what}"
        for name, what in {
            "farmer": "working as a farmer", "cook": "working as a cook", "student": "in a graduation cap",
            "teacher": "teaching at a blackboard", "artist": "painting", "firefighter": "in a firefighter's helmet",
            "scientist": "working in a laboratory", "astronaut": "in a space suit", "mechanic": "holding a wrench",
            "running": "running", "swimming": "swimming", "shrugging": "shrugging", "standing": "standing",
            "raising hand": "raising a hand", "in tuxedo": "in a tuxedo",
        }.items()
    ),
    "Viewpoint": """
        automobile | a car seen from the side | oncoming automobile | a car seen from the front
        bus | a bus seen from the side | oncoming bus | a bus seen from the front
        taxi | a taxi seen from the side | oncoming taxi | a taxi seen from the front
        police car | a police car seen from the side | oncoming police car | a police car seen from the front
        cat | the whole body of a cat | cat face | only the head of a cat
        dog | the whole body of a dog | dog face | only the head of a dog
        cow | the whole body of a cow | cow face | only the head of a cow
        horse | the whole body of a horse | horse face | only the head of a horse
        pig | the whole body of a pig | pig face | only the head of a pig
        mouse | the whole body of a mouse | mouse face | only the head of a mouse
        rabbit | the whole body of a rabbit | rabbit face | only the head of a rabbit
        tiger | the whole body of a tiger | tiger face | only the head of a tiger
        monkey | the whole body of a monkey | monkey face | only the head of a monkey
        dragon | the whole body of a dragon | dragon face | only the head of a dragon
        front-facing baby chick | the whole body of a chick | baby chick | only the head of a chick
        globe showing Americas | the earth seen from above America | globe showing Europe-Africa | the earth seen from above Africa
    """,
    "Structure": """
        red circle | a filled red circle | hollow red circle | a red ring with an empty middle
        red square | a red square | red circle | a red circle
        blue square | a blue square | blue circle | a blue circle
        green heart | a green heart | green circle | a green circle
        yellow heart | a yellow heart | yellow square | a yellow square
        large orange diamond | an orange diamond | orange square | an orange square
        six o’clock | a round clock face | mantelpiece clock | a clock on a stand
        star | a star with five points | dotted six-pointed star | a star with six points
        eight-spoked asterisk | an asterisk with eight lines | eight-pointed star | a star with eight points
        straight ruler | a straight ruler | triangular ruler | a triangular ruler
        person curly hair | a person with curly hair | person bald | a person with a bald head
        horizontal traffic light | a traffic light with its lamps side by side | vertical traffic light | a traffic light with its lamps one above the other
        chart increasing | a chart with a rising line | chart decreasing | a chart with a falling line
        chart increasing | a chart with one line | bar chart | a chart with bars
        left arrow | a straight arrow | right arrow curving left | a curved arrow
        rightwards hand | a hand lying flat | raised hand | a hand standing upright
    """,
    "Presence": """
        bell | a bell | bell with slash | a bell that is crossed out
        camera | a camera without a flash | camera with flash | a camera with its flash going off
        house | a house without a tree | house with garden | a house with a tree beside it
        locked | a padlock alone | locked with key | a padlock with a key
        snowman without snow | a snowman without snow around it | snowman | a snowman with snow falling around it
        cigarette | a cigarette | no smoking | a forbidden cigarette behind a red bar
        bicycle | a bicycle | no bicycles | a forbidden bicycle behind a red bar
        mobile phone | a mobile phone | no mobile phones | a forbidden mobile phone behind a red bar
        sun | the sun alone | sun behind cloud | the sun with a cloud in front
        cloud with snow | a cloud with snow | cloud with lightning | a cloud with lightning
        cloud | a cloud without rain | cloud with rain | a cloud with rain
        umbrella | an umbrella without rain | umbrella with rain drops | an umbrella in the rain
        envelope | an envelope alone | envelope with arrow | an envelope with an arrow
        red heart | a heart alone | heart with arrow | a heart with an arrow through it
        smiling face with sunglasses | a face wearing dark glasses | face with monocle | a face with one eyeglass
        face with medical mask | a face with its mouth covered | face with thermometer | a face with a thermometer in its mouth
        cowboy hat face | a face wearing a hat | smiling face with halo | a face with a ring above it
        face with head-bandage | a face with a bandaged head | partying face | a face in a party hat
        mobile phone | a phone alone | mobile phone with arrow | a phone with an arrow pointing at it
    """,
}  # fmt: skip


@dataclass(frozen=True)
class AttributePair:
    """Two emoji, by name, and what each of them shows and the other does not."""

    type: str
    names: tuple[str, str]
    statements: tuple[str, str]


def attribute_pairs(table: Mapping[str, str] = PAIRS) -> Iterator[AttributePair]:
    """The pairs of the table in order. Raises ValueError for a line that is not four fields."""
    for kind, lines in table.items():
        for line in filter(None, map(str.strip, lines.splitlines())):
            fields = [field.strip() for field in line.split(" | ")]
            if len(fields) != 4 or fields[1] == fields[3]:
                raise ValueError(f"{kind}: a pair needs two emoji with two different statements, got {line!r}")
            yield AttributePair(kind, (fields[0], fields[2]), (fields[1], fields[3]))


def write_attribute_pairs(folder: Path, pictures: Mapping[str, tuple[str, str]]) -> int:
    """Write `folder/attribute_pairs` from the pictures that are there; returns the number of pairs.

    `pictures`: name -> (picture's path relative to `folder`, split). A pair is left out when one of its emoji
    is not among them. Beside the questions, `summary.json` counts pairs by type and pictures by split.
    """
    out = folder / "attribute_pairs"
    out.mkdir()
    pairs = [pair for pair in attribute_pairs() if all(name in pictures for name in pair.names)]
    by_split: Counter[str] = Counter()
    with (out / "Questions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("id", "type", "statement", "split"))
        for i, pair in enumerate(pairs):
            for j in range(2):
                number, (image, split) = 2 * i + j + 1, pictures[pair.names[j]]
                writer.writerow((number, pair.type, pair.statements[j], split))
                by_split[split] += 1
                target = out / "MMVP_VLM_Images" / pair.type / f"{number}.jpg"
                target.parent.mkdir(parents=True, exist_ok=True)
                with Image.open(folder / image) as picture:
                    picture.save(target, quality=95, subsampling=0)  # full colour: thin coloured lines matter here
    summary = {"pairs": len(pairs), "pairs_by_type": Counter(p.type for p in pairs), "images_by_split": by_split}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return len(pairs)
