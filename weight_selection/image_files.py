"""Reading image files safely: only common formats, and one kind of exception for every fault of a file."""

from weight_selection.errors import printable
from weight_selection.files import StrPath

# The formats that Pillow may decode. It would also run Ghostscript on PostScript in a file that is named like an image.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's


class BadImage(Exception):
    """An image file cannot be read; the message names the file and says why."""


def read_image(path: StrPath) -> "PIL.Image.Image":  # noqa: F821
    """Read an image of any mode as RGB, as timm does; like timm, it does not apply the file's EXIF orientation.

    Raises:
        BadImage: the file is missing, damaged or in another format.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as file:
            return file.convert("RGB")
    except Exception as error:  # a damaged file makes Pillow raise nearly any exception, and only Pillow runs here
        raise BadImage(printable(f"{path} cannot be read ({str(error) or type(error).__name__})")) from error
