"""Pictures and videos in and out of files, and labelled figures: numpy, Pillow and PyAV only, no torch.

Everything in memory is RGB or gray, upright, float in [0, 1], height before width before channels.
"""

from .figures import grid, heat_map, hot_spot, side_by_side, strip
from .files import IMAGE_SUFFIXES, MAX_PIXELS, check_output, list_images, read_image, write_image
from .pixels import Picture, from_pil, to_pil, to_uint8, to_unit
from .video import VIDEO_SUFFIXES, Changed, change_video, check_video_output, is_video, video_ending

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "VIDEO_SUFFIXES",
    "Changed",
    "Picture",
    "change_video",
    "check_output",
    "check_video_output",
    "from_pil",
    "grid",
    "heat_map",
    "hot_spot",
    "is_video",
    "list_images",
    "read_image",
    "side_by_side",
    "strip",
    "to_pil",
    "to_uint8",
    "to_unit",
    "video_ending",
    "write_image",
]
