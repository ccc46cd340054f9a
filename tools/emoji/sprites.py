"""Fetch the openly licensed artwork (npm packages) and rasterise the objects we use into `build/emoji/sprites/`.

python -m tools.emoji.sprites        (needs npm, and `pip install resvg-py`)
"""

import importlib.util
import io
import itertools
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from ipgo.rewards.emoji import artwork
from tools.emoji.world import OBJECTS

BUILD = Path("build/emoji")
FOLDER = BUILD / "sprites"
PACKAGES = {  # style: (npm package at the version used, path inside it)
    "3d": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/{code}.webp"),  # Microsoft Fluent emoji, MIT
    "flat": ("@twemoji/svg@15.0.0", "package/{code}.svg"),  # Twemoji artwork, CC-BY 4.0
}
SHEET = BUILD / "artwork.png"
SPRITE_SIZE = 160  # drawn at 27 to 50 pixels, four times oversampled


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file or folder beside `path` to write. At the end it takes the place of `path`, which is never half written."""
    unfinished = path.with_name(f".{path.name}")
    yield unfinished
    unfinished.replace(path)


def _download(package: str, folder: Path) -> Path:
    words = ["npm", "pack", "--loglevel=error", package]
    try:
        done = subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit("no npm, which the artwork is downloaded with: install Node.js") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"`{' '.join(words)}` failed: {error.stderr.strip()}") from None
    return folder / done.stdout.split()[-1]


def _rasterise(data: bytes, suffix: str) -> Image.Image:
    if suffix == ".svg":
        import resvg_py

        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=SPRITE_SIZE, height=SPRITE_SIZE))
    return Image.open(io.BytesIO(data)).convert("RGBA")


def _normalise(sprite: Image.Image) -> Image.Image:
    """Crop to the drawn part, and centre it on a square, so that every object fills its box."""
    box = sprite.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    sprite = sprite.crop(box)
    side = max(sprite.size)
    square = Image.new("RGBA", (side, side))
    square.paste(sprite, ((side - sprite.width) // 2, (side - sprite.height) // 2))
    return square.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)


def _path(name: str, style: str) -> Path:
    return FOLDER / f"{name}-{style}.png"


LAST = _path([*OBJECTS][-1], [*PACKAGES][-1])  # the sprite that is written last


def build() -> None:
    """Write one RGBA PNG per object and style, once all of them are made."""
    if not importlib.util.find_spec("resvg_py"):
        raise SystemExit("no module resvg_py, which rasterises the artwork: `pip install resvg-py`")
    FOLDER.mkdir(parents=True, exist_ok=True)
    made: dict[Path, Image.Image] = {}
    for style, (package, pattern) in PACKAGES.items():
        with tarfile.open(_download(package, BUILD)) as archive:
            for name, (code, _) in OBJECTS.items():
                path = pattern.format(code=code)
                member = archive.extractfile(path)
                assert member is not None, path
                sprite = _rasterise(member.read(), Path(path).suffix)
                made[_path(name, style)] = _normalise(sprite)
    for made_from_these in (SHEET, LAST):
        made_from_these.unlink(missing_ok=True)
    for place, sprite in made.items():
        with replacing(place) as unfinished:
            sprite.save(unfinished)


def load() -> dict[tuple[str, str], Image.Image]:
    """The sprites as `world.draw` wants them."""
    found = {tuple(path.stem.rsplit("-", 1)): Image.open(path) for path in FOLDER.glob("[!.]*.png")}
    missing = [f"{name}-{style}" for name in OBJECTS for style in PACKAGES if (name, style) not in found]
    if missing:
        raise FileNotFoundError(
            f"no sprites for {', '.join(missing[:3])}...: run `python -m tools.emoji.sprites` first"
        )
    for image in found.values():
        image.load()
    return found  # type: ignore[return-value]


def sheet() -> Path:
    """All of them as one picture, as `Artwork` reads it: a column for each object, a row for each style."""
    if not SHEET.exists():
        art, size = load(), artwork.SPRITE
        whole = Image.new("RGBA", (size * len(OBJECTS), size * len(PACKAGES)))
        for (column, name), (row, style) in itertools.product(enumerate(OBJECTS), enumerate(PACKAGES)):
            small = art[name, style].resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
            whole.paste(small, (column * size, row * size))
        with replacing(SHEET) as unfinished:
            whole.save(unfinished, optimize=True)
    return SHEET


if __name__ == "__main__":
    build()
