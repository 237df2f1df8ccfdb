"""Adapters merged into the layers that they change, against the trainers' formulas written out in float64."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import real_numbers
from live import done, error, load, run
from safetensors.torch import load_file, save_file
from shell import cli
from torch import Tensor

RANK, ALPHA = 2, 3.0
Parts = dict[str, Tensor]
LAYERS = {
    "down.0.lin": (6, 8),  # a linear layer
    "down.1.conv": (6, 4, 3, 2),
    "up.dw.conv": (6, 2, 3, 3),  # of three groups
    "up.one": (6, 4, 1, 1),
    "mid.seq": (5, 4, 3),
}


def numbers(name: str, *shape: int) -> Tensor:
    return real_numbers(sum(map(ord, name)), *shape)


def lora(name: str, shape: tuple[int, ...]) -> tuple[Parts, Tensor]:
    down, up = numbers(f"{name}d", RANK, *shape[1:]), numbers(f"{name}u", shape[0], RANK, *(1,) * (len(shape) - 2))
    change = torch.einsum("or,ri...->oi...", up.flatten(1), down) * ALPHA / RANK
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(ALPHA)}, change


def lora_with_a_core(name: str, shape: tuple[int, ...]) -> tuple[Parts, Tensor]:
    core = numbers(f"{name}m", RANK, RANK, *shape[2:])
    ones = (1,) * (len(shape) - 2)
    down, up = numbers(f"{name}d", RANK, shape[1], *ones), numbers(f"{name}u", shape[0], RANK, *ones)
    change = torch.einsum("pi,ij...,jr->pr...", up.flatten(1), core, down.flatten(1)) * ALPHA / RANK
    parts = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": core, "alpha": torch.tensor(ALPHA)}
    return parts, change


def loha(name: str, shape: tuple[int, ...]) -> tuple[Parts, Tensor]:
    width = int(torch.tensor(shape[1:]).prod())
    a1, a2 = numbers(f"{name}1", shape[0], RANK), numbers(f"{name}2", shape[0], RANK)
    b1, b2 = numbers(f"{name}3", RANK, width), numbers(f"{name}4", RANK, width)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(ALPHA)}
    return parts, ((a1 @ b1) * (a2 @ b2)).reshape(shape) * ALPHA / RANK


def loha_with_cores(name: str, shape: tuple[int, ...]) -> tuple[Parts, Tensor]:
    parts, changes = {"alpha": torch.tensor(ALPHA)}, []
    for n in (1, 2):
        t = numbers(f"{name}t{n}", RANK, RANK, *shape[2:])
        a, b = numbers(f"{name}a{n}", RANK, shape[0]), numbers(f"{name}b{n}", RANK, shape[1])
        parts |= {f"hada_t{n}": t, f"hada_w{n}_a": a, f"hada_w{n}_b": b}
        changes.append(torch.einsum("ij...,jr,ip->pr...", t, b, a))
    return parts, changes[0] * changes[1] * ALPHA / RANK


def kron(one: Tensor, other: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Entry [a*p + i, b*q + j, ...] is one[a, b] * other[i, j, ...]."""
    made = torch.einsum("ab,ij...->aibj...", one, other)
    return made.reshape(shape)


