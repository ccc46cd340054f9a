"""Fetch the openly licensed artwork (npm packages) and rasterise the objects we use into `build/emoji/sprites/`.

python -m tools.emoji.sprites        (needs npm, and `pip install resvg-py`)
"""

import io
import itertools
import subprocess
import tarfile
from pathlib import Path

from PIL import Image

from ipgo.rewards.emoji import artwork
from tools.emoji.world import OBJECTS

BUILD = Path("build/emoji")
PACKAGES = {  # style: (npm package at the version used, path inside it)
    "3d": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/{code}.webp"),  # Microsoft Fluent emoji, MIT
    "flat": ("@twemoji/svg@15.0.0", "package/{code}.svg"),  # Twemoji artwork, CC-BY 4.0
}
SHEET = BUILD / "artwork.png"
SPRITE_SIZE = 160  # drawn at 27 to 50 pixels, four times oversampled


def _download(package: str, folder: Path) -> Path:
    name = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.split()[-1]
    return folder / name


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


def build() -> None:
    """Write one RGBA PNG per object and style."""
    folder = BUILD / "sprites"
    folder.mkdir(parents=True, exist_ok=True)
    SHEET.unlink(missing_ok=True)
    for style, (package, pattern) in PACKAGES.items():
        with tarfile.open(_download(package, BUILD)) as archive:
            for name, (code, _) in OBJECTS.items():
                path = pattern.format(code=code)
                member = archive.extractfile(path)
                assert member is not None, path
                _normalise(_rasterise(member.read(), Path(path).suffix)).save(folder / f"{name}-{style}.png")


def load() -> dict[tuple[str, str], Image.Image]:
    """The sprites as `world.draw` wants them."""
    found = {tuple(path.stem.rsplit("-", 1)): Image.open(path) for path in (BUILD / "sprites").glob("*.png")}
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
        whole.save(SHEET, optimize=True)
    return SHEET


if __name__ == "__main__":
    build()
