"Clips as a player shows them: turned, square pixels, SDR, opaque, on their own clock, whole."
import struct, subprocess, sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from dual_ipo import core
from dual_ipo.core import SMALL, Video, VideoFile, browser_plays, check_clip, read_mp4, resample, side_by_side
from dual_ipo.data import check_clips, clip_fault
from dual_ipo.report import preview
from awkward import FORMATS, shades, shown_by_hand, with_matrix, write
from test_data import line_of


def shade(frames): return [round(x) for x in frames[..., 32:, 32:].float().mean((1, 2, 3)).tolist()]

def near(a, b, off): return max(abs(x - y) for x, y in zip(a, b, strict=True)) <= off


# turned and mirrored

TURNS = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0),
         (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)]

@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
@pytest.mark.parametrize("turn", TURNS)
def test_every_orientation(tmp_path, turn, name):
    path = write(tmp_path/name, shades(3))
    stored = read_mp4(path)[0]
    seen = read_mp4(with_matrix(path, *turn))[0]
    expected = shown_by_hand(stored[1].permute(1, 2, 0).numpy(), *turn)
    assert torch.equal(seen[1], torch.from_numpy(expected).permute(2, 0, 1))
    assert check_clip(path) == (3, *expected.shape[:2])
    assert torch.equal(VideoFile(path).frames_at(2), seen[[0, 2]])
    again = read_mp4(Video.load(path).save(tmp_path/"again.mp4").path)[0]
    assert again.shape == seen.shape and (again.float() - seen.float()).abs().mean() < 4


def test_a_portrait_clip_is_no_landscape(tmp_path):
    path = with_matrix(write(tmp_path/"a.mp4", shades()), 0, 1, -1, 0)
    assert clip_fault(path, (9, 96, 64)) is None and "9x96x64" in clip_fault(path, (9, 64, 96))


@pytest.mark.parametrize("turn", [(.7, .7, -.7, .7), (1, .3, 0, 1)])
def test_part_of_a_right_angle_is_refused(tmp_path, turn):
    assert "right angle" in line_of(read_mp4, with_matrix(write(tmp_path/"a.mp4", shades(2)), *turn))


def test_no_matrix_at_all(tmp_path):
    assert read_mp4(with_matrix(write(tmp_path/"a.mp4", shades(2)), 0, 0, 0, 0))[0].shape == (2, 3, 64, 96)


# pixels that are not square

