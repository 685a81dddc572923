import struct
from fractions import Fraction

import numpy as np
import pytest

from zoo.errors import UserError
from zoo.media.video import change_video, check_video_output, is_video, video_ending

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'zoo[video]'")

NTSC = Fraction(24000, 1001)
FLAT = 0.03  # what two encodings with 8-bit YUV in between leave of flat colours, in [0, 1]
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 120, 40]], np.uint8)


def flags(height, width):
    """Four flat colours, one per quarter."""
    rows, columns = np.arange(height)[:, None] * 2 // height, np.arange(width) * 2 // width
    return COLOURS[rows * 2 + columns]


def make(path, *, size=(48, 64), frames=12, rate=NTSC, fmt="yuv420p", codec="libx264", audio=None, times=None, **about):
    """A real file: four flat colours, and a tone where `audio` names an encoder."""
    with av.open(str(path), "w") as file:
        video = file.add_stream(codec, rate=rate)
        video.height, video.width, video.pix_fmt = *size, fmt
        for name, value in about.items():
            setattr(video.codec_context, name, value)
        sound = file.add_stream(audio, rate=48000, layout="mono") if audio else None
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(flags(*size), "rgb24").reformat(
                format=fmt,
                dst_colorspace=about.get("colorspace", 5),
                src_color_range=2,
                dst_color_range=about.get("color_range", 1),
            )
            frame.pts, frame.time_base = (times or range(frames))[number], 1 / rate
            file.mux(video.encode(frame))
        file.mux(video.encode())
        if sound:
            wave = np.sin(np.arange(int(48000 * frames / rate)) * 0.06).astype(np.float32)
            for start in range(0, len(wave) - 1023, 1024):
                values = wave[None, start : start + 1024]
                values = (values * 32000).astype(np.int16) if sound.format.name == "s16" else values
                frame = av.AudioFrame.from_ndarray(values, sound.format.name, "mono")
                frame.sample_rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
                file.mux(sound.encode(frame))
            file.mux(sound.encode())
    return path


