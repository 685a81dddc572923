"""Pictures in and out of files, and labelled figures made of them: numpy and Pillow only, no torch.

Everything in memory is RGB or gray, upright, float in [0, 1], height before width before channels.
"""

from .figures import grid, heat_map, hot_spot, side_by_side, strip
from .files import IMAGE_SUFFIXES, MAX_PIXELS, check_output, list_images, read_image, write_image
from .pixels import Picture, from_pil, to_pil, to_uint8, to_unit

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "Picture",
    "check_output",
    "from_pil",
    "grid",
    "heat_map",
    "hot_spot",
    "list_images",
    "read_image",
    "side_by_side",
    "strip",
    "to_pil",
    "to_uint8",
    "to_unit",
    "write_image",
]
