"""The emoji world: what a scene is, how it is captioned, how it is drawn, and what is held out of training.

Nothing here needs torch. A scene is a plain description; `draw` and `caption` turn it into pixels and words, so the
content of every training pair is known exactly.
"""

import hashlib
import io
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

SIZE = 64

# name: (code point, synonyms that captions may use instead)
OBJECTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fox": ("1f98a", ("red fox",)),
    "cat": ("1f431", ("kitten", "kitty")),
    "dog": ("1f436", ("puppy",)),
    "panda": ("1f43c", ("panda bear",)),
    "lion": ("1f981", ()),
    "rabbit": ("1f430", ("bunny",)),
    "frog": ("1f438", ("toad",)),
    "monkey": ("1f435", ("chimp",)),
    "pig": ("1f437", ("piglet",)),
    "cow": ("1f42e", ("calf",)),
    "penguin": ("1f427", ()),
    "owl": ("1f989", ()),
    "butterfly": ("1f98b", ("moth",)),
    "snail": ("1f40c", ()),
    "ladybug": ("1f41e", ("ladybird", "beetle")),
    "bee": ("1f41d", ("honeybee",)),
    "turtle": ("1f422", ("tortoise",)),
    "octopus": ("1f419", ("squid",)),
    "crab": ("1f980", ()),
    "whale": ("1f433", ()),
    "fish": ("1f420", ("tropical fish",)),
    "unicorn": ("1f984", ()),
    "lemon": ("1f34b", ()),
    "apple": ("1f34e", ("red apple",)),
    "orange": ("1f34a", ("tangerine", "mandarin")),
    "banana": ("1f34c", ()),
    "strawberry": ("1f353", ()),
    "watermelon": ("1f349", ("melon",)),
    "grapes": ("1f347", ("bunch of grapes",)),
    "cherries": ("1f352", ("pair of cherries",)),
    "pear": ("1f350", ()),
    "pineapple": ("1f34d", ()),
    "carrot": ("1f955", ()),
    "corn": ("1f33d", ("maize",)),
    "mushroom": ("1f344", ("toadstool",)),
    "avocado": ("1f951", ()),
    "tomato": ("1f345", ()),
    "pizza": ("1f355", ("slice of pizza",)),
    "burger": ("1f354", ("hamburger", "cheeseburger")),
    "donut": ("1f369", ("doughnut",)),
    "cake": ("1f382", ("birthday cake",)),
    "cheese": ("1f9c0", ("piece of cheese",)),
    "car": ("1f697", ("automobile", "red car")),
    "bus": ("1f68c", ("coach",)),
    "rocket": ("1f680", ("spaceship",)),
    "sailboat": ("26f5", ("boat", "yacht")),
    "bicycle": ("1f6b2", ("bike",)),
    "house": ("1f3e0", ("home",)),
    "castle": ("1f3f0", ("fortress",)),
    "umbrella": ("2614", ()),
    "balloon": ("1f388", ("red balloon",)),
    "guitar": ("1f3b8", ("electric guitar",)),
    "key": ("1f511", ()),
    "clock": ("23f0", ("alarm clock",)),
    "bulb": ("1f4a1", ("light bulb", "lamp")),
    "gift": ("1f381", ("present",)),
    "crown": ("1f451", ()),
    "bell": ("1f514", ()),
    "camera": ("1f4f7", ()),
    "sunflower": ("1f33b", ()),
    "cactus": ("1f335", ()),
    "tree": ("1f333", ()),
    "rose": ("1f339", ("red rose",)),
    "star": ("2b50", ("gold star",)),
}
NAMES: tuple[str, ...] = tuple(OBJECTS)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 56, 56),
    "yellow": (245, 212, 66),
    "green": (74, 168, 84),
    "blue": (58, 110, 214),
    "purple": (138, 76, 184),
    "pink": (246, 160, 196),
    "teal": (38, 152, 156),
    "white": (246, 246, 246),
    "gray": (140, 142, 146),
    "black": (26, 26, 30),
}

STYLES: dict[str, tuple[str, ...]] = {
    "3d": ("3d", "3d style", "3d render", "glossy 3d"),
    "flat": ("flat", "flat style", "flat design", "flat vector"),
}

RELATIONS = ("left", "right", "above", "below")
RELATION_WORDS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "on top of"),
    "below": ("below", "under"),
}

DEGRADATIONS: dict[str, tuple[str, ...]] = {
    "blur": ("blurry", "out of focus"),
    "noise": ("noisy", "grainy"),
    "fade": ("faded", "washed out"),
    "dark": ("dark", "underexposed"),
    "jpeg": ("compressed", "jpeg artifacts"),
}
CLEAN_WORDS = ("high quality", "sharp", "high quality, sharp", "crisp", "clean")
POOR_WORD = "low quality"