@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv"])
def test_square_pixels(tmp_path, name):
    sizes = {Fraction(4, 3): (64, 128), Fraction(2, 3): (96, 96), Fraction(1): (64, 96), Fraction(1000, 1001): (64, 96)}
    for pixel, size in sizes.items():
        path = write(tmp_path/name, shades(2), sample_aspect_ratio=pixel)
        frames = read_mp4(path)[0]
        assert frames.shape[2:] == size and check_clip(path)[1:] == size
        assert frames[0, 2, :size[0]//5, size[1]//2:].min() > 240   # the bar is still a quarter high
    assert clip_fault(write(tmp_path/name, shades(2), sample_aspect_ratio=Fraction(4, 3)), (2, 64, 128)) is None


def test_square_pixels_turned(tmp_path):
    path = with_matrix(write(tmp_path/"a.mov", shades(2), sample_aspect_ratio=Fraction(4, 3)), 0, 1, -1, 0)
    assert read_mp4(path)[0].shape[2:] == (128, 64)


def test_pixels_that_would_be_huge(tmp_path):
    path = write(tmp_path/"a.mkv", shades(2, 64, 4096), sample_aspect_ratio=Fraction(60, 1))
    assert "scale the clip down" in line_of(read_mp4, path)


# light and colour

def pq(nits):
    "SMPTE ST 2084."
    m1, m2, c1, c2, c3 = 2610/16384, 2523/4096*128, 3424/4096, 2413/4096*32, 2392/4096*32
    y = (nits/10000)**m1
    return ((c1 + c2*y)/(1 + c3*y))**m2

def hlg(light):
    "BT.2100, of scene light 0..1."
    return (3*light)**.5 if light <= 1/12 else .17883277*np.log(12*light - .28466892) + .55991073

def deep(path, values, trc, primaries=9, matrix=9, codec="libx265"):
    "Two frames of one colour, limited range of 10 bits."
    def picture(_):
        frame = av.VideoFrame(64, 64, "yuv420p10le")
        for plane, value in zip(frame.planes, values):
            data = np.frombuffer(plane, np.uint16).copy()
            data[:] = value
            plane.update(data.tobytes())
        return frame
    tags = dict(colorspace=matrix, color_primaries=primaries, color_trc=trc, color_range=1)
    names = f"colorprim={primaries}:transfer={trc}:colormatrix={matrix}"
    options = {"crf": "4", "x265-params": f"log-level=none:bframes=0:{names}"} if codec == "libx265" else {}
    return write(path, np.zeros((2, 64, 64)), codec=codec, pix="yuv420p10le", prepare=picture, options=options, **tags)

@pytest.mark.parametrize("name, codec", [
    ("a.mp4", "libx265"), ("a.mov", "libx265"), ("a.mkv", "libx265"), ("a.webm", "libvpx-vp9")])
def test_hdr(tmp_path, name, codec):
    formats = {format.name for format in av.codec.Codec(codec, "w").video_formats}
    if codec == "libvpx-vp9" and "yuv420p10le" not in formats: pytest.skip("no VP9 of 10 bits")
    shown = {16: lambda nits: nits, 18: lambda light: 1000*light**1.2}   # cd/m² on a display of 1000 (BT.2100)
    for trc, curve, white in ((16, pq, 203), (18, hlg, .265)):
        for share in (0, .02, .128, .18, .5, 1, 3):
            path = deep(tmp_path/name, (round(4*(16 + 219*curve(share*white))), 512, 512), trc, codec=codec)
            right = 255*min(shown[trc](share*white)/203, 1)**(1/2.4)   # BT.1886, its white at BT.2408's reference
            assert abs(read_mp4(path)[0].float().mean().item() - right) < 3, (trc, share)


def test_wide_colours_become_ours(tmp_path):
    "Red of BT.709, written with the primaries of BT.2020 and P3, is red; green of BT.2020 is as green as we have."
    # of light: (.627, .069, .016) and (.822, .033, .017)
    for primaries, matrix, rgb in ((9, 9, (.823, .329, .180)), (12, 1, (.922, .242, .183))):
        kr, kb = {9: (.2627, .0593), 1: (.2126, .0722)}[matrix]
        y = kr*rgb[0] + (1 - kr - kb)*rgb[1] + kb*rgb[2]
        yuv = [16 + 219*y, 128 + 224*(rgb[2] - y)/(2 - 2*kb), 128 + 224*(rgb[0] - y)/(2 - 2*kr)]
        path = deep(tmp_path/"a.mp4", [round(4*x) for x in yuv], 14 if primaries == 9 else 1, primaries, matrix)
        red = read_mp4(path)[0].float().mean((0, 2, 3))
        assert red[0] > 230 and red[1] < 48 and red[2] < 35, red


def test_ranges_and_matrices_stay_as_they_were(tmp_path):
    for pix, matrix, spread in (("yuv420p", 1, 1), ("yuvj420p", 5, 2), ("yuv420p", 5, 1), ("yuv444p", 1, 1)):
        frames = np.full((2, 64, 64, 3), (200, 90, 40), np.uint8)
        to = dict(format=pix, dst_colorspace=matrix, dst_color_range=spread)
        def prepare(frame): return av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(**to)
        kept = dict(colorspace=matrix, color_range=spread)
        path = write(tmp_path/"a.mp4", frames, pix=pix, prepare=prepare, options={"crf": "4"}, **kept)
        assert near(read_mp4(path)[0].float().mean((0, 2, 3)).tolist(), (200, 90, 40), 4)


@pytest.mark.parametrize("name, codec, pix", [
    ("a.mov", "prores_ks", "yuva444p10le"), ("a.mov", "png", "rgba"), ("a.mov", "qtrle", "argb"),
    ("a.mkv", "ffv1", "bgra"), ("a.avi", "png", "rgba"), ("a.webm", "libvpx-vp9", "yuva420p"),
    ("a.webm", "libvpx", "yuva420p"), ("a.mkv", "libvpx-vp9", "yuva420p")])
def test_nothing_under_transparency_is_seen(tmp_path, name, codec, pix):
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)   # what an editor leaves behind
    picture[..., 3] = 0
    picture[16:48, 16:48] = (255, 0, 0, 255)
    picture[48:, 48:] = (200, 200, 200, 128)
    def prepare(_): return av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format=pix)
    options = {"auto-alt-ref": "0"} if codec == "libvpx" else {}
    path = write(tmp_path/name, np.zeros((3, 64, 64)), codec=codec, pix=pix, prepare=prepare, options=options)
    frame = read_mp4(path)[0][1].float()
    assert frame[:, :12, :44].max() < 12 and near(frame[:, 24:40, 24:40].mean((1, 2)).tolist(), (255, 0, 0), 8)
    assert near(frame[:, 54:, 54:].mean((1, 2)).tolist(), (100, 100, 100), 12)


