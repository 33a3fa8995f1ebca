"""Makes the pictures of README.md and docs/guides from a running server: python docs/pictures.py [http://localhost:8000]

They are the answers to their commands, enlarged without smoothing. Needs Pillow, and a server of both bundled
checkpoints: python -m app --checkpoint mnist,cifar10
"""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from PIL import Image, ImageDraw, ImageSequence

FOLDER = Path(__file__).parent / "pictures"
SERVER = sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://localhost:8000"
GREYS = 8  # of the animations, which would be too large otherwise
MARK = (230, 150, 20)


def generate(accept: str = "image/png", **body: object) -> bytes:
    """POST /generate."""
    headers = {"Content-Type": "application/json", "Accept": accept}
    with urlopen(Request(f"{SERVER}/generate", json.dumps(body).encode(), headers)) as response:
        return bytes(response.read())


def edit(image: bytes, mask: bytes, **fields: object) -> list[Image.Image]:
    """POST /v1/images/edits."""
    boundary = "ddpm-pictures"
    parts = [(f'name="{name}"', str(value).encode()) for name, value in fields.items()]
    parts += [(f'name="{name}"; filename="{name}.png"', data) for name, data in (("image", image), ("mask", mask))]
    form = b"".join(
        f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + data + b"\r\n"
        for head, data in parts
    )
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    with urlopen(Request(f"{SERVER}/v1/images/edits", form + f"--{boundary}--\r\n".encode(), headers)) as response:
        made = json.load(response)["data"]
    return [Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))) for one in made]


def png(picture: Image.Image) -> bytes:
    """Its file."""
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def sequence(**query: object) -> list[Image.Image]:
    """GET /diffusion-sequence as a GIF; its frames."""
    with urlopen(f"{SERVER}/diffusion-sequence?{urlencode(query)}&format=gif") as response:
        gif = Image.open(io.BytesIO(response.read()))
    return [frame.convert("L") for frame in ImageSequence.Iterator(gif)]


def enlarged(picture: Image.Image, factor: int) -> Image.Image:
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def beside(pictures: list[Image.Image], gap: int = 0) -> Image.Image:
    """Pictures of one height in a row."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    row = Image.new(pictures[0].mode, (width, pictures[0].height))
    x = 0
    for picture in pictures:
        row.paste(picture, (x, 0))
        x += picture.width + gap
    return row


def save_gif(name: str, frames: list[Image.Image], factor: int) -> None:
    """Plays in three seconds and rests on the last frame."""
    levels = GREYS - 1
    coarse = [frame.point([round(v / 255 * levels) * 255 // levels for v in range(256)]) for frame in frames]
    first, *rest = [enlarged(frame, factor).quantize(GREYS) for frame in coarse]
    durations = [3000 // len(rest)] * len(rest) + [2500]
    first.save(FOLDER / name, save_all=True, append_images=rest, duration=durations, loop=0, optimize=True)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)

    # One of every class, out of noise.
    digits = [sequence(class_label=digit, seed=1, frames=12) for digit in range(10)]
    save_gif("digits.gif", [beside(list(frames)) for frames in zip(*digits, strict=True)], 3)

    # 1. A grid of sevens.
    sevens = Image.open(io.BytesIO(generate(class_label=7, n=16, seed=1)))
    enlarged(sevens, 4).save(FOLDER / "sevens.png", optimize=True)

    # 2. Threes out of noise.
    save_gif("threes.gif", sequence(class_label=3, n=4, columns=4, seed=5), 3)

    # 3. One of the sevens again: number 7 of the grid, which is index 6 of its seed.
    answer = json.loads(generate("application/json", class_label=7, seed=1, index=6))
    alone = Image.open(io.BytesIO(base64.b64decode(answer["images"][0]["png"])))
    grid, one = enlarged(sevens, 4).convert("RGBA"), enlarged(alone, 16).convert("RGBA")
    x, y = 6 % 4 * alone.width * 4, 6 // 4 * alone.height * 4
    ImageDraw.Draw(grid).rectangle((x, y, x + alone.width * 4 - 1, y + alone.height * 4 - 1), outline=MARK, width=3)
    beside([grid, one], gap=32).save(FOLDER / "again.png", optimize=True)

    # 4. Horses, in colour.
    horses = Image.open(io.BytesIO(generate(model="cifar10", class_label="horse", n=16, columns=8, seed=1)))
    enlarged(horses, 3).save(FOLDER / "horses.png", optimize=True)

    # 5. The lower half of a seven painted anew, as a two's: the seven, what was painted, and four answers.
    (answer,) = json.loads(generate("application/json", class_label=7, seed=1))["images"]
    seven = Image.open(io.BytesIO(base64.b64decode(answer["png"]))).convert("RGB")
    hole, mask = (0, 14, 28, 28), Image.new("RGBA", seven.size, "black")
    mask.paste((0, 0, 0, 0), hole)
    marked = seven.copy()
    marked.paste(MARK, hole)
    twos = [two.convert("RGB") for two in edit(png(seven), png(mask), prompt=2, n=4, seed=1)]
    enlarged(beside([seven, marked, *twos], gap=2), 5).save(FOLDER / "edited.png", optimize=True)

    sizes = {path.name: path.stat().st_size for path in sorted(FOLDER.iterdir())}
    print("\n".join(f"{size:7} {name}" for name, size in sizes.items()), f"\n{sum(sizes.values()):7} in all")


if __name__ == "__main__":
    main()
