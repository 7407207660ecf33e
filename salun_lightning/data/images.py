"""Image files: whether they can be read, and decoded to 8 bits a channel."""

import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError


def eight_bits(image: Image.Image) -> Image.Image:
    """The image as 8-bit grey or RGB. 16 bits are scaled down; a palette, CMYK and transparency become RGB.

    Args:
        image: Of any mode of PIL.

    Raises:
        ValueError: Its numbers have no known scale.

    Example:
        >>> eight_bits(Image.fromarray(np.array([[0, 257 * 7, 65535]], np.uint16))).getpixel((1, 0))
        7
    """
    if image.mode in {"L", "RGB"}:
        return image
    if image.mode.startswith("I"):  # convert() would cut off above 255
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"The image has numbers from {grey.min()} to {grey.max()}. Save it with 8 or 16 bits a channel.")
        return Image.fromarray((grey / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("The image has floating-point numbers, whose scale is not known. Save it with 8 or 16 bits a channel.")
    if image.mode == "1":
        return image.convert("L")
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def read_image(path: str) -> Image.Image:
    """Decode a file to 8-bit RGB.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        with Image.open(path) as image:
            return eight_bits(image).convert("RGB")
    except Exception as error:  # PIL has many kinds
        raise ValueError(f"'{path}' cannot be read: {error}. Repair it, or take it out of the folder.") from error


def check_images(paths: Sequence[str]) -> None:
    """Refuse image files that cannot be read, without decoding those whose end can be told otherwise.

    Raises:
        ValueError: Some cannot be read.
    """
    faults = [(path, fault) for path in paths if (fault := _fault(path))]
    if faults:
        path, fault = faults[0]
        more = f" ({len(faults) - 1} more are like that.)" if len(faults) > 1 else ""
        raise ValueError(f"'{path}' cannot be read: {fault}. Repair it, or take it out of the folder.{more}")


def _fault(path: str) -> str:
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                kind = image.format
                if kind == "PNG":
                    image.verify()  # its checksums
                    return ""
            file.seek(-2, 2)
            if kind != "JPEG" or file.read() != b"\xff\xd9":
                with Image.open(path) as image:
                    eight_bits(image).load()
    except UnidentifiedImageError:
        return "it is not an image"
    except Exception as error:  # PIL has many kinds
        return str(error)
    return ""
