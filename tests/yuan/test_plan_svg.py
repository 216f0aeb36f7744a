"""Test the pictures of plans: valid XML, labels within their margins, and a timeline that is complete up to its cut."""

import dataclasses
import xml.etree.ElementTree as ElementTree

import pytest

from yuan.config import ModelConfig
from yuan.plan.json_fields import escape_text
from yuan.plan.plan_svg import LEFT_MARGIN_PX, LIMIT_COLOR, PICTURE_WIDTH_PX, RIGHT_MARGIN_PX, TERM_COLORS
from yuan.plan.planner import draw_plan, make_plan
from yuan.plan.pool_file import parse_pool
from yuan.plan.search import SizeLimits
from yuan.plan.workload import Workload

MODEL = ModelConfig(name="m", num_layers=24, hidden_size=1024, num_heads=16, vocab_size=32_000, seq_len=1024)
WORK = Workload(model=MODEL, seq_len=1024, global_batch_size=96, precision="bf16", loss_block=512)
LONG_NAME = 'H200 \x1b<b>"of & more</b> than any name'
MAX_CHAR_WIDTH = 0.65  # of a font's size, on average over a text
SVG = "{http://www.w3.org/2000/svg}"


def draw(counts, stages, batch=96):
    known = {"count": 1, "memory_gib": 100.0, "sustained_tflops": 400.0}
    groups = [{**(known if name == LONG_NAME else {}), "device_class": name, "count": n} for name, n in counts.items()]
    pool = parse_pool({"name": "a & <b>\n\x1b", "group": groups})
    work = dataclasses.replace(WORK, global_batch_size=batch)
    plan = make_plan(work, pool, SizeLimits(pipeline_size=stages, data_size=1, micro_batch_size=1), explained=False)
    return plan, ElementTree.fromstring(draw_plan(work, pool, plan))


def list_boxes(root):
    """Return fill, left and right edge, and title of every box that has a title."""
    boxes = [box for box in root.iter(f"{SVG}rect") if box.find(f"{SVG}title") is not None]
    edges = [(float(box.get("x")), float(box.get("x")) + float(box.get("width"))) for box in boxes]
    return [(box.get("fill"), *edge, box.find(f"{SVG}title").text) for box, edge in zip(boxes, edges, strict=True)]


@pytest.mark.parametrize(
    ("counts", "stages"),
    [
        ({"A100-80": 1}, 1),
        ({"A100-80": 24}, 24),
        ({"A100-80": 2, "L40S": 2, LONG_NAME: 2}, 6),
        ({"RTX-3090": 1, LONG_NAME: 1}, 2),
    ],
    ids=["one stage", "24 stages", "three classes", "a long name"],
)
def test_texts_and_boxes_lie_within_their_margins(counts, stages):
    plan, root = draw(counts, stages)
    texts = [(text, "".join(text.itertext())) for text in root.iter(f"{SVG}text")]
    for text, content in texts:
        title = text.find(f"{SVG}title")
        shown = content.removeprefix(title.text if title is not None else "")
        x_left, size = float(text.get("x")), float(text.get("font-size", 11))
        assert x_left + MAX_CHAR_WIDTH * size * len(shown) <= PICTURE_WIDTH_PX + 8, shown
        if x_left == 4 and ": " in shown:
            assert x_left + MAX_CHAR_WIDTH * size * len(shown) <= LEFT_MARGIN_PX + 8, shown
    for _, x_left, x_right, title in list_boxes(root):
        assert x_left + 0.1 >= LEFT_MARGIN_PX and x_right <= PICTURE_WIDTH_PX - RIGHT_MARGIN_PX + 0.3, title
    contents = [content for _, content in texts]
    assert {"GiB", "s", "forward", "backward, with recomputation", "limit of the device"} <= set(contents)
    assert all(any(escape_text(stage.device_class) in content for content in contents) for stage in plan.stages)


def test_a_term_has_one_color_in_every_picture_and_none_is_the_color_of_the_limit():
    for counts, stages in (({"A100-80": 1}, 1), ({"L40S": 4}, 4)):
        plan, root = draw(counts, stages)
        colors = {title.split(":")[0]: fill for fill, _, _, title in list_boxes(root) if title.endswith(" GiB")}
        assert len(colors) > 4
        assert all(colors[name] == TERM_COLORS[name.replace(" ", "_")] for name in colors)
        assert set(plan.stages[0].memory_terms) <= set(TERM_COLORS)
    assert LIMIT_COLOR not in TERM_COLORS.values() and len(set(TERM_COLORS.values())) == len(TERM_COLORS)


def test_a_long_timeline_is_cut_where_every_stage_is_complete_and_says_so():
    _, root = draw({"A100-80": 24}, 24, batch=960)
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    heading = next(text for text in texts if "of 960 micro-batches start" in text)
    num_shown = int(heading.split("in which ")[1].split()[0])
    assert {"cut here,", f"{960 - num_shown} more"} <= set(texts)
    passes = [box for box in list_boxes(root) if box[3].startswith("micro-batch")]
    rights = [x_right for _, _, x_right, _ in passes]
    # Near the cut the stages still take turns of both passes, as in the middle of the step.
    late = {fill for fill, x_left, _, _ in passes if x_left > max(rights) - 20}
    assert len(late) == 2 and max(rights) <= PICTURE_WIDTH_PX - RIGHT_MARGIN_PX + 0.3


def test_a_short_timeline_is_complete():
    _, root = draw({"A100-80": 4}, 4, batch=8)
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert any(text.startswith("One step: ") for text in texts) and "cut here," not in texts
    assert sum(box[3].startswith("micro-batch") for box in list_boxes(root)) == 2 * 4 * 8
