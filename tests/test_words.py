"""Layers without a module of their own, in chains of a checkpoint's layers: what they become, and that it's exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import real_numbers, whole_numbers
from live import done, error, load, run
from scipy import ndimage
from torch import Tensor

from convtool.core.compose import compose, compose_chain
from convtool.core.conv import Conv, conv
from convtool.core.forward import forward
from convtool.core.geometry import Geometry
from convtool.core.moves import Selection
from convtool.errors import RefusedError
from convtool.kinds.written import make_written


def words(texts: str, channels: int, axes: int = 2) -> list[Conv]:
    """The layers that the texts describe, one after the other."""
    made: list[Conv] = []
    for text in texts.split():
        made.append(make_written(text, made[-1].out_channels if made else channels, axes))
    return made


def layer(inner: int, outer: int, groups: int = 1, kernel: int = 3) -> Conv:
    weight = whole_numbers(1, outer, inner // groups, kernel, kernel)
    return Conv(weight, whole_numbers(2, outer), Geometry.of((kernel,) * 2, groups=groups))


def run_chain(chain: list[Conv], x: Tensor) -> Tensor:
    for one in chain:
        x = forward(one, x)
    return x


@pytest.mark.parametrize(
    ("channels", "before", "middle", "after", "groups"),
    [
        (4, "permute(2,0,3,1)", layer(4, 4, 4), "permute(1,3,0,2)", 4),  # there and back: depthwise again
        (4, "permute(2,0,3,1)", layer(4, 4, 4), "permute(3,2,1,0)", 1),
        (4, "permute(2,3,0,1)", layer(4, 4, 2), "permute(2,3,0,1)", 2),
        (6, "channel_shuffle(2)", layer(6, 6, 6), "channel_shuffle(3)", 6),
        (6, "channel_shuffle(2)", layer(6, 6, 6), "channel_unshuffle(2)", 6),
        (12, "channel_unshuffle(3)", layer(12, 12, 12), "channel_unshuffle(4)", 12),
        (4, "select(1:3)", layer(2, 4, 2), "select(0:2)", 1),
        (3, "pixel_unshuffle(2)", layer(12, 3), "permute(2,1,0)", 1),
        (2, "pixel_unshuffle(2)", layer(8, 6, 2), "channel_shuffle(1)", 2),
        (3, "focus()", layer(12, 4), "select(1:4)", 1),
        (4, "select(0:2)", layer(2, 3), "place(0:3;of=6)", 2),
        (4, "place(1:5;of=8)", layer(8, 8, 8), "select(1:5)", 4),
        (2, "permute(1,0)", layer(2, 2), "pixel_unshuffle(2)", 1),
    ],
)  # fmt: skip
def test_what_only_moves_numbers_composes_by_indexing(
    channels: int, before: str, middle: Conv, after: str, groups: int
) -> None:
    chain = [*words(before, channels), middle, *words(after, middle.out_channels)]
    x = whole_numbers(7, 2, channels, 10, 12)
    fused = compose_chain(chain)
    assert torch.equal(forward(fused, x), run_chain(chain, x))
    assert fused.geometry.groups == groups
    assert torch.equal(forward(compose(chain[0], middle), x), run_chain(chain[:2], x))
    y = whole_numbers(8, 1, middle.in_channels, 8, 6)
    assert torch.equal(forward(compose(middle, chain[2]), y), run_chain(chain[1:], y))


def test_what_makes_positions_of_channels_composes_with_what_comes_before_it() -> None:
    chain = [layer(2, 8), *words("permute(1,0,2,3,4,5,7,6) pixel_shuffle(2)", 8)]
    x = whole_numbers(7, 2, 2, 5, 6)
    linear = [one.without_bias() for one in chain]
    assert torch.equal(forward(compose_chain(linear), x), F.pixel_shuffle(run_chain(linear[:2], x), 2))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_selections_of_selections_are_selections(axes: int) -> None:
    chain = words("permute(2,0,1) focus() channel_shuffle(2) select(2:5) pixel_unshuffle(2)", 3, axes)
    one = compose_chain(chain)
    assert isinstance(one, Selection)
    x = whole_numbers(5, 2, 3, *(8, 4, 4)[:axes])
    assert torch.equal(forward(one, x), run_chain(chain, x))
    assert torch.equal(forward(Conv(one.weight, None, one.geometry), x), run_chain(chain, x))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_shuffling_pixels_over_any_number_of_axes_is_its_definition(axes: int) -> None:
    size, blocks = (4, 6, 2)[:axes], (2, 3, 1)[:axes]
    x = real_numbers(1, 2, 3, *size)
    text = f"({','.join(map(str, blocks))})"
    (down,) = words(f"pixel_unshuffle{text}", 3, axes)
    y = forward(down, x)
    split = [part for n, b in zip(size, blocks, strict=True) for part in (n // b, b)]
    outer, inner = [2 + 2 * n for n in range(axes)], [3 + 2 * n for n in range(axes)]
    assert torch.equal(y, x.reshape(2, 3, *split).permute(0, 1, *inner, *outer).reshape(y.shape))
    (up,) = words(f"pixel_shuffle{text}", y.shape[1], axes)
    assert torch.equal(forward(up, y), x)


def test_a_flatten_is_never_made() -> None:
    large = words("channel_shuffle(2) flatten(56,56)", 64)
    assert isinstance(compose_chain(large), Selection)  # 5 GB, were it made


def test_a_chain_that_ends_with_the_flattening_of_a_large_map_is_told_to_leave_it_out() -> None:
    chain = [layer(3, 64), *words("flatten(56,56)", 64)]
    with pytest.raises(RefusedError, match="leave the last of them out of the chain"):
        compose_chain(chain)


# --- at the command line


@pytest.fixture
def net(tmp_path: Path) -> Path:
    binomial = torch.tensor([1.0, 2, 1], dtype=torch.float64).outer(torch.tensor([1.0, 2, 1], dtype=torch.float64)) / 16
    state = {
        "c.weight": real_numbers(1, 8, 3, 3, 3),
        "c.bias": real_numbers(2, 8),
        "stem.weight": real_numbers(3, 4, 12, 3, 3),
        "blur.filt": binomial.repeat(8, 1, 1, 1),
        "blur.one": binomial,
        "ia.implicit": real_numbers(4, 1, 8, 1, 1),
        "im.implicit": real_numbers(5, 1, 8, 1, 1),
        "raw.k0": real_numbers(6, 5, 8, 1, 1),
        "raw.b0": real_numbers(7, 5),
        "raw.scale": real_numbers(8, 5, 1, 1, 1),
    }
    torch.save(state, tmp_path / "net.pt")
    return tmp_path / "net.pt"


def fused(net: Path, *words: object, name: str = "c") -> tuple[Conv, dict[str, Tensor], set[str]]:
    """What a chain becomes: the layer, the state before, and what is gone of it."""
    out = net.with_name("out.pt")
    geometry = net.with_name("plain.toml")
    geometry.write_text('"*" = { stride = 1, padding = 0, dilation = 1, groups = 1 }')
    (fusion,) = done("fuse", net, *words, "-o", out, "--force", "--geometry", geometry)["fusions"]
    assert run("verify", net, out)[0] == 0
    before, after = load(net), load(out)
    fields = {key: fusion["fields"][key] for key in ("stride", "padding", "dilation", "groups", "transposed")}
    made = conv(after[f"{name}.weight"], after.get(f"{name}.bias"), **fields)
    return made, before, before.keys() - after.keys()


def test_bgr_range_and_normalisation_become_part_of_the_first_layer(net: Path) -> None:
    chain = ("permute(2,1,0)", "normalize(mean=0.4,0.5,0.6; std=0.2,0.3,0.25; scale=1/255)", "c")
    made, state, gone = fused(net, *chain)
    x = real_numbers(9, 2, 3, 9, 7) * 100
    mean, std = (torch.tensor(v, dtype=torch.float64).reshape(-1, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25]))
    expected = F.conv2d((x.flip(1) / 255 - mean) / std, state["c.weight"], state["c.bias"])
    torch.testing.assert_close(forward(made, x), expected)
    assert not gone


def test_the_focus_stem_of_yolov5_is_one_6x6_convolution(net: Path) -> None:
    stated = ("--set", "stem.padding=1", "--set", "stem.stride=1", "--set", "stem.dilation=1")
    code, message = error("fuse", net, "focus()", "stem", *stated, "-o", net.with_name("no.pt"))
    assert (code, "sizes divisible by 2" in message) == (4, True)
    made, state, _ = fused(net, "focus()", "stem", *stated, "--input-size", "8,10", name="stem")
    assert made.geometry.kernel_size == (6, 6)
    assert made.geometry.stride == (2, 2)
    x = real_numbers(9, 2, 3, 8, 10)
    parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
    torch.testing.assert_close(forward(made, x), F.conv2d(torch.cat(parts, 1), state["stem.weight"], padding=1))


@pytest.mark.parametrize("word", ["kernel(blur.filt; stride=2)", "kernel(blur.one; stride=2; each)"])
def test_a_fixed_kernel_of_the_checkpoint_goes_into_the_layer_before_it(net: Path, word: str) -> None:
    made, state, gone = fused(net, "c", word)
    x = real_numbers(9, 2, 3, 9, 11)
    y = F.conv2d(x, state["c.weight"], state["c.bias"])
    torch.testing.assert_close(forward(made, x), F.conv2d(y, state["blur.filt"], stride=2, groups=8))
    assert gone == {"blur.filt" if "filt" in word else "blur.one"}


def test_a_bias_before_an_upsampling_stays_one_number(net: Path) -> None:
    made, state, _ = fused(net, "c", "upsample(2)")
    x = real_numbers(9, 2, 3, 9, 11)
    y = F.conv2d(x, state["c.weight"], state["c.bias"])
    torch.testing.assert_close(forward(made, x), F.interpolate(y, scale_factor=2.0))


def test_implicit_knowledge_is_an_offset_and_a_scale(net: Path) -> None:
    made, state, gone = fused(net, "c", "offset(ia.implicit)", "im.implicit")
    x = real_numbers(9, 2, 3, 9, 11)
    y = F.conv2d(x, state["c.weight"], state["c.bias"])
    torch.testing.assert_close(forward(made, x), (y + state["ia.implicit"]) * state["im.implicit"])
    assert gone == {"ia.implicit", "im.implicit"}


def test_raw_tensors_of_a_block_are_layers_by_their_names(net: Path) -> None:
    made, state, gone = fused(net, "c", "kernel(raw.k0)", "offset(raw.b0)", "raw.scale")
    x = real_numbers(9, 2, 3, 9, 11)
    y = F.conv2d(F.conv2d(x, state["c.weight"], state["c.bias"]), state["raw.k0"], state["raw.b0"])
    torch.testing.assert_close(forward(made, x), y * state["raw.scale"].reshape(-1, 1, 1))
    assert gone == {"raw.k0", "raw.b0", "raw.scale"}
    code, message = error("fuse", net, "c", "kernel(raw.k1)", "-o", net.with_name("no.pt"))
    assert (code, message) == (2, "kernel(raw.k1): no tensor 'raw.k1'; did you mean raw.k0 or raw.b0 or raw.scale?")


def test_a_raw_kernel_named_as_a_layer_is_told_how_it_is_written(net: Path) -> None:
    code, message = error("fuse", net, "c", "raw.k0", "-o", net.with_name("no.pt"))
    assert code == 3
    assert message.endswith("; a fixed kernel is written kernel(raw.k0), an offset offset(TENSOR)")
    code, message = error("fuse", net, "raw.k0", "raw.k1", "-o", net.with_name("no.pt"))
    assert code == 2
    code, message = error("fuse", net, "raw.k0", "raw.k0", "-o", net.with_name("no.pt"))
    assert (code, message.endswith("a tensor of it by itself is written kernel(raw.k0), or offset")) == (2, True)


def test_a_fused_layer_that_no_conv_could_load_is_refused(net: Path) -> None:
    padded = ("--set", "c.padding=1", "--set", "c.padding_mode=symmetric")
    code, message = error("fuse", net, "c", "scale(2)", *padded, "-o", net.with_name("no.pt"))
    assert (code, message.endswith("which no nn.Conv does")) == (4, True)


def test_symmetric_padding_is_that_of_scipy() -> None:
    kernel, x = real_numbers(1, 1, 1, 3, 5), real_numbers(2, 1, 1, 7, 8)
    found = forward(conv(kernel, padding=(1, 2), padding_mode="symmetric"), x)
    expected = ndimage.correlate(x[0, 0].numpy(), kernel[0, 0].numpy())  # whose default is this, called 'reflect'
    torch.testing.assert_close(found[0, 0], torch.from_numpy(expected))


def test_valid_is_no_padding(net: Path) -> None:
    (fusion,) = done("fuse", net, "c", "scale(2)", "--set", "c.padding=valid", "-o", net.with_name("out.pt"))["fusions"]
    assert fusion["fields"]["padding"] == [[0, 0], [0, 0]]


# --- stacks

STACK = """
[[fuse]]
name = "mix"
chain = [{ stack = [["select(0:2)", "left"], ["select(2:5)", "right.conv", "right.bn"]] }, "permute(4,1,2,3,0)", "mix"]
[geometry]
"right.bn" = { eps = 0.5 }
"*.conv" = { groups = 3 }
"""


def test_what_follows_a_stack_distributes_over_it(tmp_path: Path) -> None:
    state = {
        "left.weight": real_numbers(1, 2, 2, 3, 3),
        "left.bias": real_numbers(2, 2),
        "right.conv.weight": real_numbers(3, 3, 1, 3, 3),
        **{f"right.bn.{name}": real_numbers(4, 3).abs() for name in ("weight", "bias", "running_mean", "running_var")},
        "mix.weight": real_numbers(5, 4, 5, 1, 1),
    }
    before, after = tmp_path / "net.pt", tmp_path / "out.pt"
    torch.save(state, before)
    (tmp_path / "stack.toml").write_text(STACK)
    geometry = tmp_path / "plain.toml"
    geometry.write_text('"*" = { padding = 0, dilation = 1 }')
    stated = ("--geometry", geometry)
    document = done("fuse", before, "--recipe", tmp_path / "stack.toml", "--input-size", "5,8,9", *stated, "-o", after)
    assert done("verify", before, after)["equivalent"]
    made = load(after)
    x = real_numbers(6, 2, 5, 8, 9)
    mean, var, weight, bias = (state[f"right.bn.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
    right = F.batch_norm(F.conv2d(x[:, 2:], state["right.conv.weight"], groups=3), mean, var, weight, bias, eps=0.5)
    y = torch.cat([F.conv2d(x[:, :2], state["left.weight"], state["left.bias"]), right], 1)
    expected = F.conv2d(y[:, [4, 1, 2, 3, 0]], state["mix.weight"])
    torch.testing.assert_close(F.conv2d(x, made["mix.weight"], made["mix.bias"]), expected)
    assert set(made) == {"mix.weight", "mix.bias"}
    assert document["fusions"][0]["exact"]


def test_groups_of_stacked_slices_add_up(tmp_path: Path) -> None:
    state = {f"{name}.weight": real_numbers(n, 2, 2, 3, 3) for n, name in enumerate("abc")}
    before, after = tmp_path / "net.pt", tmp_path / "out.pt"
    torch.save(state, before)
    recipe = tmp_path / "stack.toml"
    recipe.write_text(
        '[[fuse]]\nname = "abc"\nstack = [["select(0:2)", "a"], ["select(2:4)", "b"], ["select(4:6)", "c"]]'
    )
    stated = [word for name in "abc" for word in ("--set", f"{name}.padding=0", "--set", f"{name}.dilation=1")]
    done("fuse", before, "--recipe", recipe, "--input-size", "6,8,9", *stated, "-o", after)
    made, x = load(after)["abc.weight"], real_numbers(6, 2, 6, 8, 9)
    assert made.shape == (6, 2, 3, 3)
    parts = [F.conv2d(part, state[f"{name}.weight"]) for name, part in zip("abc", x.chunk(3, 1), strict=True)]
    torch.testing.assert_close(F.conv2d(x, made, groups=3), torch.cat(parts, 1))
