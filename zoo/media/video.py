"""Video files, frame by frame: decoded, changed, encoded; never more than a few frames in memory.

Kept as they are: the time of every frame, audio (its packets are copied), colour matrix and range, the shape of pixels,
more than 8 bits. What a phone filmed sideways is turned upright. A playlist, which names other files, is no video.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from zoo.errors import UserError
from zoo.files import new_file

from .pixels import to_uint8, to_uint16, to_unit

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv")
_READ_ONLY = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,asf,flv,ogg"  # containers, never playlists
# Ending -> container, encoder and its options; both are lossy, at a quality that hardly shows.
_WRITERS = {
    ".mp4": ("mp4", "libx264", {"crf": "16", "preset": "medium"}),
    ".m4v": ("mp4", "libx264", {"crf": "16", "preset": "medium"}),
    ".mov": ("mov", "libx264", {"crf": "16", "preset": "medium"}),
    ".mkv": ("matroska", "libx264", {"crf": "16", "preset": "medium"}),
    ".webm": ("webm", "libvpx-vp9", {"crf": "18", "b:v": "0", "cpu-used": "4", "row-mt": "1"}),
}
# The numbers of ISO/IEC 23091-2 for the matrix from RGB, and those of them that swscale knows.
_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
_UNSPECIFIED, _BT709, _BT601 = 2, 1, 5
_FULL_RANGE = 2
_HD = 720  # rows from which on players take the matrix of HDTV where a file does not tell

Change = Callable[[np.ndarray], np.ndarray]
FrameProgress = Callable[[int, int], None]  # frames done, frames in all (0 = the file does not tell)


@dataclass(frozen=True)
class Changed:
    """What became of a video.

    Attributes:
        path: where it lies.
        frames: written.
        lost: packets that could not be decoded.
        size: width and height of the source, upright.
        new_size: width and height of the result.
        fps: average frames per second.
        audio: tracks copied.
    """

    path: Path
    frames: int
    lost: int
    size: tuple[int, int]
    new_size: tuple[int, int]
    fps: float
    audio: int


def is_video(path: str | Path) -> bool:
    """Whether a name ends like that of a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def video_ending(path: Path) -> str:
    """The ending of what is made of a video: its own where it can be written, else .mkv, which holds any audio."""
    return path.suffix if path.suffix.lower() in _WRITERS else ".mkv"


def check_video_output(path: Path) -> None:
    """Refuse an ending that cannot be written, before any work is done.

    Raises:
        UserError: it is none of those.
        FileNotFoundError: PyAV is not installed.
    """
    if path.suffix.lower() not in _WRITERS:
        raise UserError(f"{path}: zoo writes videos as {', '.join(_WRITERS)}; give the output one of these endings")
    _av()


def change_video(
    source: str | Path,
    target: str | Path,
    change: Change,
    *,
    progress: FrameProgress | None = None,
    note: str = "",
    force: bool = False,
) -> Changed:
    """Put every frame of a video through a function and write the result, with the audio of the source.

    Frames of odd size are written with full colour resolution (4:4:4) by H.264, which has no other way to hold them.
    Ctrl-C ends the result properly after the frames that are done, under a name of its own, and is passed on.

    Args:
        source: the file.
        target: its ending decides the format: .mp4, .m4v, .mov and .mkv (H.264), .webm (VP9).
        change: float32 (h, w, 3) in [0, 1], upright -> (H, W, 3) in [0, 1]; always the same size.
        progress: called with the numbers of frames done and in all.
        note: goes into the file as its comment.
        force: replace a file that exists.

    Raises:
        FileNotFoundError: no such source, or PyAV is not installed.
        FileExistsError: `target` exists and `force` is False.
        UserError: the source is no video or damaged from the start, or the target cannot hold its audio.
    """
    av = _av()
    source, target = Path(source), Path(target)
    check_video_output(target)
    with contextlib.closing(_opened(av, source)) as reader, new_file(target, force=force) as part:
        writer = _Writer(av, reader, part, target, note)
        stopped = False
        try:
            for frame in _frames(av, reader, writer):
                writer.write(frame, change(_pixels(frame)))
                if progress is not None:
                    progress(writer.count, max(writer.count, _expected(reader)))
        except KeyboardInterrupt:
            stopped = True
        except BaseException:
            writer.abandon()
            raise
        found = writer.finish() if writer.count else None
        if stopped:
            if found is not None:
                part.replace(target.with_name(f"{target.stem}_first_{found.frames}_frames{target.suffix}"))
            raise KeyboardInterrupt
        if found is None:
            raise UserError(f"{source}: not one of its frames can be decoded; get the file again")
    return found