# the clock

STAMPS = [0, 40, 80, 400, 440, 480, 1000, 1500, 1540]

@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.webm"])
def test_uneven_frames_keep_their_times(tmp_path, name):
    path = write(tmp_path/name, shades(), stamps=STAMPS, last=700, options={"bf": "0"} if name[2:] != "webm" else {})
    clip, file = Video.load(path), VideoFile(path)
    saved = clip.save(tmp_path/"again.mp4")
    for video in (clip, file, saved, Video.load(saved.path), VideoFile(saved.path)):
        assert near(video.seconds(), [s/1000 for s in STAMPS], .002) and len(video.frames) == 9
    if name[2:] in ("mp4", "mov"):
        for video in (clip, VideoFile(saved.path)): assert abs(video.duration() - 2.24) < .01
    assert near(file.times_at(3), [0, .48, 1.54], .002)
    assert torch.equal(file.frames_at(3), clip.frames[[0, 5, 8]])   # the middle of the time


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("fps", [8, Fraction(24000, 1001), 25, 60])
def test_rates(tmp_path, name, fps):
    path = write(tmp_path/f"a.{name}", shades(20), fps=fps)
    clip, file = Video.load(path), VideoFile(path)
    assert abs(clip.fps/fps - 1) < .01 and clip.times is None and abs(clip.duration() - 20/fps) < .02
    assert file.timing() == (20, clip.fps)


def test_a_browsers_recording_has_no_length(tmp_path):
    path = write(tmp_path/"a.webm", shades(30), fps=30, container={"live": "1"})
    assert read_mp4(path)[1] == 30 and VideoFile(path).timing() == (30, 30.)


def test_frames_cut_off_by_an_edit_list_are_not_shown(tmp_path):
    source = write(tmp_path/"whole.mp4", shades(20), fps=10, options={"g": "20", "bf": "0"})
    with av.open(str(source)) as a, av.open(str(tmp_path/"cut.mp4"), "w") as b:
        stream = b.add_stream_from_template(a.streams.video[0])
        for packet in a.demux(video=0):
            if packet.dts is None: continue
            early = packet.duration*5
            packet.pts, packet.dts, packet.stream = packet.pts - early, packet.dts - early, stream
            b.mux(packet)
    clip = Video.load(tmp_path/"cut.mp4")
    assert shade(clip.frames)[0] == shade(read_mp4(source)[0])[20 - len(clip.frames)]
    assert VideoFile(tmp_path/"cut.mp4").timing()[0] == len(clip.frames)


# the generator's rate

def test_real_clips_play_at_the_generators_rate(tmp_path):
    made = {"slow": (8, 81), "same": (16, 21), "longer": (16, 50), "film": (24, 35), "fast": (60, 80),
            "short": (60, 60), "ntsc": (Fraction(16000, 1001), 21)}
    for name, (fps, T) in made.items(): write(tmp_path/f"{name}.mp4", shades(T), fps=fps)
    good, bad = check_clips([tmp_path/f"{name}.mp4" for name in made], (21, 64, 96), .5, 16.)
    assert [p.stem for p in good] == ["same", "longer", "film", "fast", "ntsc"]
    assert "8 frames a second" in bad[0]["reason"] and "lasts 1.00 s" in bad[1]["reason"]
    fast = VideoFile(tmp_path/"fast.mp4")
    taken = fast.read(resample(fast, 21, 16.))
    assert near(shade(taken), [shade(fast.frames)[int(i*60/16 + .25)] for i in range(21)], 1)


