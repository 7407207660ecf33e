"""Image files, decoded to 8 bits a channel."""

import numpy as np
from PIL import Image


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
