"""What a model sees of a 12-megapixel JPEG that is decoded at a part of its scale, and the time.

    python benchmarks/jpeg_scale.py

Four pictures of 4032 x 3024 pixels: two photographs enlarged, with a camera's noise; noise with
the spectrum of natural pictures; a page full of print. Each is decoded at its whole scale and at
parts of it, then stretched to 448 x 448 as Qwen-VL does. Differences are in grey levels of 0 to
255, times the medians of `--repeats`.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images

from vltrain.data.images import REDUCED_MARGIN, open_image

WIDTH, HEIGHT = 4032, 3024  # pixels
SIDE = 448  # pixels, of what the model sees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print(f"decoded at least {REDUCED_MARGIN} times as large as the {SIDE} pixels needed")
    for name, picture in pictures():
        content = jpeg(picture)
        whole, whole_seconds = timed(lambda content=content: open_image(content), repeats)
        print(f"{name}, {len(content) / 1e6:.1f} MB: whole {1000 * whole_seconds:.0f} ms")
        for part in (2, 4):
            seen, seconds = timed(lambda content=content, p=part: reduced(content, p), repeats)
            apart = np.abs(seen - whole)
            print(
                f"  1/{part}: {1000 * seconds:.0f} ms, mean {apart.mean():.2f}, "
                f"999 of 1000 at most {np.percentile(apart, 99.9):.0f}, most {apart.max():.0f}"
            )
        chosen = open_image(content, side=SIDE)
        print(f"  chosen: 1/{WIDTH // chosen.width}")


def pictures() -> Iterator[tuple[str, Image.Image]]:
    """Names and pictures, always the same."""
    random = np.random.default_rng(0)
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        large = Image.fromarray(photograph).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
        pixels = np.asarray(large, dtype=np.float32) + random.normal(0, 6, (HEIGHT, WIDTH, 3))
        yield name, from_values(pixels)
    yield "natural noise", natural_noise(random)
    yield "print", printed_page()


def natural_noise(random: np.random.Generator) -> Image.Image:
    """Coloured noise whose amplitude falls with the frequency."""
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = 1
    common = random.standard_normal((HEIGHT, WIDTH))
    channels = []
    for _ in range(3):
        spectrum = np.fft.rfft2(common + 0.3 * random.standard_normal((HEIGHT, WIDTH)))
        channels.append(np.fft.irfft2(spectrum / frequency, s=(HEIGHT, WIDTH)))
    values = np.stack(channels, -1)
    return from_values((values - values.mean()) / values.std() * 45 + 128)


def printed_page() -> Image.Image:
    """Black lines of small print on white."""
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(40)
    for top in range(40, HEIGHT - 40, 56):
        draw.text((60, top), "Sphinx of black quartz, judge my vow 0123456789. " * 5, "black", font)
    return page


def from_values(values: np.ndarray) -> Image.Image:
    """A picture of float [H, W, 3], cut off at 0 and 255."""
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def jpeg(picture: Image.Image) -> bytes:
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=90)
    return written.getvalue()


def reduced(content: bytes, part: int) -> Image.Image:
    """The picture decoded at 1 / `part` of its scale."""
    return open_image(content, side=HEIGHT // part // REDUCED_MARGIN)


def timed(decode: Callable[[], Image.Image], repeats: int) -> tuple[np.ndarray, float]:
    """What the model sees, float [448, 448, 3], and the median of the seconds that it takes."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        seen = decode().resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        seconds.append(time.perf_counter() - started)
    return np.asarray(seen, dtype=np.float32), statistics.median(seconds)


if __name__ == "__main__":
    main()
