"""Buckets hold about as many pixels as their square, and each picture goes to the nearest."""
import math

import pytest
from hypothesis import given, settings, strategies as st

from sd_nb.data.buckets import bucket_of, make_buckets


@settings(max_examples=200, deadline=None)
@given(step=st.sampled_from([8, 32, 64]), times=st.integers(1, 20), aspect=st.floats(1, 4))
def test_buckets(step, times, aspect):
    """Sides are multiples of the step, no side could grow by a step, no shape is longer than allowed, and each lies and stands."""
    size = step * times
    buckets = make_buckets(size, step, aspect)
    assert (size, size) in buckets and {(h, w) for w, h in buckets} == set(buckets) and len(set(buckets)) == len(buckets)
    for w, h in buckets:
        assert w % step == h % step == 0 and max(w, h) <= aspect * min(w, h)
        assert w * h <= size**2 < max(w, h) * (min(w, h) + step)


@settings(max_examples=200, deadline=None)
@given(width=st.integers(1, 20000), height=st.integers(1, 20000))
def test_nearest_bucket(width, height):
    """No other bucket is nearer in aspect, by ratio; the longer side stays the longer one."""
    buckets = make_buckets(512)
    far = lambda w, h: abs(math.log(w / h) - math.log(width / height))
    chosen = bucket_of(width, height, buckets)
    assert far(*chosen) <= min(far(*other) for other in buckets) + 1e-9
    assert (chosen[0] - chosen[1]) * (width - height) >= 0


def test_published_buckets():
    """The shapes for 512 are these, and impossible sizes are named."""
    assert make_buckets(512) == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    for size, step, aspect in ((500, 64, 2), (32, 64, 2), (512, 0, 2), (512, 64, 0.5)):
        with pytest.raises(ValueError): make_buckets(size, step, aspect)
