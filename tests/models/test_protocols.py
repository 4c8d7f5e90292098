"""Protocols: the sizes, frames, prompts and stop strings that they promise, at every door."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
import yaml
from battery import user
from PIL import Image
from test_inputs import write_video

from visionselector_eval.baselines import InputError
from visionselector_eval.models.generation import cut, named_stops
from visionselector_eval.models.inputs import (
    MediaSettings,
    build_inputs,
    frame_indices,
    largest_frame,
    prepare_image,
    published_frame_indices,
    read_image,
    read_video,
    sampled_frames,
    whole_tokens,
)
from visionselector_eval.models.protocols import PROTOCOLS, media_fields, new_tokens


def settings(protocol: str, **fields: Any) -> MediaSettings:
    return MediaSettings(**media_fields(protocol, fields))


def shown(processor: Any, part: dict[str, Any], protocol: str, **fields: Any) -> tuple[int, int, int]:
    """Frames by two, and height and width in tokens, of the one image or clip of a prompt."""
    conversation = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
    inputs = build_inputs(processor, [conversation], settings(protocol, **fields))
    t, h, w = inputs["image_grid_thw" if part["type"] == "image" else "video_grid_thw"][0].tolist()
    return t, h // 2, w // 2


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    made = np.random.default_rng(0).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(made)


def clip(width: int, height: int, frames: int = 4, **about: int) -> dict[str, Any]:
    made = np.zeros((frames, height, width, 3), dtype=np.uint8)
    metadata = {"fps": 2.0, "frames_indices": list(range(frames)), "total_num_frames": frames}
    return {"type": "video", "video": (made, {**metadata, **about})}


# frames --------------------------------------------------------------------------------------------------------------


def test_a_frame_under_lmms_eval_has_at_most_768_tokens(tiny):
    assert whole_tokens(1080, 1920, 28, 200_704, largest_frame(32, 28, 200_704, 602_112)) == (560, 1008)
    assert len(frame_indices(40, 30.0, 32, None)) == 32
    assert shown(tiny.processor, clip(1920, 1080), "lmms_eval") == (2, 20, 36)


@pytest.mark.parametrize(("sampled", "cap", "tokens"), [(300, 602_112, 720), (600, 301_056, 364), (768, 235_200, 276)])
def test_a_frame_under_visionselector_depends_on_the_length_of_the_clip(sampled, cap, tokens, tiny):
    assert sampled_frames(15 * sampled, 30.0) == sampled
    fields = media_fields("visionselector")
    assert largest_frame(sampled, 28, fields["video_min_pixels"], fields["video_max_pixels"]) == cap
    t, h, w = shown(tiny.processor, clip(1280, 720, sharing=sampled), "visionselector")
    assert (t, h * w) == (2, tokens)


def test_the_smallest_cap_of_a_frame():
    assert largest_frame(10_000, 28, 200_704, 602_112) == 210_739


def test_who_shares_the_pixels_of_a_clip(tmp_path):
    """The frames that are shown, or those that two a second would be."""
    write_video(tmp_path / "clip.mp4", 95)
    _, about = read_video(tmp_path / "clip.mp4", settings("lmms_eval"))
    assert about["sharing"] == len(about["frames_indices"]) == 32
    for repeated in (False, True):
        frames, about = read_video(tmp_path / "clip.mp4", settings("visionselector", repeat_frames=repeated))
        assert (about["sharing"], len(frames)) == (18, 32)
    assert "sharing" not in read_video(tmp_path / "clip.mp4", settings("checkpoint"))[1]


def test_two_clips_of_a_batch_have_bounds_of_their_own(tiny):
    conversations = [
        [{"role": "user", "content": [clip(1280, 720, sharing=n), {"type": "text", "text": "What?"}]}]
        for n in (300, 768)
    ]
    grids = build_inputs(tiny.processor, conversations, settings("visionselector"))["video_grid_thw"]
    assert [int(t * h * w) // 4 for t, h, w in grids] == [2 * 720, 2 * 276]


@pytest.mark.parametrize(
    ("total", "rate", "most", "count"), [(31, 10.0, 32, 30), (200, 25.0, 31, 30), (3, 10.0, 32, 2), (1, 10.0, 32, 1)]
)
def test_frames_are_even_in_number(total, rate, most, count):
    assert len(frame_indices(total, rate, most, None)) == count


def test_published_sampling_of_short_clips():
    assert Counter(published_frame_indices(30, 30.0, 32)) == {0: 11, 10: 10, 19: 10, 29: 1}
    assert sorted(set(published_frame_indices(10, 25.0, 32))) == [0, 3, 6, 9]
    assert sorted(set(published_frame_indices(135, 30.0, 32))) == [0, 19, 38, 57, 77, 96, 115, 134]
    assert published_frame_indices(1, 25.0, 4) == [0, 0, 0, 0]


# images ------------------------------------------------------------------------------------------------------------


def test_lmms_eval_resizes_a_image_twice(tiny):
    """To whole tokens near its own size, and then into bounds: another shape than in one step."""
    part = {"type": "image", "image": noise(900, 30)}
    assert shown(tiny.processor, part, "lmms_eval") == (1, 3, 91)
    assert shown(tiny.processor, part, "visionselector") == (1, 3, 88)
    for width, height in ((30, 900), (3000, 2000), (1920, 1080), (500, 333)):
        first = whole_tokens(height, width, 28, 4 * 784, 16384 * 784)
        h, w = whole_tokens(*first, 28, 256 * 784, 2048 * 784)
        part = {"type": "image", "image": noise(width, height)}
        assert shown(tiny.processor, part, "lmms_eval") == (1, h // 28, w // 28)


def test_transparent_parts_are_white_where_lmms_eval_makes_them_white(tiny):
    clear = noise(56, 56, "RGBA")
    clear.putalpha(0)
    assert np.asarray(read_image(clear, on_white=True)).min() == 255
    assert np.array_equal(np.asarray(read_image(clear)), np.asarray(clear)[..., :3])
    white = Image.new("RGB", (56, 56), "white")
    for protocol, same in (("lmms_eval", True), ("checkpoint", False)):
        pixels = [build_inputs(tiny.processor, [user(p, "What?")], settings(protocol)) for p in (clear, white)]
        assert bool((pixels[0]["pixel_values"] == pixels[1]["pixel_values"]).all()) is same


@pytest.mark.parametrize(
    ("protocol", "tokens", "side"), [("square_1008", 1296, 36), ("square_896", 1024, 32), ("llava_stf", 144, 12)]
)
def test_fixed_resolutions(protocol, tokens, side, tiny):
    """Whatever the size: by bounds alone, squares of 38 or of 57 px would come out a token larger."""
    for width, height in ((38, 38), (57, 57), (640, 480), (100, 1001), (1008, 1008)):
        assert shown(tiny.processor, {"type": "image", "image": noise(width, height)}, protocol) == (1, side, side)
    assert side * side == tokens
    wide = prepare_image(noise(60, 30), settings(protocol))
    assert wide.size == ((60, 30) if protocol == "square_896" else (60, 60))


def test_a_tower_of_one_size_resizes_by_itself(llava):
    image = noise(50, 80)
    for protocol in ("lmms_eval", "visionselector", "square_896"):
        plain = settings(protocol, jpeg=False, system_prompt="")
        made = build_inputs(llava.processor, [user(image, "What?")], plain)["pixel_values"]
        assert made.equal(build_inputs(llava.processor, [user(image, "What?")], MediaSettings())["pixel_values"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"side": 0}, "invalid side=0: expected "),
        ({"pillow_resize": "round"}, "unknown pillow_resize 'round': did you mean 'rounded'"),
        ({"share_pixels": "show"}, "unknown share_pixels 'show': did you mean 'shown'"),
    ],
)
def test_wrong_settings_are_one_clear_line(fields, message):
    with pytest.raises(InputError, match=message):
        MediaSettings(**fields)


def test_a_strip_of_a_image_is_one_clear_line(tiny):
    with pytest.raises(InputError, match="9000x12 pixels is more than 200 times as long as wide"):
        build_inputs(tiny.processor, [user(noise(9000, 12), "What?")], settings("lmms_eval"))


# stop strings --------------------------------------------------------------------------------------------------------


def test_only_stop_strings_that_a_task_names_cut():
    from lmms_eval.api.task import TaskConfig

    def stops(text: str) -> tuple[str, ...]:
        config = TaskConfig(**yaml.safe_load(text))
        generation = copy.deepcopy(config.generation_kwargs)  # as each request gets it
        return named_stops(generation["until"], config.fewshot_delimiter)

    answer = "The text in the image is:\n\nHELLO"
    for silent in ("{}", "generation_kwargs: {max_new_tokens: 5}", "{fewshot_delimiter: '. ', generation_kwargs: {}}"):
        assert stops(silent) == ()
        assert cut(answer, stops(silent)) == answer
    assert stops("generation_kwargs: {until: ['ASSISTANT:']}") == ("ASSISTANT:",)
    assert cut("yes ASSISTANT: no", stops("generation_kwargs: {until: 'ASSISTANT:'}")) == "yes "
    # As mmmu_val_pass64 does: the text that is filled in where tasks name none, and named.
    assert stops('generation_kwargs: {until: ["\\n\\n"]}') == ("\n\n",)
    assert stops("generation_kwargs: {until: []}") == ()
    assert named_stops(None) == ()


# limits --------------------------------------------------------------------------------------------------------------


def test_a_protocol_replaces_the_tasks_own_limit_and_no_other():
    for task in ("mmmu_val", "tiny_mmmu_val"):
        assert new_tokens("visionselector", task, {"max_new_tokens": 128, "do_sample": False}) == {
            "max_new_tokens": 16,
            "do_sample": False,
        }
        for asked in ({"max_new_tokens": 64}, {}):
            assert new_tokens("visionselector", task, asked) == asked
        for name in set(PROTOCOLS) - {"visionselector"}:
            assert new_tokens(name, task, {"max_new_tokens": 128}) == {"max_new_tokens": 128}
    assert new_tokens("visionselector", "pope", {"max_new_tokens": 128}) == {"max_new_tokens": 128}
