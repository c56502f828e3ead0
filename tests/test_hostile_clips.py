"Clips that nobody would make on purpose. `HOSTILE=15` does fifteen times as many (minutes)."
import os
from fractions import Fraction

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dual_ipo.core import UserError, Video, VideoFile, check_clip, evenly, read_clip, resample
from dual_ipo.data import clip_fault
from dual_ipo.report import preview
from awkward import FORMATS, shades, with_matrix, write
from test_clips import TURNS, near

COUNTS, SIZES = {}, st.integers(8, 40).map(lambda n: 2*n)


def hostile(n, **strategies):
    "So many examples for each unit of HOSTILE, always the same ones."
    kind = settings(max_examples=round(n*float(os.environ.get("HOSTILE", 1))), derandomize=True, deadline=None,
        database=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
    return lambda function: kind(given(**strategies)(function))


def one_line(function, *args):
    "What a function makes, or None where it refuses in one line; anything else it raises is a fault."
    try: return function(*args)
    except UserError as error:
        assert "\n" not in str(error)
        return None


def count(what, found):
    COUNTS[what, found] = COUNTS.get((what, found), 0) + 1


def teardown_module():
    print("\nhostile clips:", ", ".join(f"{n} {what} {found}" for (what, found), n in sorted(COUNTS.items())))


@hostile(25, name=st.sampled_from(sorted(FORMATS)), T=st.integers(1, 24), H=SIZES, W=SIZES,
    fps=st.sampled_from([1, 8, Fraction(24000, 1001), 30, 60, 240]), turn=st.sampled_from(TURNS),
    pixel=st.sampled_from([Fraction(1), Fraction(4, 3), Fraction(3, 5), Fraction(64, 45)]), group=st.integers(1, 30))
def test_whatever_is_written_is_shown(tmp_path, name, T, H, W, fps, turn, pixel, group):
    path = write(tmp_path/f"a.{name}", shades(T, H, W), fps=fps, sample_aspect_ratio=pixel, options={"g": str(group)})
    if name in ("mp4", "mov"): with_matrix(path, *turn)
    else: turn = TURNS[0]
    if name in ("avi", "webm"): pixel = None   # the container may not keep it
    frames, line = read_clip(path)
    wide, high = (round(W*pixel), H) if pixel and pixel >= 1 else (W, round(H/pixel)) if pixel else frames.shape[:1:-1]
    size = [high, wide] if turn[0] or not pixel else [wide, high]
    assert list(frames.shape) == [T, 3, *size] and check_clip(path) == (T, *frames.shape[2:])
    assert abs(line.fps/fps - 1) < .02 and line.even and abs(line.end - T/fps) < .01*T/fps + .002
    for n in (1, 2, 5): assert torch.equal(VideoFile(path).frames_at(n), frames[evenly(T, n)])
    count(name, "right")


@hostile(12, name=st.sampled_from(["mp4", "mov", "mkv", "webm"]),
    gaps=st.lists(st.integers(5, 900), min_size=1, max_size=20), rate=st.sampled_from([1, 2, 4, 8]))
def test_any_clock_is_kept(tmp_path, name, gaps, rate):
    stamps = [0, *np.cumsum(gaps).tolist()]
    options = {"bf": "0"} if name != "webm" else {}
    path = write(tmp_path/f"a.{name}", shades(len(stamps), 32, 32), stamps=stamps, options=options, last=100)
    clip = Video.load(path)
    again = VideoFile(clip.save(tmp_path/"again.mp4").path)
    even = .3/clip.fps if clip.times is None else .002   # a rate stands for what is nearly even
    assert near(clip.seconds(), [s/1000 for s in stamps], even) and near(again.seconds(), clip.seconds(), .002)
    assert abs(again.duration() - clip.duration()) < .01
    assert torch.equal(VideoFile(path).frames_at(4), clip.frames[clip.spread(4)])
    indices = one_line(resample, clip, 4, float(rate))
    for i, k in enumerate(indices or ()): assert clip.seconds()[k] <= i/rate*1.06 + .3/clip.fps + 1e-6
    assert sorted(indices or ()) == (indices or [])
    count("uneven", "resampled" if indices else "set aside")


LOOKS = (Video.load, lambda path: VideoFile(path).frames_at(3), lambda path: VideoFile(path).times_at(3),
         lambda path: VideoFile(path).mp4(), preview)


@hostile(60, name=st.sampled_from(sorted(FORMATS)), share=st.floats(0, .999),
    flips=st.lists(st.tuples(st.floats(0, .9999), st.integers(0, 255)), max_size=6))
def test_damage_is_one_line(tmp_path, name, share, flips):
    whole = tmp_path/f"whole.{name}"
    if not whole.exists(): write(whole, shades(12), options={"g": "5"})
    data = bytearray(whole.read_bytes())
    for at, value in flips: data[int(at*len(data))] = value
    cut = bytes(data) if flips else bytes(data)[:int(share*len(data))]
    path = tmp_path/f"a.{name}"
    path.write_bytes(cut)
    fault = clip_fault(path, (9, 64, 96), 16.)
    assert fault is None or "\n" not in fault
    assert flips or fault, f"{len(cut)} of {len(data)} bytes pass as a clip"
    for look in LOOKS: one_line(look, path)
    count("damaged" if flips else "cut", "refused" if fault else "read")


HEADS = [b"", b"\0\0\0\x18ftypisom", b"RIFF\xff\xff\0\0AVI LIST", b"\x1a\x45\xdf\xa3\x01\0\0\0\0\0\0\x1f",
         b"\0\0\0\1moov" + b"\xff"*8, b"GIF89a", b"#EXTM3U\n"]


@hostile(60, data=st.binary(max_size=400), head=st.sampled_from(HEADS))
def test_noise_is_one_line(tmp_path, data, head):
    path = tmp_path/"a.mp4"
    path.write_bytes(head + data)
    assert one_line(read_clip, path) is None and clip_fault(path, None)
    count("noise", "refused")
