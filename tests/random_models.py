"""Live models whose code is made at random, planned, fused, and held against themselves.

`python tests/random_models.py FIRST LAST` tries these seeds, and prints the code of each model that comes out wrong.
"""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convtool
from convtool.errors import ConvtoolError

MOST_NUMBERS = 30_000  # in a value
OPTIONS: list[dict[str, bool]] = [{}, {}, {"everything": True}, {"fixed_size": True}, {"batch_norms_only": True}]


class Model(nn.Module):
    """A model whose forward is made of statements, which are tried as they are made.

    Attributes:
        code: of the forward.
        size: of the input, channels first.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.chance = random.Random(seed)
        self.axes = self.chance.choice([1, 2, 2, 2])
        self.size = (self.chance.choice([2, 3, 4]), *(self.chance.choice([6, 7, 8, 9]) for _ in range(self.axes)))
        self.lines: list[str] = []
        self.values = {"x": torch.randn(2, *self.size, dtype=torch.float64)}
        self.eval()
        for _ in range(self.chance.randint(4, 16)):
            self._add()
        outputs = list(self.values)[-(1 if self.chance.random() < 0.8 else 3) :]
        self.code = "\n    ".join(["def forward(self, x):", *self.lines, f"return ({', '.join(outputs)},)"])
        space: dict[str, Any] = {"torch": torch, "F": F}
        exec(self.code, space)
        self.made = space["forward"]

    def forward(self, x: Tensor) -> Any:
        """Run the statements."""
        return self.made(self, x)

    def _add(self) -> None:
        """Add a statement about one of the last values; none where it can't be."""
        names = list(self.values)
        name = names[-1] if self.chance.random() < 0.8 else self.chance.choice(names[-4:])
        make = self.chance.choice(STATEMENTS)
        state = set(self._modules) | set(self._parameters)
        try:
            text = make(self, name)
            if text.startswith("!"):  # changes a value in place, which is looked at when the whole is run
                self.lines.append(text[1:])
                return
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of padding that torch pads once more
                made = eval(text, {"torch": torch, "F": F, "self": self, **self.values})
            if not 0 < made.numel() < MOST_NUMBERS or made.dim() != self.axes + 2:
                raise ValueError(text)
        except (ValueError, RuntimeError, IndexError):
            for other in (set(self._modules) | set(self._parameters)) - state:
                delattr(self, other)
            return
        self.values[f"v{len(self.lines)}"] = made
        self.lines.append(f"v{len(self.lines)} = {text}")

    def hold(self, module: nn.Module) -> str:
        """Hold a module, and return what code calls it."""
        for norm in (one for one in module.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.3, 2)
            for parameter in norm.parameters():
                nn.init.normal_(parameter)
        name = f"m{len(self._modules)}"
        self.add_module(name, module.double().eval())
        return f"self.{name}"

    def kind(self, name: str) -> Any:
        """Return torch's class of a name for this number of axes: nn.Conv2d of 'Conv'."""
        return getattr(nn, f"{name}{self.axes}d")


def convolution(m: Model, v: str) -> str:
    """A convolution, of any geometry."""
    r, channels = m.chance, m.values[v].shape[1]
    out, groups = r.choice([2, 3, 4, 6, channels]), r.choice([1, 1, 1, channels])
    stride, mode = r.choice([1, 1, 1, 2]), r.choice(["zeros", "zeros", "zeros", "circular", "reflect", "replicate"])
    padding = r.choice([0, 0, 1, "same" if stride == 1 else 0])
    how = {"stride": stride, "padding": padding, "dilation": r.choice([1, 1, 2]), "bias": r.random() < 0.6}
    kernel = [r.choice([1, 1, 3, 2]) for _ in range(m.axes)]
    layer = m.kind("Conv")(channels, out, kernel, groups=groups, padding_mode=mode if padding else "zeros", **how)
    return f"{m.hold(nn.utils.parametrizations.weight_norm(layer) if r.random() < 0.1 else layer)}({v})"


def transposed(m: Model, v: str) -> str:
    """A transposed convolution."""
    r, channels = m.chance, m.values[v].shape[1]
    stride, groups = r.choice([1, 2]), r.choice([1, channels])
    how = {"padding": r.choice([0, 1]), "output_padding": r.choice([0, stride - 1]), "bias": r.random() < 0.5}
    return f"{m.hold(m.kind('ConvTranspose')(channels, channels, r.choice([2, 3]), stride, groups=groups, **how))}({v})"


def norm(m: Model, v: str) -> str:
    """A batch norm."""
    how = {"affine": m.chance.random() < 0.8, "eps": m.chance.choice([1e-5, 1e-3])}
    return f"{m.hold(m.kind('BatchNorm')(m.values[v].shape[1], **how))}({v})"


def other(m: Model, v: str) -> str:
    """Another value, where there is one of this value's shape; else the value itself."""
    return m.chance.choice([name for name, one in m.values.items() if one.shape == m.values[v].shape])


def added(m: Model, v: str) -> str:
    """A sum, in one of its spellings."""
    forms = ("{} + {}", "torch.add({}, {}, alpha=0.5)", "{} - {}", "sum([{}, {}])", "torch.stack([{}, {}]).sum(0)")
    return m.chance.choice(forms).format(v, other(m, v))


def in_place(m: Model, v: str) -> str:
    """A value changed in place."""
    if v == "x":
        raise ValueError(v)
    return "!" + m.chance.choice(
        [f"{v}.relu_()", f"{v}.mul_(0.5)", f"{v} += 0.25", f"{v}.add_({v})", f"{v}[:, :1] *= 2"]
    )


