"""Images, videos and prompts on their way to the processor."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch
from battery import draw_image, user
from hypothesis import given
from hypothesis import strategies as st

from visionselector_eval.baselines import InputError, build
from visionselector_eval.models.backbones.tower import received_attention
from visionselector_eval.models.generation import cut, generation_arguments, kv_cache
from visionselector_eval.models.inputs import (
    MediaSettings,
    build_inputs,
    frame_indices,
    prepare_image,
    read_image,
    read_video,
)
from visionselector_eval.models.protocols import PROTOCOLS, media_fields


@given(
    st.integers(1, 500), st.sampled_from([1.0, 10.0, 24.0, 29.97]), st.integers(1, 64), st.none() | st.floats(0.1, 30)
)
def test_frames_are_never_repeated(total, rate, most, fps):
    chosen = frame_indices(total, rate, most, fps)
    assert chosen == sorted(set(chosen))
    assert 1 <= len(chosen) <= min(total, most)
    assert len(chosen) == 1 or len(chosen) % 2 == 0
    assert 0 <= chosen[0] <= chosen[-1] < total
    if fps is None and min(total, most) > 1:
        assert (chosen[0], chosen[-1]) == (0, total - 1)


def write_video(path, frames: int, rate: int = 10):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 112, 84, "yuv420p"
        for i in range(frames):
            image = np.full((84, 112, 3), 10 * i % 250, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def test_a_video_gives_its_frames_and_their_times(tmp_path):
    write_video(tmp_path / "clip.mp4", 25)
    frames, about = read_video(tmp_path / "clip.mp4", MediaSettings(max_num_frames=5))
    assert frames.shape == (4, 84, 112, 3)
    assert about == {"fps": 10.0, "frames_indices": [0, 8, 16, 24], "total_num_frames": 25}
    assert [abs(int(f.mean()) - 10 * i) <= 4 for f, i in zip(frames, about["frames_indices"], strict=True)] == [
        True
    ] * 4
    short, about = read_video(tmp_path / "clip.mp4", MediaSettings(max_num_frames=768, fps=2.0))
    assert len(short) == len(about["frames_indices"]) == 4


def test_bad_media_is_one_clear_line(tmp_path):
    (tmp_path / "fake.mp4").write_bytes(b"no video")
    (tmp_path / "fake.png").write_bytes(b"no image")
    for path, read in (
        (tmp_path / "absent.mp4", lambda p: read_video(p, MediaSettings())),
        (tmp_path / "fake.mp4", lambda p: read_video(p, MediaSettings())),
        (tmp_path / "absent.png", read_image),
        (tmp_path / "fake.png", read_image),
    ):
        with pytest.raises(InputError, match=path.name) as caught:
            read(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="pixel bounds"):
        MediaSettings(min_pixels=100, max_pixels=50)


def test_pixel_bounds_and_system_prompt_reach_the_prompt(tiny):
    conversation = [user(draw_image(224, 224), "What?")]
    tokens = []
    for settings in (MediaSettings(), MediaSettings(max_pixels=16 * 784), MediaSettings(min_pixels=100 * 784)):
        inputs = build_inputs(tiny.processor, conversation, settings)
        tokens.append(int(inputs["image_grid_thw"].prod() // 4))
    assert tokens == [64, 16, 100]
    text = tiny.processor.tokenizer.decode(
        build_inputs(tiny.processor, conversation, MediaSettings(system_prompt="Be brief."))["input_ids"][0]
    )
    assert text.count("system") == 1
    assert "Be brief." in text


def test_generation_settings():
    assert generation_arguments({"until": ["\n"], "temperature": 0, "top_p": 1.0, "image_aspect_ratio": "pad"}) == {
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "do_sample": False,
        "max_new_tokens": 128,
        "num_beams": 1,
    }
    assert generation_arguments({"temperature": 0.7, "max_new_tokens": 4})["do_sample"] is True
    assert generation_arguments({"do_sample": True, "temperature": 0})["do_sample"] is False
    assert cut("one\n\ntwo. three", ["\n\n", "."]) == "one"


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 1000))
def test_received_attention_equals_the_naive_form(lengths, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(sum(lengths), heads, 8, generator=generator, dtype=torch.float64) for _ in "qk")
    naive, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        attention = (torch.einsum("qhd,khd->hqk", q[rows], k[rows]) * 8**-0.5).softmax(-1)
        naive.append(attention.mean(0).sum(0))
        start += length
    got = received_attention(q, k, lengths, 8**-0.5)
    assert torch.allclose(got, torch.cat(naive), atol=1e-12)


def test_received_attention_holds_no_square(monkeypatch):
    """In chunks of any size the result is the same, and no array of N x N appears."""
    from visionselector_eval.models.backbones import tower

    q, k = torch.randn(600, 2, 8), torch.randn(600, 2, 8)
    whole = received_attention(q, k, [600], 0.3)
    monkeypatch.setattr(tower, "_CHUNK_WEIGHTS", 5000)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        chunked = received_attention(q, k, [600], 0.3)
    assert torch.allclose(whole, chunked, atol=1e-5)
    assert largest < 600 * 600 / 10


def test_traces_come_back_in_raster_order(tiny):
    """Window order round trip: per-patch quantities of an image land on their own token."""
    inputs = tiny.to_device(
        build_inputs(tiny.processor, [user(draw_image(252, 308), draw_image(140, 196, 1), "What?")], MediaSettings())
    )
    encoded = tiny.encode(inputs)
    visual = tiny.model.model.visual
    seen = {}
    handle = visual.blocks[-1].attn.register_forward_pre_hook(
        lambda m, a, kw: seen.update(hidden=a[0] if a else kw["hidden_states"], rope=kw["position_embeddings"]),
        with_kwargs=True,
    )
    try:
        tiny.encode(inputs, frozenset())
    finally:
        handle.remove()
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
    from transformers.vision_utils import get_vision_window_index

    index, _ = get_vision_window_index(inputs["image_grid_thw"], 2, 112, 14)
    heads, size_of = visual.blocks[-1].attn.num_heads, visual.blocks[-1].attn.head_dim
    q, k, _ = visual.blocks[-1].attn.qkv(seen["hidden"]).reshape(len(seen["hidden"]), 3, heads, -1).unbind(1)
    q, k = apply_rotary_pos_emb_vision(q, k, *seen["rope"])
    sizes = inputs["image_grid_thw"].prod(1).tolist()
    naive, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        naive.append((torch.einsum("qhd,khd->hqk", q[rows], k[rows]) * size_of**-0.5).softmax(-1).mean(0).sum(0))
        start += size
    raster = torch.cat(naive).view(-1, 4).mean(1)[torch.argsort(index)]
    keys = k.view(len(index), 4, heads, -1).mean((1, 2))[torch.argsort(index)]
    got = torch.cat([item.trace.received for item in encoded.rows[0]])
    assert torch.allclose(got, raster, rtol=1e-4, atol=1e-5)
    assert torch.allclose(torch.cat([item.trace.keys for item in encoded.rows[0]]), keys, atol=1e-5)


def test_prompts_that_do_not_fit_their_images_are_refused(tiny):
    inputs = build_inputs(tiny.processor, [user(draw_image(112, 112), "What?")], MediaSettings())
    cut_short = {**inputs, "input_ids": inputs["input_ids"][:, 12:], "attention_mask": inputs["attention_mask"][:, 12:]}
    ids = inputs["input_ids"].clone()
    ids[ids == tiny.model.config.image_token_id] = 5
    right = {**inputs, "attention_mask": torch.cat([inputs["attention_mask"][:, 1:], torch.zeros(1, 1).long()], 1)}
    for wrong, message in (
        (cut_short, "placeholders"),
        ({**inputs, "input_ids": ids}, "placeholders for 0"),
        (right, "left"),
    ):
        with pytest.raises(InputError, match=message):
            tiny.prefill(wrong, build("full"), 1.0)


def test_the_published_frame_sampling_repeats_frames_of_short_clips(tmp_path):
    """32 of 2-a-second frames by index, first and last included, and a clock of 2 a second."""
    write_video(tmp_path / "clip.mp4", 25)  # 2.5 s: five frames at 2 a second, of which four are taken
    frames, about = read_video(tmp_path / "clip.mp4", MediaSettings(max_num_frames=8, repeat_frames=True))
    assert len(frames) == 8
    assert about == {"fps": 2.0, "frames_indices": list(range(8)), "total_num_frames": 8}
    distinct = {int(f.mean()) for f in frames}
    assert len(distinct) == 4
    once, _ = read_video(tmp_path / "clip.mp4", MediaSettings(max_num_frames=8))
    assert len({int(f.mean()) for f in once}) == 8


def test_protocols_change_the_image():
    image = draw_image(112, 168)
    assert prepare_image(image, MediaSettings()) is image
    again = prepare_image(image, MediaSettings(jpeg=True))
    assert again.size == image.size
    assert np.asarray(again).tolist() != np.asarray(image).tolist()
    square = prepare_image(image, MediaSettings(pad_square=True))
    assert square.size == (168, 168)
    assert square.getpixel((0, 0)) == (122, 116, 104)
    assert np.array_equal(np.asarray(square)[28:140], np.asarray(image))


def test_protocols_by_name():
    assert media_fields("checkpoint") == {}
    assert media_fields("visionselector", {"jpeg": None})["jpeg"] is True
    own = media_fields("visionselector", {"max_pixels": 300_000, "jpeg": False})
    assert (own["max_pixels"], own["video_max_pixels"], own["jpeg"]) == (300_000, 300_000, False)
    large = media_fields("lmms_eval", {"max_pixels": 3_000_000})
    assert (large["max_pixels"], large["video_max_pixels"]) == (3_000_000, 602_112)
    raised = media_fields("lmms_eval", {"min_pixels": 700_000})
    assert (raised["min_pixels"], raised["video_min_pixels"], raised["video_max_pixels"]) == (700_000,) * 3
    assert media_fields("square_896", {"jpeg": True}) == {"side": 896, "jpeg": True}
    assert "side" not in media_fields("square_896", {"max_pixels": 300_000})
    for name in PROTOCOLS:
        MediaSettings(**media_fields(name))
    with pytest.raises(InputError, match="did you mean 'lossless'"):
        media_fields("losless")


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_is_found_under_the_name_of_either_transformers(name: str):
    held = object()
    assert kv_cache({name: held, "use_cache": True}) is held
    assert kv_cache({name: None}) is None
    assert kv_cache({}) is None