class _Writer:
    """The result: its video stream opens with the first frame, audio packets are handed through."""

    def __init__(self, av: ModuleType, reader: Any, part: Path, target: Path, note: str) -> None:  # noqa: ANN401
        container, self._codec, self._options = _WRITERS[target.suffix.lower()]
        self.target, self.count, self.lost = target, 0, 0
        self._av, self._reader, self._video = av, reader, None
        self._source = _picture_stream(reader)
        self._rate = self._source.average_rate or self._source.guessed_rate or Fraction(25)
        self._file = av.open(str(part), "w", format=container)
        if note:
            self._file.metadata["comment"] = note
        self._audio = {}
        for stream in reader.streams.audio:
            name = stream.codec_context.name
            if stream.codec_context.codec.canonical_name not in self._file.supported_codecs:
                self.abandon()
                raise UserError(f"{target}: cannot hold the audio ({name}) as it is; name the output .mkv")
            self._audio[stream.index] = self._file.add_stream_from_template(stream)
        self._waiting: list[Any] = []  # audio that came before the first frame
        self._last: int | None = None
        self._sizes = ((0, 0), (0, 0))

    def write(self, frame: Any, pixels: np.ndarray) -> None:  # noqa: ANN401
        """Encode one frame with the time and the colours of the one it was made of."""
        new = (pixels.shape[1], pixels.shape[0])
        video = self._open(frame, new) if self._video is None else self._video
        if new != self._sizes[1]:
            raise UserError(
                f"{self._reader.name}: its frames change their size, from {self._sizes[1]} to {new}; cut it there"
            )
        deep = _is_deep(frame)
        values = to_uint16(pixels) if deep else to_uint8(pixels)
        picture = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(values), "rgb48le" if deep else "rgb24")
        picture = picture.reformat(
            format=video.pix_fmt,
            dst_colorspace=_matrix(frame),
            src_color_range=_FULL_RANGE,
            dst_color_range=_range(frame),
            interpolation="BICUBIC",
        )
        at = frame.pts
        if at is None or self._reader.format.name == "avi":  # which knows no times, only an order of packets
            at = round(self.count / (self._rate * self._source.time_base))
        self._last = at if self._last is None else max(at, self._last + 1)  # encoders take rising times only
        picture.pts, picture.time_base = self._last, self._source.time_base
        self._file.mux(video.encode(picture))
        self.count += 1

    def copy(self, packet: Any) -> None:  # noqa: ANN401
        """Hand an audio packet through."""
        packet.stream = self._audio[packet.stream.index]
        if self._video is None:
            self._waiting.append(packet)
        else:
            self._file.mux(packet)

    def finish(self) -> Changed:
        """End the file."""
        if self._video is not None:
            self._file.mux(self._video.encode())
        self._file.close()
        return Changed(self.target, self.count, self.lost, *self._sizes, float(self._rate), len(self._audio))

    def abandon(self) -> None:
        """Give the file up."""
        with contextlib.suppress(self._av.error.FFmpegError):
            self._file.close()

    def _open(self, frame: Any, size: tuple[int, int]) -> Any:  # noqa: ANN401
        video = self._file.add_stream(self._codec, rate=self._rate, options=self._options)
        video.width, video.height = size
        odd = any(side % 2 for side in size) and self._codec == "libx264"
        video.pix_fmt = ("yuv444p" if odd else "yuv420p") + ("10le" if _is_deep(frame) else "")
        about = video.codec_context
        about.time_base = self._source.time_base
        about.colorspace, about.color_range = frame.colorspace, _range(frame)
        if frame.colorspace not in _MATRICES:
            about.colorspace = _matrix(frame)
        told = self._source.codec_context
        about.color_primaries, about.color_trc = told.color_primaries, told.color_trc
        if self._source.sample_aspect_ratio:
            shape = self._source.sample_aspect_ratio
            about.sample_aspect_ratio = 1 / shape if frame.rotation % 180 else shape
        old = (frame.width, frame.height)
        self._video, self._sizes = video, (old[::-1] if frame.rotation % 180 else old, size)
        for packet in self._waiting:
            self._file.mux(packet)
        self._waiting = []
        return video


def _frames(av: ModuleType, reader: Any, writer: _Writer) -> Iterator[Any]:  # noqa: ANN401
    """The frames in order of their times; audio packets go to the writer on the way, damaged ones are counted."""
    video = _picture_stream(reader)
    video.thread_type = "AUTO"
    packets = reader.demux(video, *reader.streams.audio)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.error.FFmpegError:  # cut off: what came before is good
            writer.lost += 1
            return
        if packet.stream.type == "audio":
            if packet.dts is not None:
                writer.copy(packet)
            continue
        try:
            yield from packet.decode()
        except av.error.FFmpegError:
            writer.lost += 1


def _pixels(frame: Any) -> np.ndarray:  # noqa: ANN401
    """Float32 (h, w, 3) in [0, 1], RGB, upright."""
    rgb = frame.reformat(
        format="rgb48le" if _is_deep(frame) else "rgb24",
        src_colorspace=_matrix(frame),
        src_color_range=_range(frame),
        dst_color_range=_FULL_RANGE,
        interpolation="BICUBIC",
    )
    return to_unit(np.rot90(rgb.to_ndarray(), round(frame.rotation / 90)))


def _is_deep(frame: Any) -> bool:  # noqa: ANN401
    return max(part.bits for part in frame.format.components) > 8


def _matrix(frame: Any) -> int:  # noqa: ANN401
    return _MATRICES.get(frame.colorspace, _BT709 if frame.height >= _HD else _BT601)


def _range(frame: Any) -> int:  # noqa: ANN401
    full = frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj")
    return _FULL_RANGE if full else 1


def _expected(reader: Any) -> int:  # noqa: ANN401
    """How many frames there should be; 0 where the file does not tell."""
    video = _picture_stream(reader)
    if video.frames or not reader.duration or not video.average_rate:
        return video.frames
    return round(reader.duration / 1_000_000 * video.average_rate)


def _picture_stream(reader: Any) -> Any:  # noqa: ANN401
    return reader.streams.best("video")


def _opened(av: ModuleType, path: Path) -> Any:  # noqa: ANN401
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    only = {"format_whitelist": _READ_ONLY, "protocol_whitelist": "file"}
    try:
        reader = av.open(str(path.absolute()), options=only, metadata_errors="replace")
    except (av.error.FFmpegError, ValueError) as error:
        raise UserError(f"{path}: no video that can be read, or a damaged one; get the file again") from error
    if _picture_stream(reader) is None:
        reader.close()
        raise UserError(f"{path}: holds no moving pictures; give a video file")
    return reader


def _av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise FileNotFoundError(
            "video files need PyAV, which is not installed; "
            "run pip install 'zoo[video]' (in a checkout: pip install -e '.[video]')"
        ) from error
    return av