def lokr(name: str, shape: tuple[int, ...]) -> tuple[Parts, Tensor]:
    one = numbers(f"{name}1", 1, 2)
    a, b = numbers(f"{name}a", shape[0], RANK), numbers(f"{name}b", RANK, int(torch.tensor(shape[1:]).prod()) // 2)
    other = (a @ b).reshape(shape[0], shape[1] // 2, *shape[2:])
    parts = {"lokr_w1": one, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(ALPHA)}
    return parts, kron(one, other, shape) * ALPHA / RANK


def lokr_with_a_core(name: str, shape: tuple[int, ...]) -> tuple[Parts, Tensor]:
    one_a, one_b = numbers(f"{name}1", 1, RANK), numbers(f"{name}2", RANK, 2)
    a, b = numbers(f"{name}a", RANK, shape[0]), numbers(f"{name}b", RANK, shape[1] // 2)
    t = numbers(f"{name}t", RANK, RANK, *shape[2:])
    other = torch.einsum("ij...,jr,ip->pr...", t, b, a)
    parts = {"lokr_w1_a": one_a, "lokr_w1_b": one_b, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t}
    return parts | {"alpha": torch.tensor(ALPHA)}, kron(one_a @ one_b, other, shape) * ALPHA / RANK


def lokr_of_two_whole_factors(name: str, shape: tuple[int, ...]) -> tuple[Parts, Tensor]:
    one, other = numbers(f"{name}1", 1, 2), numbers(f"{name}2", shape[0], shape[1] // 2, *shape[2:])
    return {"lokr_w1": one, "lokr_w2": other, "alpha": torch.tensor(ALPHA)}, kron(one, other, shape)  # alpha ignored


def difference(name: str, shape: tuple[int, ...]) -> tuple[Parts, Tensor]:
    change = numbers(name, *shape)
    return {"diff": change, "alpha": torch.tensor(ALPHA)}, change


@pytest.fixture
def base(tmp_path: Path) -> Path:
    state = {f"{name}.weight": real_numbers(n, *shape) for n, (name, shape) in enumerate(LAYERS.items())}
    state["down.1.conv.bias"] = real_numbers(9, 6)
    torch.save(state, tmp_path / "base.pt")
    return tmp_path / "base.pt"


def merge(base: Path, adapters: Parts, *words: object, name: str = "x.pt") -> Parts:
    """The base with the adapters merged; the record is verified too."""
    torch.save(adapters, base.with_name(name))
    out, source = base.with_name("out.pt"), ("--with", f"x={base.with_name(name)}")
    done("fuse", base, *source, *words, "-o", out, "--force")
    assert done("verify", base, out, *source)["equivalent"]
    return load(out)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


MADE = [lora, lora_with_a_core, loha, loha_with_cores, lokr, lokr_with_a_core, lokr_of_two_whole_factors, difference]


@pytest.mark.parametrize("made", MADE)
def test_an_adapter_counts_as_the_tensors_that_it_is(
    base: Path, made: Callable[[str, tuple[int, ...]], tuple[Parts, Tensor]]
) -> None:
    parts, _ = made("down.1.conv", LAYERS["down.1.conv"])
    torch.save({f"lora_unet_down_1_conv.{part}": tensor for part, tensor in parts.items()}, base.with_name("x.pt"))
    words = ("fuse", base, "--with", f"x={base.with_name('x.pt')}", "-o", base.with_name("out.pt"))
    document = done(*words)
    own = sum(tensor.numel() for part, tensor in parts.items() if part != "alpha")
    (fusion,) = document["fusions"]
    assert fusion["parameters"] == {"before": 6 * 4 * 3 * 2 + 6 + own, "after": 6 * 4 * 3 * 2 + 6}
    assert (fusion["multiply_adds"], document["total"]["multiply_adds"]) == (None, None)


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_every_form_on_every_kind_of_layer(
    base: Path, made: Callable[[str, tuple[int, ...]], tuple[Parts, Tensor]], strength: float
) -> None:
    adapters: Parts = {}
    expected, before = {}, load(base)
    for name, shape in LAYERS.items():
        parts, change = made(name, shape)
        adapters |= {f"lora_unet_{name.replace('.', '_')}.{part}": tensor for part, tensor in parts.items()}
        expected[f"{name}.weight"] = before[f"{name}.weight"] + strength * change
    stated = ["--set", "up.dw.conv.groups=3", "--set", "down.1.conv.stride=2", "--set", "down.1.conv.padding=1"]
    found = merge(base, adapters, "--strength", strength, *stated)
    assert found.keys() == before.keys()
    for name, tensor in expected.items():
        same(found[name], tensor)
    same(found["down.1.conv.bias"], before["down.1.conv.bias"])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", LAYERS)
def test_dora_of_lycoris(base: Path, name: str, axis: int) -> None:
    before, shape = load(base)[f"{name}.weight"], LAYERS[name]
    parts, change = lora(name, shape)
    m = numbers("m", *(size if number == axis else 1 for number, size in enumerate(shape))).abs()
    path = f"lora_unet_{name.replace('.', '_')}"
    found = merge(base, {f"{path}.{part}": tensor for part, tensor in (parts | {"dora_scale": m}).items()})
    changed = before + change
    norm = changed.transpose(0, axis).flatten(1).norm(dim=1).reshape(m.shape) + torch.finfo(torch.float64).eps
    same(found[f"{name}.weight"], m * changed / norm)
    half = merge(
        base, {f"{path}.{part}": tensor for part, tensor in (parts | {"dora_scale": m}).items()}, "--strength", 0.5
    )
    same(half[f"{name}.weight"], (before + m * changed / norm) / 2)
    code, message = error("fuse", base, "--with", f"x={base.with_name('x.pt')}", "--strength", -1, "-o", "no.pt")
    assert (code, "a DoRA isn't taken out again by a negative strength" in message) == (4, True)


def test_peft_keeps_alpha_and_rank_in_a_file_of_its_own(base: Path) -> None:
    adapters: Parts = {}
    before = load(base)
    for name in ("down.0.lin", "up.one"):
        parts, _ = lora(name, LAYERS[name])
        path = f"base_model.model.{name}"
        adapters |= {
            f"{path}.lora_A.weight": parts["lora_down.weight"],
            f"{path}.lora_B.weight": parts["lora_up.weight"],
        }
    adapters["base_model.model.up.one.lora_magnitude_vector.weight"] = m = numbers("m", 1, 6, 1, 1).abs()
    torch.save(adapters, base.with_name("x.pt"))
    source = ("--with", f"x={base.with_name('x.pt')}")
    code, message = error("fuse", base, *source, "-o", base.with_name("no.pt"))
    assert (code, "PEFT keeps alpha in adapter_config.json" in message) == (2, True)
    config = {"r": RANK, "lora_alpha": 16, "use_rslora": True, "alpha_pattern": {"up.one": 5}}
    base.with_name("adapter_config.json").write_text(json.dumps(config))
    found = merge(base, adapters)
    document = done("fuse", base, *source, "-o", base.with_name("again.pt"))
    assert [(one["source"], one["modules"], *one["scaling"].values()) for one in document["adapters"]] == [
        ("x", 1, 16, RANK, 16 / RANK**0.5),
        ("x", 1, 5, RANK, 5 / RANK**0.5),
    ]
    change = {name: lora(name, LAYERS[name])[1] / ALPHA * RANK for name in ("down.0.lin", "up.one")}
    same(found["down.0.lin.weight"], before["down.0.lin.weight"] + change["down.0.lin"] * 16 / RANK**0.5)
    changed = before["up.one.weight"] + change["up.one"] * 5 / RANK**0.5
    same(found["up.one.weight"], m.reshape(6, 1, 1, 1) * changed / changed.flatten(1).norm(dim=1).reshape(6, 1, 1, 1))


def test_alpha_and_rank_are_said(base: Path) -> None:
    parts = {
        f"{name}.{part}": tensor
        for name in ("up.one", "up.dw.conv")
        for part, tensor in lora(name, LAYERS[name])[0].items()
    }
    parts |= {
        f"down.0.lin.{part}": tensor for part, tensor in difference("down.0.lin", LAYERS["down.0.lin"])[0].items()
    }
    torch.save(parts, base.with_name("x.pt"))
    said = cli(f"fuse {base} --with x={base.with_name('x.pt')} --strength 0.5 -o {base.with_name('out.pt')}")
    assert "\nx: 2 modules, alpha 3 / rank 2 = 1.5\n" in said.out
    assert "\nx: 1 module, no alpha in the file\n" in said.out
    assert said.err == "it loads as before: the model's code stays as it is\n"
    assert cli(f"fuse {base} --with x={base.with_name('x.pt')} -o {base.with_name('no.pt')} --dry-run").err == ""
    shown = cli(f"inspect {base.with_name('x.pt')}").out
    assert re.search(r"up\.one +lora +6x2x1x1 .* alpha 3 / rank 2 = 1\.5\n", shown)


@pytest.mark.parametrize(
    ("before", "down", "up"),
    [
        ("unet.", "lora_A.weight", "lora_B.weight"),  # diffusers
        ("", "lora.down.weight", "lora.up.weight"),
        ("transformer.", "lora_A.default.weight", "lora_B.default.weight"),
        ("lora_te1_", "lora_down.weight", "lora_up.weight"),  # kohya's SDXL
        ("lora_transformer_", "lora_down.weight", "lora_up.weight"),
        ("lycoris_", "lora_down.weight", "lora_up.weight"),
        ("diffusion_model.", "lora_A.weight", "lora_B.weight"),
    ],
)
def test_names_of_trainers(base: Path, before: str, down: str, up: str) -> None:
    parts, change = lora("down.1.conv", LAYERS["down.1.conv"])
    path = before + ("down_1_conv" if before.endswith("_") else "down.1.conv")
    found = merge(base, {f"{path}.{down}": parts["lora_down.weight"], f"{path}.{up}": parts["lora_up.weight"]})
    same(found["down.1.conv.weight"], load(base)["down.1.conv.weight"] + change * RANK / ALPHA)  # no alpha: the rank


# Layers of a UNet as diffusers and as Stable Diffusion's own code call them.
BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "down_blocks.0.resnets.1.conv2": "input_blocks.2.0.out_layers.3",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
    "down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_q": "input_blocks.8.1.transformer_blocks.9.attn1.to_q",
    "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
    "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
    "up_blocks.0.attentions.2.proj_out": "output_blocks.2.1.proj_out",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.2.resnets.0.conv_shortcut": "output_blocks.6.0.skip_connection",
    "conv_out": "out.2",
}


@pytest.mark.parametrize("prefix", ["lora_unet_", "unet."])
@pytest.mark.parametrize("theirs", [False, True])
def test_a_unets_blocks_are_known_by_both_names(theirs: bool, prefix: str, tmp_path: Path) -> None:
    ours = {f"model.diffusion_model.{new}" if theirs else old: old if theirs else new for old, new in BLOCKS.items()}
    base, parts = tmp_path / "unet.pt", Parts()
    state = {f"{name}.weight": numbers(name, 6, 4) for name in ours}
    torch.save(state, base)
    for name in ours.values():
        path = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        down, up = numbers(f"{name} down", RANK, 4), numbers(f"{name} up", 6, RANK)
        parts |= {f"{path}.lora_down.weight": down, f"{path}.lora_up.weight": up}
    found = merge(base, parts)
    for own, name in ours.items():
        change = numbers(f"{name} up", 6, RANK) @ numbers(f"{name} down", RANK, 4)
        same(found[f"{own}.weight"], state[f"{own}.weight"] + change)


def test_differences_of_biases(base: Path) -> None:
    delta = numbers("b", 6)
    found, before = merge(base, {"down.1.conv.diff_b": delta, "down.0.lin.diff_b": delta}), load(base)
    same(found["down.1.conv.bias"], before["down.1.conv.bias"] + delta)
    same(found["down.0.lin.bias"], delta)
    same(found["down.1.conv.weight"], before["down.1.conv.weight"])


def test_several_adapters_at_once_each_with_its_strength(base: Path) -> None:
    (first, one), (second, other) = (made("up.one", LAYERS["up.one"]) for made in (lora, loha))
    words: list[object] = []
    for name, parts in (("a", first), ("b", second)):
        torch.save({f"lora_unet_up_one.{part}": tensor for part, tensor in parts.items()}, base.with_name(f"{name}.pt"))
        words += ["--with", f"{name}={base.with_name(f'{name}.pt')}"]
    out = base.with_name("out.pt")
    done("fuse", base, *words, "--strength", "b=-0.25", "--strength", 0.5, "-o", out)
    same(load(out)["up.one.weight"], load(base)["up.one.weight"] + one / 2 - other / 4)
    assert run("verify", base, out, *words)[0] == 0
    code, message = error("fuse", base, *words, "--strength", "c=1", "-o", out, "--force")
    assert (code, message) == (2, "--strength: expected a number, or NAME=X with the NAME of a --with, got 'c=1'")


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"oft_blocks": (2, 3, 3)}, "an OFT"),
        ({"on_input": (1,), "weight": (8,)}, "an (IA)3"),
        ({"w_norm": (6,)}, "the difference of a norm"),
    ],
)
def test_what_is_no_known_adapter_is_refused_by_name(
    base: Path, tensors: dict[str, tuple[int, ...]], what: str
) -> None:
    parts, _ = lora("up.one", LAYERS["up.one"])
    adapters = {f"lora_unet_up_one.{part}": tensor for part, tensor in parts.items()}
    adapters |= {f"lora_unet_down_0_lin.{name}": torch.ones(shape) for name, shape in tensors.items()}
    torch.save(adapters, base.with_name("x.pt"))
    words = ("fuse", base, "--with", f"x={base.with_name('x.pt')}", "-o", base.with_name("out.pt"))
    code, message = error(*words)
    assert (code, what in message, "lora_unet_down_0_lin" in message) == (4, True, True)
    done(*words, "--leave", "*_lin")