# Words that carry no information in this world; people write them all the same.
FILLERS = (
    "beautiful", "cute", "lovely", "detailed", "highly detailed", "masterpiece", "vibrant", "digital art", "sticker",
    "illustration", "centered", "minimal", "studio lighting", "award winning", "professional", "adorable", "trending",
    "colorful", "simple", "elegant",
)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """One picture, described: `relation` is where the first object stands, seen from the second."""

    objects: tuple[str, ...]
    colour: str
    style: str
    relation: str | None = None
    degradation: str | None = None
    strength: float = 0.0  # of the degradation, 0 to 1

    @property
    def quality(self) -> float:
        """1 for a clean scene, falling to 0 with the strength of its degradation."""
        return 1.0 - self.strength if self.degradation else 1.0


def _fraction(*keys: str) -> float:
    """A stable pseudo-random number in [0, 1) for a combination, the same on every machine."""
    digest = hashlib.blake2b("|".join(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def held_out(scene: Scene) -> bool:
    """True for the fifth of (object, colour, style) triples and of object pairs that no training ever sees."""
    if len(scene.objects) == 2:
        return _fraction("pair", *sorted(scene.objects)) < 0.2
    return _fraction("triple", scene.objects[0], scene.colour, scene.style) < 0.2


def sample_scene(
    rng: np.random.Generator, *, split: str = "train", count: int | None = None, clean: bool = False
) -> Scene:
    """Draw a scene of the `train` or `test` split with `count` objects (None: one in 70% of cases, else two)."""
    pair = rng.random() < 0.3 if count is None else count == 2
    while True:
        names = rng.choice(len(NAMES), size=2, replace=False)
        scene = Scene(
            objects=tuple(NAMES[i] for i in names[: 2 if pair else 1]),
            colour=str(rng.choice(tuple(COLOURS))),
            style=str(rng.choice(tuple(STYLES))),
            relation=str(rng.choice(RELATIONS)) if pair else None,
        )
        if held_out(scene) == (split == "test"):
            break
    return scene if clean or rng.random() < 0.6 else spoilt(rng, scene)


def spoilt(rng: np.random.Generator, scene: Scene) -> Scene:
    """The scene, degraded in some way."""
    kind, strength = str(rng.choice(tuple(DEGRADATIONS))), float(rng.uniform(0.2, 1.0))
    return replace(scene, degradation=kind, strength=strength)


def article(noun: str) -> str:
    """The noun with "a" or "an", or bare where English wants it so."""
    if noun in ("grapes", "cherries", "corn", "cheese"):
        return noun
    return ("an " if noun[0] in "aeiou" and not noun.startswith("un") else "a ") + noun


def noun(rng: np.random.Generator, name: str) -> str:
    """The object's name, or in a quarter of cases one of its synonyms, with its article."""
    synonyms = OBJECTS[name][1]
    word = str(rng.choice(synonyms)) if synonyms and rng.random() < 0.25 else name
    return article(word)


def facts(scene: Scene) -> tuple[int, ...]:
    """The scene as indices: layout (0 single, 1 side by side, 2 stacked), first and second object in reading order,
    colour, style, degradation (0 clean); -1 where there is none."""
    names = scene.objects
    if scene.relation in ("right", "below"):
        names = names[::-1]
    layout = 0 if scene.relation is None else 1 if scene.relation in ("left", "right") else 2
    second = NAMES.index(names[1]) if len(names) == 2 else -1
    damage = 1 + tuple(DEGRADATIONS).index(scene.degradation) if scene.degradation else 0
    colour, style = tuple(COLOURS).index(scene.colour), tuple(STYLES).index(scene.style)
    return layout, NAMES.index(names[0]), second, colour, style, damage


UNSAID, ANY_DAMAGE = -2, 9


def contradicts(claims: np.ndarray, facts: np.ndarray) -> np.ndarray:
    """(C, F) bool: does caption c say something that is false of scene f? Rows as `facts`, UNSAID where silent."""
    a, b = claims[:, None, :], facts[None, :, :]
    wrong = (a != UNSAID) & (a != b)
    wrong[..., 5] &= ~((a[..., 5] == ANY_DAMAGE) & (b[..., 5] > 0))
    return wrong.any(-1)


def caption(rng: np.random.Generator, scene: Scene, admits: float = 0.4) -> tuple[str, tuple[int, ...]]:
    """A caption that is true of the scene, in varying words, parts left out at random; and its claims, as `facts`.

    `admits`: how often it says that a visibly degraded picture is so.
    """
    claims = list(facts(scene))
    subject = noun(rng, scene.objects[0])
    if len(scene.objects) == 2:
        assert scene.relation is not None
        subject += f" {rng.choice(RELATION_WORDS[scene.relation])} {noun(rng, scene.objects[1])}"
    style = str(rng.choice(STYLES[scene.style]))
    name_style, name_colour = rng.random() < 0.55, rng.random() < 0.8
    claims[3] = claims[3] if name_colour else UNSAID
    claims[4] = claims[4] if name_style else UNSAID
    head = str(rng.choice(("", "", "", "a picture of ", "an icon of ", "an emoji of ", "an image of ")))
    if name_style and rng.random() < 0.4:
        head, name_style = f"{style} {rng.choice(('icon', 'emoji', 'picture', 'image'))} of ", False
    text = head + subject
    after: list[str] = []
    if name_colour:
        form = rng.random()
        if form < 0.7:
            text += f" on a {scene.colour} background"
        elif form < 0.85:
            after.append(f"{scene.colour} background")
        else:
            text = f"{scene.colour} background, {text}"
    if name_style:
        after.append(style)
    words = ""
    if scene.degradation is None and rng.random() < 0.35:
        words = str(rng.choice(CLEAN_WORDS))
    elif scene.degradation and scene.strength > 0.3 and rng.random() < admits:
        words = str(rng.choice((*DEGRADATIONS[scene.degradation], POOR_WORD)))
        claims[5] = ANY_DAMAGE if words == POOR_WORD else claims[5]
    if words:
        after.append(words)
    else:
        claims[5] = UNSAID
    if rng.random() < 0.25:
        after += [str(word) for word in rng.choice(FILLERS, size=rng.integers(1, 4), replace=False)]
        rng.shuffle(after)
    return ", ".join([text, *after]), tuple(claims)


def plain_caption(scene: Scene) -> str:
    """The one-sentence caption of a scene that the evaluation uses."""
    text = article(scene.objects[0])
    if len(scene.objects) == 2:
        assert scene.relation is not None
        text += f" {RELATION_WORDS[scene.relation][0]} {article(scene.objects[1])}"
    return f"{text} on a {scene.colour} background, {scene.style} style"


# ---------------------------------------------------------------------------------------------------- drawing


def _background(rng: np.random.Generator, colour: str) -> np.ndarray:
    """A named colour with jitter and a soft gradient in a random direction, (SIZE, SIZE, 3) float32 in 0..255."""
    base = np.asarray(COLOURS[colour], np.float32) + rng.normal(0, 5, 3).astype(np.float32)
    angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0, 14)
    axis = np.linspace(-1, 1, SIZE, dtype=np.float32)
    ramp = np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]
    return np.clip(base + depth * ramp[..., None], 0, 255)


