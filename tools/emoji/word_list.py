"""Write the word list that discrete prompt search chooses from: `python -m tools.emoji.word_list`.

Every word in it is one that training captions use.
"""

import json
from pathlib import Path

from tools.emoji import world

FILE = Path("src/ipgo/word_lists/emoji.json")
NEIGHBOURS = 2  # on either side: `world.OBJECTS` lists kin beside kin
# Words without information in this world, which stand for one another all the same.
KIN = (
    ("beautiful", "lovely", "cute", "adorable"),
    ("detailed", "highly detailed"),
    ("simple", "minimal", "elegant"),
    ("masterpiece", "award winning", "professional"),
    ("vibrant", "colorful"),
    ("digital art", "illustration"),
    ("icon", "emoji", "picture", "image"),
)


def _each_for_the_others(words: tuple[str, ...]) -> dict[str, list[str]]:
    return {word: [other for other in words if other != word] for word in words}


def synonyms() -> dict[str, list[str]]:
    """Names of objects with their articles and without, and every group of words that mean the same."""
    found: dict[str, list[str]] = {}
    for name, (_, others) in world.OBJECTS.items():
        names = (name, *others)
        for word in names if others else ():
            rest = [other for other in names if other != word]
            found[word] = rest
            found[world.article(word)] = [world.article(other) for other in rest]
    groups = (*world.RELATION_WORDS.values(), *world.STYLES.values(), world.CLEAN_WORDS, *KIN)
    for group in groups:
        found |= _each_for_the_others(group)
    return found


def antonyms() -> dict[str, list[str]]:
    """Kin of each object, the other colours, the other style, the opposite side, and what spoils a picture."""
    found: dict[str, list[str]] = {}
    names = list(world.NAMES)
    for place, name in enumerate(names):
        kin = [*names[max(0, place - NEIGHBOURS) : place], *names[place + 1 : place + 1 + NEIGHBOURS]]
        found |= dict.fromkeys((name, *world.OBJECTS[name][1]), kin)
    for colour in world.COLOURS:
        others = [other for other in world.COLOURS if other != colour]
        # A "red apple" is an object: a colour is one where a background follows.
        found[f"{colour} background"] = [f"{other} background" for other in others]
    for style, other in (("3d", "flat"), ("flat", "3d")):
        found |= {word: list(world.STYLES[other]) for word in world.STYLES[style]}
    for side, other in (("left", "right"), ("right", "left"), ("above", "below"), ("below", "above")):
        found |= {word: list(world.RELATION_WORDS[other]) for word in world.RELATION_WORDS[side]}
    return found


def build() -> dict[str, object]:
    """The word list as `ipgo.substitution.load_word_list` reads it."""
    negative = [*map(list, world.DEGRADATIONS.values()), [world.POOR_WORD]]
    return {"synonyms": synonyms(), "antonyms": antonyms(), "negative": negative}


if __name__ == "__main__":
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(json.dumps(build(), indent=1) + "\n")