def test_what_was_merged_and_taken_out_again_is_verified_from_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convtool.cli.app import run_app

    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(2)
    numbers = {"conv.weight": (8, 4, 3, 3), "down": (2, 4, 3, 3), "up": (8, 2, 1, 1)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in numbers.items()}
    save_file({"conv.weight": made["conv.weight"]}, "unet.safetensors")
    lora = {f"lora_unet_conv.lora_{name}.weight": made[name] for name in ("down", "up")}
    save_file(lora | {"lora_unet_conv.alpha": torch.tensor(1.0)}, "lora.safetensors")
    by = ["--with", "style=lora.safetensors"]
    assert run_app(["fuse", "unet.safetensors", *by, "--strength", "0.8", "-o", "styled.safetensors"]) == 0
    assert run_app(["fuse", "styled.safetensors", *by, "--strength", "-0.8", "-o", "back.safetensors"]) == 0
    # The stride of the layer is that of every change of it, and nothing hangs on what it is.
    assert run_app(["verify", "unet.safetensors", "back.safetensors", *by]) == 0
    assert run_app(["fuse", "styled.safetensors", *by, "--strength", "-0.7", "-o", "other.safetensors"]) == 0
    torch.testing.assert_close(load_file("back.safetensors")["conv.weight"], made["conv.weight"], rtol=0, atol=1e-5)