def _boxes(rng: np.random.Generator, scene: Scene) -> list[tuple[float, float, float]]:
    """Centre x, centre y and side in pixels of each object, in the order of `scene.objects`."""
    jitter = lambda: float(rng.uniform(-1.5, 1.5))  # noqa: E731
    if len(scene.objects) == 1:
        return [(32 + jitter(), 32 + jitter(), float(rng.uniform(44, 50)))]
    side = float(rng.uniform(27, 30))
    near, far = (16.5, 47.5) if scene.relation in ("left", "above") else (47.5, 16.5)
    if scene.relation in ("left", "right"):
        return [(near + jitter(), 32 + jitter(), side), (far + jitter(), 32 + jitter(), side)]
    return [(32 + jitter(), near + jitter(), side), (32 + jitter(), far + jitter(), side)]


def _paste(canvas: np.ndarray, sprite: Image.Image, x: float, y: float, side: float) -> None:
    """Blend a sprite over the canvas, its centre at (x, y); sub-pixel by resampling."""
    fine = 3  # drawn finer and box-reduced, since PIL's affine transform alone would alias
    scale = sprite.width / side
    matrix = (scale / fine, 0.0, (side / 2 - x) * scale, 0.0, scale / fine, (side / 2 - y) * scale)
    size = (SIZE * fine, SIZE * fine)
    drawn = sprite.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR).reduce(fine)
    rgba = np.asarray(drawn, np.float32)
    alpha = rgba[..., 3:] / 255
    canvas *= 1 - alpha
    canvas += rgba[..., :3] * alpha


def degrade(rng: np.random.Generator, image: Image.Image, kind: str, strength: float) -> Image.Image:
    """Damage a picture by one named degradation; strength 0 leaves it nearly as it is, 1 spoils it."""
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(0.4 + 2.2 * strength))
    if kind == "jpeg":
        data = io.BytesIO()
        image.save(data, "JPEG", quality=int(45 - 40 * strength))
        return Image.open(data).convert("RGB")
    pixels = np.asarray(image, np.float32)
    if kind == "noise":
        pixels = pixels + rng.normal(0, 6 + 34 * strength, pixels.shape)
    elif kind == "fade":
        pixels = pixels + (pixels.mean() * 0.4 + 110 - pixels) * (0.2 + 0.6 * strength)
    elif kind == "dark":
        pixels = pixels * (0.85 - 0.65 * strength)
    else:
        raise ValueError(f"unknown degradation {kind!r}; known: {', '.join(DEGRADATIONS)}")
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw(rng: np.random.Generator, scene: Scene, sprites: dict[tuple[str, str], Image.Image]) -> np.ndarray:
    """The scene's pixels, uint8 (SIZE, SIZE, 3). `sprites` maps (object, style) to RGBA pictures."""
    canvas = _background(rng, scene.colour)
    for name, (x, y, side) in zip(scene.objects, _boxes(rng, scene), strict=True):
        _paste(canvas, sprites[name, scene.style], x, y, side)
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    if scene.degradation is not None:
        image = degrade(rng, image, scene.degradation, scene.strength)
    return np.asarray(image)