def test_a_slide_show_is_no_clip_and_uneven_ones_are_resampled(tmp_path):
    write(tmp_path/"slides.mp4", shades(4), stamps=[0, 1000, 2000, 3000])
    assert "too few" in clip_fault(tmp_path/"slides.mp4", (33, 64, 96), 16.)
    stamps = [round(1000*i/30) + (7 if i % 3 else 0) + (80 if i > 30 else 0) for i in range(90)]
    phone = VideoFile(write(tmp_path/"phone.mp4", shades(90), stamps=stamps))
    indices = resample(phone, 33, 16.)
    assert all(stamps[k] <= 1000*i/16 + 12 for i, k in enumerate(indices))
    assert clip_fault(phone.path, (33, 64, 96), 16.) is None


# whole or not

@pytest.mark.parametrize("name", FORMATS)
def test_every_container_tells_when_it_is_cut(tmp_path, name):
    path = write(tmp_path/f"a.{name}", shades(30))
    data, n = path.read_bytes(), len(read_mp4(path)[0])
    assert n == 30
    for share in (.05, .2, .4, .6, .8, .9, .97, .995):
        path.write_bytes(data[:int(share*len(data))])
        for function in (read_mp4, check_clip): assert "truncated" in line_of(function, path) or share < .06
        line_of(VideoFile(path).frames_at, 2)


def test_fragments_too(tmp_path):
    container, options = {"movflags": "frag_keyframe+empty_moov"}, {"g": "10", "bf": "0"}
    path = write(tmp_path/"a.mp4", shades(60), container=container, options=options)
    data = path.read_bytes()
    assert len(read_mp4(path)[0]) == 60
    for share in (.3, .5, .77, .9):
        path.write_bytes(data[:int(share*len(data))])
        assert "truncated" in line_of(read_mp4, path)


def test_a_cover_is_no_clip(tmp_path):
    path = write(tmp_path/"a.mkv", shades(1), codec="mjpeg", pix="yuvj420p")
    with av.open(str(path)) as a, av.open(str(tmp_path/"cover.mp4"), "w") as b:
        stream = b.add_stream_from_template(a.streams.video[0])
        stream.disposition = av.stream.Disposition.attached_pic
        for packet in a.demux(video=0):
            if packet.dts is not None: packet.stream = stream; b.mux(packet)
    assert "no video stream" in line_of(read_mp4, tmp_path/"cover.mp4")


# only what is asked for

KINDS = {
    "one group": ("a.mp4", "libx264", {}),
    "groups": ("a.mp4", "libx264", {"g": "7", "bf": "3"}),
    "pyramid": ("a.mkv", "libx264", {"g": "12", "bf": "5", "b-pyramid": "strict"}),
    "open groups": ("b.mp4", "libx264", {"g": "8", "x264-params": "open-gop=1:bframes=3"}),
    "hevc": ("c.mp4", "libx265", {"x265-params": "log-level=none:keyint=8:open-gop=1"}),
    "hevc closed": ("d.mov", "libx265", {"x265-params": "log-level=none:keyint=8:open-gop=0"}),
    "vp9": ("a.webm", "libvpx-vp9", {"g": "6", "lag-in-frames": "10", "auto-alt-ref": "1"}),
    "vp8": ("b.webm", "libvpx", {"lag-in-frames": "10", "auto-alt-ref": "1"}),
    "avi with B frames": ("a.avi", "mpeg4", {"bf": "2", "g": "9"}),
    "prores": ("a.mov", "prores_ks", {}),
    "mjpeg": ("b.avi", "mjpeg", {})}