def test_what_another_program_merged_is_verified_by_the_adapters_and_their_strength(base: Path) -> None:
    parts, delta = lora("down.1.conv", LAYERS["down.1.conv"])
    beside, _ = lora("up.one", LAYERS["up.one"])
    adapters = {f"lora_unet_down_1_conv.{part}": tensor for part, tensor in parts.items()}
    torch.save(
        adapters | {f"lora_unet_up_one.{part}": tensor for part, tensor in beside.items()}, base.with_name("x.pt")
    )
    state, out = load(base), base.with_name("merged.pt")
    torch.save(state | {"down.1.conv.weight": state["down.1.conv.weight"] + 0.7 * delta}, out)
    words = ("verify", base, out, "--with", f"x={base.with_name('x.pt')}", "--leave", "*_one")
    assert run(*words, "--strength", 0.7)[0] == 0
    assert run(*words, "--strength", 0.8)[0] == 1
    assert run(*words[:-2], "--strength", 0.7)[0] == 1  # up.one is as it was, and so not merged
    code, message = error("verify", base, out, "--strength", 0.7)
    assert (code, "go with adapters" in message) == (2, True)
    merge(base, adapters)
    code, message = error("verify", base, base.with_name("out.pt"), *words[3:5], "--strength", 2)
    assert (code, "AFTER records what was merged" in message) == (2, True)


