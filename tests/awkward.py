"""Clips of the kinds that cameras, editors and browsers write; each frame a shade of its own, with a blue bar on top
and a red one on the left."""
import struct
from fractions import Fraction

import av
import numpy as np

FORMATS = {"mp4": "libx264", "mov": "libx264", "mkv": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4"}
QUIET = {"libx265": {"x265-params": "log-level=none"}, "libvpx-vp9": {"cpu-used": "8", "deadline": "realtime"}}


def shades(T=9, H=64, W=96):
    "uint8 [T, H, W, 3]; frame t is of shade 40 + 10 t (mod 200)."
    frames = np.empty((T, H, W, 3), np.uint8)
    for t in range(T): frames[t] = 40 + 10*t % 200
    frames[:, :H//4], frames[:, :, :W//8] = (0, 0, 255), (255, 0, 0)
    return frames


def write(path, frames, fps=16, codec=None, pix="yuv420p", stamps=None, last=None, options=None, container=None,
          prepare=None, **tags):
    "Write frames; `stamps` in milliseconds, `last`: how long the last one stays, ms."
    codec = codec or FORMATS[path.suffix[1:]]
    with av.open(str(path), "w", options=container or {}) as file:
        settings = QUIET.get(codec, {}) | (options or {})
        stream = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=settings)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix
        for key, value in tags.items(): setattr(stream.codec_context, key, value)
        if stamps: stream.codec_context.time_base = Fraction(1, 1000)
        def mux(packets):
            for packet in packets:
                if last and packet.pts == stamps[-1]: packet.duration = last
                file.mux(packet)
        for i, frame in enumerate(frames):
            if prepare: picture = prepare(frame)
            else: picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pix)
            tick = Fraction(1, 1000) if stamps else 1/Fraction(fps).limit_denominator(1001)
            picture.pts, picture.time_base = stamps[i] if stamps else i, tick
            mux(stream.encode(picture))
        mux(stream.encode())
    return path


def with_matrix(path, a, b, c, d):
    "Write a display matrix into the header of an mp4 or mov, as phones do; the pixels stay as they are."
    data = bytearray(path.read_bytes())
    at, one = data.index(b"tkhd") + 44, 1 << 16
    a, b, c, d = (round(x*one) for x in (a, b, c, d))
    data[at:at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def shown_by_hand(frame, a, b, c, d):
    "Where each stored pixel is shown, one by one."
    H, W = frame.shape[:2]
    places = {(a*p + c*q, b*p + d*q): frame[q, p] for p in range(W) for q in range(H)}
    left, top = (min(place[side] for place in places) for side in (0, 1))
    out = np.empty((H, W, 3) if a else (W, H, 3), np.uint8)
    for (x, y), value in places.items(): out[y - top, x - left] = value
    return out
