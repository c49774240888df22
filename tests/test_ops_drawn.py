"""The ops against the reference at shapes that hypothesis draws, on every backend that serves here."""

import pytest
import torch
from cases import ACTS, DTYPES, Case
from test_ops import compare_with_reference

hypothesis = pytest.importorskip("hypothesis", reason="the package hypothesis is not installed")
st = hypothesis.strategies


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(data=st.data())
def test_drawn_shapes_against_reference(device, data):
    def draw_int(low, high):
        return data.draw(st.integers(low, high))

    op = data.draw(st.sampled_from(("depthwise", "pointwise", "stem")))
    kernel = data.draw(st.sampled_from((1, 2, 3, 4, 5, 7))) if op != "pointwise" else 1
    dilation = draw_int(1, 3) if op == "depthwise" else 1
    reach = dilation * (kernel - 1) + 1
    padding = tuple(draw_int(0, reach) for _ in range(4)) if op != "pointwise" else (0,) * 4
    height = draw_int(max(1, reach - padding[0] - padding[1]), reach + 8)
    width = draw_int(max(1, reach - padding[2] - padding[3]), reach + 18)
    case = Case(
        "drawn",
        op,
        (draw_int(1, 3), draw_int(1, 20), height, width),
        draw_int(1, 20),
        kernel,
        draw_int(1, 3) if op != "pointwise" else 1,
        padding,
        dilation,
        data.draw(st.sampled_from(("channels_last", "nchw", "sliced"))),
        data.draw(st.sampled_from(ACTS)),
    )
    hypothesis.note(str(case))
    torch.manual_seed(0)
    compare_with_reference(case, data.draw(st.sampled_from(DTYPES)), device)