@pytest.mark.parametrize(
    ("names", "modules"),
    [
        (["fc", "prior.fc"], {"prior.fc": "prior.fc"}),
        (["unet.fc", "text_encoder_3.fc"], {"text_encoder_3.fc": "text_encoder_3.fc"}),
        (["head.fc", "text_model.head.fc"], {"text_model.head.fc": "text_model.head.fc", "head.fc": "head.fc"}),
        (["fc", "te.fc"], {"te.fc": "lycoris_te_fc"}),
        (["text_model.a.q", "vision_model.a.q"], {name: name for name in ("text_model.a.q", "vision_model.a.q")}),
    ],
)
def test_a_layer_of_just_that_name_is_the_one(names: list[str], modules: dict[str, str], tmp_path: Path) -> None:
    weights = {f"{name}.weight": torch.zeros(4, 4) for name in names}
    save_file(weights, tmp_path / "base.safetensors")
    factors = {"A": torch.ones(1, 4), "B": torch.ones(4, 1)}
    adapter = {f"{name}.lora_{key}.weight": one for name in modules.values() for key, one in factors.items()}
    save_file({name: one.clone() for name, one in adapter.items()}, tmp_path / "adapter.safetensors")
    done(
        "fuse",
        tmp_path / "base.safetensors",
        "--with",
        f"a={tmp_path / 'adapter.safetensors'}",
        "-o",
        tmp_path / "o.pt",
    )
    found = load(tmp_path / "o.pt")
    assert {name for name in names if found[f"{name}.weight"].any()} == set(modules)