@pytest.mark.parametrize("kind", KINDS)
def test_some_frames_are_the_same_as_of_all(tmp_path, kind):
    name, codec, options = KINDS[kind]
    pix = {"prores_ks": "yuv422p10le", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
    noise = np.random.default_rng(0).integers(0, 256, (40, 8, 12, 3), np.uint8)
    noise = noise.repeat(8, 1).repeat(8, 2)//2 + shades(40)//2
    path = write(tmp_path/name, noise, codec=codec, pix=pix, options=options)
    whole = read_mp4(path)[0]
    assert len(whole) == 40
    for n in (1, 2, 3, 8, 39, 40, 60): assert torch.equal(VideoFile(path).frames_at(n), whole[core.evenly(40, n)]), n
    for i in range(0, 40, 3): assert torch.equal(VideoFile(path).read([i])[0], whole[i]), i


def test_memory(tmp_path):
    "Of 1,024 frames reading keeps one buffer, checking and a judge's look next to nothing."
    code = """if True:
        import resource, sys; from pathlib import Path; import torch
        from dual_ipo.core import VideoFile, check_clip, read_mp4
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e3
        torch.zeros(10).sum(); VideoFile(sys.argv[2]).frames_at(2)
        begin = peak(); check_clip(sys.argv[1]); VideoFile(sys.argv[1]).frames_at(8); some = peak() - begin
        read_mp4(sys.argv[1]); print(some, peak() - begin)"""
    long = write(tmp_path/"long.mp4", np.zeros((1024, 256, 256, 3), np.uint8))
    small = write(tmp_path/"small.mp4", np.zeros((3, 256, 256, 3), np.uint8))
    command = [sys.executable, "-c", code, long, small]
    process = subprocess.run(command, capture_output=True, check=True, encoding="utf-8")
    some, whole = map(float, process.stdout.split())
    assert some < 50 and whole < 201 + 60, (some, whole)   # MB


# pages

@pytest.mark.parametrize("name, codec, pix", [
    ("a.webm", "libvpx-vp9", "yuv420p"), ("a.mkv", "libx264", "yuv420p"), ("a.mp4", "libx265", "yuv420p"),
    ("a.mov", "libx264", "yuv420p"), ("b.mp4", "libx264", "yuv420p10le"), ("c.mp4", "libx264", "yuv444p"),
    ("a.avi", "mpeg4", "yuv420p"), ("d.mp4", "libx264", "yuv422p"), ("e.mp4", "mpeg4", "yuv420p")])
def test_pages_hold_what_browsers_play(tmp_path, name, codec, pix):
    stamps = [0, 100, 200, 900, 1000, 1100] if name != "a.avi" else None
    path = write(tmp_path/name, shades(6, 130, 170), codec=codec, pix=pix, stamps=stamps)
    assert not browser_plays(path)
    for data in (VideoFile(path).mp4(), Video.load(path).mp4(), preview(path)):
        (tmp_path/"page.mp4").write_bytes(data)
        page = VideoFile(tmp_path/"page.mp4")
        assert browser_plays(page.path) and near(page.seconds(), VideoFile(path).seconds(), .002)


def test_odd_sizes_and_small_ones_can_be_shown(tmp_path):
    for size in ((131, 133), (33, 31)):
        path = write(tmp_path/"a.webm", shades(3, *size))
        (tmp_path/"page.mp4").write_bytes(Video.load(path).mp4())
        assert read_mp4(path)[0].shape[2:] == size and browser_plays(tmp_path/"page.mp4")
    whole = write(tmp_path/"a.mp4", shades(3, SMALL, SMALL))
    assert browser_plays(whole) and VideoFile(whole).mp4() == whole.read_bytes()


def test_two_rates_play_in_step(tmp_path):
    fast, slow = (write(tmp_path/f"{fps}.mp4", shades(9), fps=fps) for fps in (60, 15))
    both = side_by_side(Video.load(fast), Video.load(slow))
    right = shade(both.frames[..., 100:])
    assert both.fps == 60 and len(both.frames) == 36 and right[:4] == [right[0]]*4 and right[4] > right[0]


def test_unreadable_is_one_line(tmp_path, monkeypatch):
    path = write(tmp_path/"a.mp4", shades(2))
    monkeypatch.setattr(core, "declared_bytes", lambda path: open("/proc/1/mem", "rb"))
    assert "can't be read" in line_of(read_mp4, path)


def test_dolby_vision_is_refused(tmp_path):
    path = write(tmp_path/"a.mp4", shades(3), codec="libx265")
    path.write_bytes(path.read_bytes().replace(b"hev1", b"dvh1"))
    assert "Dolby Vision" in line_of(read_mp4, path)


def test_a_length_of_avi_and_mkv_is_read_right(tmp_path):
    assert core.ebml_size(struct.pack(">Q", (1 << 56) + 12345)) == (8, 12345) and core.ebml_size(b"") == (8, 0)
    for name in FORMATS:
        path = write(tmp_path/f"a.{name}", shades(3))
        assert core.declared_bytes(path) == path.stat().st_size