def centres(pixels):
    """The middle of every quarter, away from the borders of colours."""
    height, width = pixels.shape[:2]
    return pixels[height // 4 :: height // 2, width // 4 :: width // 2]


def twice(pixels):
    return pixels.repeat(2, 0).repeat(2, 1)


def read(path):
    """Times, pixels of the first frame in [0, 1], and the bytes of all audio packets."""
    with av.open(str(path)) as file:
        frames = list(file.decode(video=0))
        first = frames[0].reformat(format="rgb24", src_color_range=frames[0].color_range, dst_color_range=2)
        pixels = first.to_ndarray() / 255
    with av.open(str(path)) as file:
        audio = (
            [bytes(packet) for packet in file.demux(*file.streams.audio) if packet.size] if file.streams.audio else []
        )
    return [frame.time for frame in frames], pixels, audio


@pytest.mark.parametrize(
    ("name", "audio", "to"),
    [
        ("a.mp4", "aac", "b.mp4"),
        ("a.mov", "aac", "b.mov"),
        ("a.mkv", "libopus", "b.webm"),
        ("a.avi", "ac3", "b.mkv"),
    ],
)
def test_times_audio_and_colours_survive(tmp_path, name, audio, to):
    make(tmp_path / name, audio=audio)
    seen = []
    found = change_video(
        tmp_path / name, tmp_path / to, twice, progress=lambda *numbers: seen.append(numbers), note="zoo:model=m"
    )
    assert (found.frames, found.lost, found.size, found.new_size, found.audio) == (12, 0, (64, 48), (128, 96), 1)
    assert found.fps == pytest.approx(float(NTSC), rel=1e-3)
    assert seen[-1] == (12, 12)
    (old_times, _, old_audio), (times, pixels, sound) = read(tmp_path / name), read(tmp_path / to)
    if name == "a.avi":  # knows no times, only an order of packets
        old_times = [number / NTSC for number in range(12)]
    assert times == pytest.approx([float(at) for at in old_times], abs=2e-3), "Matroska keeps milliseconds"
    assert len(sound) > 10
    assert sound == old_audio, "audio packets are copied bit by bit"
    assert np.abs(centres(pixels) - centres(flags(48, 64) / 255)).max() < FLAT
    with av.open(str(tmp_path / to)) as file:
        assert {k.lower(): v for k, v in file.metadata.items()}["comment"] == "zoo:model=m"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({name, to})


@pytest.mark.parametrize("colorspace", [1, 5, 9])
@pytest.mark.parametrize("color_range", [1, 2])
def test_matrix_and_range_are_those_of_the_source(tmp_path, colorspace, color_range):
    make(tmp_path / "a.mp4", frames=2, colorspace=colorspace, color_range=color_range)
    seen = []
    change_video(tmp_path / "a.mp4", tmp_path / "b.mp4", lambda pixels: seen.append(pixels) or pixels)
    assert np.abs(centres(seen[0]) - centres(flags(48, 64) / 255)).max() < FLAT
    with av.open(str(tmp_path / "b.mp4")) as file:
        frame = next(file.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (colorspace, color_range)


@pytest.mark.parametrize("to", ["b.mp4", "b.webm"])
@pytest.mark.parametrize("size", [(33, 47), (1, 1), (16, 31)], ids=str)
def test_odd_sizes_come_out_exactly(tmp_path, size, to):
    make(tmp_path / "a.mkv", size=(34, 48), frames=2, codec="ffv1", fmt="yuv444p")
    found = change_video(tmp_path / "a.mkv", tmp_path / to, lambda pixels: pixels[: size[0], : size[1]])
    assert found.new_size == size[::-1]
    assert read(tmp_path / to)[1].shape == (*size, 3)


def test_uneven_times_are_kept(tmp_path):
    make(tmp_path / "a.mkv", frames=5, times=[0, 1, 5, 6, 11])
    change_video(tmp_path / "a.mkv", tmp_path / "b.mkv", twice)
    assert read(tmp_path / "b.mkv")[0] == pytest.approx(read(tmp_path / "a.mkv")[0], abs=2e-3)


def test_ten_bits_stay_ten(tmp_path):
    make(tmp_path / "a.mkv", frames=2, fmt="yuv420p10le", codec="ffv1")
    seen = []
    change_video(tmp_path / "a.mkv", tmp_path / "b.mkv", lambda pixels: seen.append(pixels) or pixels)
    assert len(np.unique(np.rint(seen[0] * 255) - seen[0] * 255)) > 2, "values between those of 8 bits"
    with av.open(str(tmp_path / "b.mkv")) as file:
        assert next(file.decode(video=0)).format.name == "yuv420p10le"


def test_what_was_filmed_sideways_is_turned_upright(tmp_path):
    data = make(tmp_path / "a.mp4", frames=2).read_bytes()
    start = data.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of other facts
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)  # a quarter clockwise
    (tmp_path / "a.mp4").write_bytes(data[:start] + turned + data[start + 36 :])
    found = change_video(tmp_path / "a.mp4", tmp_path / "b.mp4", twice)
    assert (found.size, found.new_size) == ((48, 64), (96, 128))
    expected = np.rot90(flags(48, 64), -1) / 255
    assert np.abs(centres(read(tmp_path / "b.mp4")[1]) - centres(expected)).max() < FLAT


def test_only_a_few_frames_are_in_memory(tmp_path):
    """The next frame is decoded when the one before has been changed."""
    make(tmp_path / "a.mp4", frames=200, rate=Fraction(25))
    order = []

    def change(pixels):
        order.append("in")
        return pixels

    change_video(tmp_path / "a.mp4", tmp_path / "b.mp4", change, progress=lambda done, total: order.append("out"))
    assert order == ["in", "out"] * 200


def test_ctrl_c_keeps_what_is_done_as_a_whole_file(tmp_path):
    make(tmp_path / "a.mp4", audio="aac")
    count = iter(range(99))

    def change(pixels):
        if next(count) == 7:
            raise KeyboardInterrupt
        return pixels

    with pytest.raises(KeyboardInterrupt):
        change_video(tmp_path / "a.mp4", tmp_path / "b.mp4", change)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b_first_7_frames.mp4"]
    assert len(read(tmp_path / "b_first_7_frames.mp4")[0]) == 7


def test_a_cut_file_gives_what_can_be_read(tmp_path):
    data = make(tmp_path / "a.mkv", frames=60, size=(96, 128), codec="mpeg4").read_bytes()
    (tmp_path / "a.mkv").write_bytes(data[: len(data) * 2 // 3])
    found = change_video(tmp_path / "a.mkv", tmp_path / "b.mkv", lambda pixels: pixels)
    assert 10 < found.frames < 60


def test_nothing_is_left_when_a_frame_cannot_be_restored(tmp_path):
    make(tmp_path / "a.mp4")

    def change(pixels):
        raise UserError("no memory")

    with pytest.raises(UserError, match="no memory"):
        change_video(tmp_path / "a.mp4", tmp_path / "b.mp4", change)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_mistakes_are_one_sentence(tmp_path):
    make(tmp_path / "a.mkv", frames=3, audio="pcm_s16le")
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.mkv\n#EXT-X-ENDLIST\n")
    (tmp_path / "empty.mp4").touch()
    with av.open(str(tmp_path / "sound.mkv"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), "s16", "mono")
        frame.sample_rate = 48000
        file.mux(stream.encode(frame))
    for name, to, words in (
        ("a.mkv", "b.webm", "cannot hold the audio"),
        ("a.mkv", "b.avi", r"zoo writes videos as \.mp4"),
        ("text.mp4", "b.mp4", "no video that can be read"),
        ("list.mp4", "b.mp4", "no video that can be read"),
        ("empty.mp4", "b.mp4", "no video that can be read"),
        ("sound.mkv", "b.mkv", "holds no moving pictures"),
    ):
        with pytest.raises(UserError, match=words):
            change_video(tmp_path / name, tmp_path / to, twice)
        assert not (tmp_path / to).exists()
    with pytest.raises(FileNotFoundError, match="no such file"):
        change_video(tmp_path / "none.mp4", tmp_path / "b.mp4", twice)
    with pytest.raises(FileExistsError, match="exists already"):
        change_video(tmp_path / "a.mkv", tmp_path / "a.mkv", twice)
    sizes = iter([4, 4, 6])
    with pytest.raises(UserError, match="change their size"):
        change_video(tmp_path / "a.mkv", tmp_path / "b.mkv", lambda pixels: pixels[: next(sizes)])
    check_video_output(tmp_path / "a.MP4")


def test_endings_decide_what_is_a_video_and_what_becomes_of_it(tmp_path):
    assert is_video("A.MOV")
    assert not is_video("a.gif")
    assert video_ending(tmp_path / "a.webm") == ".webm"
    assert video_ending(tmp_path / "a.avi") == ".mkv"