def channels_moved(m: Model, v: str) -> str:
    """Channels chosen, put side by side, shuffled or permuted."""
    r, channels = m.chance, m.values[v].shape[1]
    order, at, half = r.sample(range(channels), channels), r.randint(1, channels), channels // 2
    count, rest = f"{v}.shape[0]", f"*{v}.shape[2:]"
    shuffled = f"{v}.view({count}, 2, {half}, {rest}).transpose(1, 2).reshape({count}, {channels}, {rest})"
    split = f"torch.split({v}, [{at}, {channels - at}], 1)[0]"
    return r.choice([f"{v}[:, {order}]", f"{v}[:, :{at}]", split, f"torch.cat([{v}, {other(m, v)}], 1)", shuffled])


def scaled(m: Model, v: str) -> str:
    """A factor or an offset: a number, or a number for each channel."""
    name = f"p{len(m._parameters)}"
    m.register_parameter(name, nn.Parameter(torch.randn(m.values[v].shape[1], *[1] * m.axes, dtype=torch.float64)))
    forms = ("{0} * 2", "{0} / 3", "-{0}", "{0} + 1", "{0} * self.{1}", "{0} + self.{1}", "{0} * self.{1}.abs()")
    return m.chance.choice(forms).format(v, name)


def branches(m: Model, v: str) -> str:
    """Convolutions side by side of one value, with a batch norm or a factor behind some, added up."""
    r, channels, texts = m.chance, m.values[v].shape[1], []
    for size in r.sample([1, 3, 3], r.choice([2, 3])):
        text = f"{m.hold(m.kind('Conv')(channels, 3, size, padding=size // 2, bias=r.random() < 0.5))}({v})"
        text = f"{m.hold(m.kind('BatchNorm')(3))}({text})" if r.random() < 0.5 else text
        texts.append(f"{text} * {r.choice([2, 0.1])}" if r.random() < 0.3 else text)
    texts += [v] if channels == 3 and r.random() < 0.5 else []
    return " + ".join(texts)


def again(m: Model, v: str) -> str:
    """A module that runs a second time."""
    if not m._modules:
        raise ValueError(v)
    return f"self.{m.chance.choice(list(m._modules))}({v})"


def anything(m: Model, v: str) -> str:
    """What isn't linear, or reads neighbours, or does nothing."""
    axes, last = m.axes, m.axes + 1
    forms = [
        *("F.relu({v})", "torch.tanh({v})", "{v} * torch.sigmoid({o})", "F.layer_norm({v}, {v}.shape[1:])"),
        *("F.avg_pool{axes}d({v}, 2)", "F.max_pool{axes}d({v}, 2)", "F.avg_pool{axes}d({v}, 3, 1, 1)"),
        *("F.interpolate({v}, scale_factor=2)", "{v}.flip(2)", "{v}.transpose(2, {last})", "{v}[..., 1:]"),
        *(
            "F.pad({v}, [1] * 2 * {axes})",
            "F.dropout({v}, 0.5, self.training)",
            "{v}.contiguous()",
            "{v} - {v}.mean(2, True)",
        ),
    ]
    return m.chance.choice(forms).format(v=v, o=other(m, v), axes=axes, last=last)


def linear(m: Model, v: str) -> str:
    """A linear layer over the channels, moved to the last axis and back."""
    layer = nn.Linear(m.values[v].shape[1], m.chance.choice([2, 3]))
    return f"{m.hold(layer)}({v}.movedim(1, -1)).movedim(-1, 1)"


STATEMENTS: list[Callable[[Model, str], str]] = [
    *([convolution] * 7),
    *([norm] * 6),
    *([added, scaled, in_place, channels_moved, anything, branches] * 2),
    *(transposed, again, linear),
]


def inputs(model: Model, fixed: bool) -> list[Tensor]:
    """Return inputs of the size that is planned for, and of others."""
    more: Sequence[int] = (0,) if fixed else (0, 1, 4)
    return [torch.randn(2, model.size[0], *(one + n for one in model.size[1:]), dtype=torch.float64) for n in more]


def wrong(seed: int) -> str | None:
    """Return what is wrong with the fused model of a seed; '' where nothing is, and None where there is no model."""
    model = Model(seed)
    options = model.chance.choice(OPTIONS)
    expected: list[tuple[Tensor, Tensor, Any]] = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x in inputs(model, "fixed_size" in options):
            given = x.clone()
            try:
                expected.append((x, given, model(given)))
            except (RuntimeError, IndexError):
                if not expected:
                    return None
        fused = copy.deepcopy(model)
        try:
            convtool.fuse_model(fused, model.size, **options)
        except ConvtoolError as error:
            return f"refused: {error}"
        for x, after, outputs in expected:
            given = x.clone()
            for one, two in zip(outputs, fused(given), strict=True):
                off = (one - two).abs().max() / (1e-6 + one.abs().max())
                if one.shape != two.shape or not (off < 1e-8 or one.isnan().any()):
                    return f"off by {off:.2g} at {tuple(x.shape)} with {options}"
            if not torch.equal(given, after):
                return "the input is another one afterwards"
    return ""


if __name__ == "__main__":
    found = Counter[str]()
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        what = wrong(seed)
        found["no model" if what is None else "wrong" if what else "right"] += 1
        if what:
            print(f"seed {seed}: {what}\n{Model(seed).code}\n", flush=True)
    print(dict(found))
