"""The proving ground: the table of ops, and the yardstick that every implementation is held against.

An op joins by a row in OPS. test_ops.py runs each row on every implementation; test_kernels.py adds what only device
code can get wrong. With TRITON_INTERPRET=1 the implementation under test is the interpreted kernel, and nothing else.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from fused_dino import functional as FD
from fused_dino.ops import cosine_triton, resize, standardize_triton, vicreg_triton
from fused_dino.ops import standardize as ops_standardize
from fused_dino.ops.cosine_triton import cosine_rows
from fused_dino.ops.vicreg_plan import make_plan
from fused_dino.reference.cosine import prepare, reduce
from fused_dino.reference.dtypes import upcast, wide

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
if INTERPRETED:
    from interpreter import replace_the_language_once_a_launch

    replace_the_language_once_a_launch()
    IMPLEMENTATIONS: tuple[str, ...] = ("triton",)
    cosine_triton.MANY_ROWS = 64  # a row takes the interpreter some milliseconds
else:
    IMPLEMENTATIONS = ("reference", "torch", "triton") if DEVICE == "cuda" else ("reference", "torch")


@dataclass(frozen=True)
class Case:
    """A size of an op's inputs, its options, and why it is here.

    closed_form: for an edge that kernels do not have.
    """

    shape: tuple[int, ...]
    reason: str
    options: dict[str, Any] = field(default_factory=dict)
    closed_form: bool = False

    def __str__(self) -> str:
        return "x".join(map(str, self.shape)) + "".join(f"-{k}={v}" for k, v in self.options.items())


@dataclass(frozen=True)
class Op:
    """An op, and what it takes to prove it.

    run(*inputs, backend, **options) -> a tensor.
    scales(*inputs, grad_output, **options) -> how large the terms are of which the value and the gradients of the
        inputs are made: the unit of their errors, which cancellation in the result does not shrink.
    forward, backward: the dispatcher ops, each launched once.
    forward_arguments(*inputs), backward_arguments(*inputs, *forward's results): for inputs of `shape`.
    inputs: their names; all are of one shape.
    shape(rows, width): of inputs with so many examples, whose last dimension is so wide.
    rowwise: each row of [..., D] has a loss of its own: it takes a reduction and one weight a row.
    poisoned: one NaN or overflow reaches every result, and whether it ends as NaN or infinite is no part of the op.
    part_of: the public op that it is a step of, where it is none itself.
    floor: what is allowed beside twice eager's error, in units of scale * eps: eager may happen to hit a value exactly.
    """

    name: str
    run: Callable[..., Tensor]
    cases: tuple[Case, ...]
    scales: Callable[..., tuple[Tensor, ...]]
    forward: Any
    backward: Any
    forward_arguments: Callable[..., tuple]
    backward_arguments: Callable[..., tuple]
    inputs: tuple[str, ...] = ("student", "teacher")
    shape: Callable[[int, int], tuple[int, ...]] = lambda rows, width: (rows, width)
    rowwise: bool = False
    poisoned: bool = False
    part_of: str = ""
    floor: float = 2.0

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
        """Inputs of a shape, on the device under test."""
        generator = torch.Generator().manual_seed(seed)
        drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in self.inputs)
        return tuple(x.to(DEVICE, dtype) for x in drawn)

    def weight(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """One weight a row, as an option, where the op takes it."""
        if not self.rowwise:
            return {}
        count = math.prod(shape[:-1])
        return {"weight": torch.linspace(0.25, 2, count + 1, device=DEVICE)[:count].view(shape[:-1])}

    @property
    def unreduced(self) -> dict[str, str]:
        """The option under which one row cannot hide behind another."""
        return {"reduction": "none"} if self.rowwise else {}


def cosine_scales(
    student: Tensor, teacher: Tensor, grad_output: Tensor, *, eps: float = 1e-12, reduction: str = "mean",
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Two for a row's distance; a row's share of the loss over its norm for its gradient."""
    distance = torch.full(student.shape[:-1], 2.0, dtype=torch.float64, device=student.device, requires_grad=True)
    value = reduce(distance, weight, reduction)
    (share,) = torch.autograd.grad(value, distance, grad_output.double())
    # A norm whose square leaves the range is infinite.
    norms = (x.double().norm(dim=-1).clamp(eps, 1e154) for x in (student, teacher))
    for_student, for_teacher = ((share.abs() / norm).unsqueeze(-1) for norm in norms)
    return value.detach(), for_student, for_teacher


def mse_scales(
    student: Tensor, teacher: Tensor, grad_output: Tensor, *, normalize: bool = True, reduction: str = "mean",
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The squares of what is subtracted, and their derivative; over the norm where rows are normalised, together with
    the whole row's share along the row."""
    s, t = (x.double() for x in (student, teacher))
    norms = [x.norm(dim=-1, keepdim=True).clamp(1e-12, 1e154) if normalize else torch.ones_like(x) for x in (s, t)]
    sizes = sum(x.abs() / norm for x, norm in zip((s, t), norms, strict=True)).requires_grad_()
    value = reduce(sizes.square(), None if weight is None else weight.unsqueeze(-1), reduction)
    (share,) = torch.autograd.grad(value, sizes, grad_output.double())
    share = share.abs()
    if normalize:
        share = share.norm(dim=-1, keepdim=True)
    return value.detach(), share / norms[0], share / norms[1]


def rows_arguments(kind: str, student: Tensor, teacher: Tensor, *made: Tensor) -> tuple:
    """Of cosine_rows: in the forward the loss alone, in the backward both gradients."""
    grad_output = made[0].expand(len(student)) if made else None
    return student, teacher, None, None, grad_output, kind, "sum", len(student), 1e-12, bool(made), bool(made)


COSINE = Op(
    "cosine_loss",
    FD.cosine_loss,
    (
        Case((3, 16), "a power of two, narrower than any block"),
        Case((5, 37), "no power of two: a masked tail"),
        Case((4, 1), "one column: every cosine is 1 or -1"),
        Case((1, 300), "one row"),
        Case((2, 3, 24), "tokens: two leading dimensions"),
        Case((7,), "a single vector"),
        Case((3, 1000), "wider than the narrowest block"),
        Case((2, 5000), "wider than the widest block: the loop over columns"),
        Case((258, 5), "more rows than are taken at a time on a CPU", closed_form=True),
        Case((cosine_triton.MANY_ROWS + 4, 3), "so many rows that a program takes several"),
        Case((6, 20), "summed", {"reduction": "sum"}),
        Case((6, 20), "one value a row", {"reduction": "none"}),
        Case((6, 20), "an eps above some norms and below others", {"eps": 4.5}),
    ),
    scales=cosine_scales,
    rowwise=True,
    forward=cosine_rows,
    backward=cosine_rows,
    forward_arguments=partial(rows_arguments, "cosine"),
    backward_arguments=partial(rows_arguments, "cosine"),
)
MSE = Op(
    "mse_loss",
    FD.mse_loss,
    (
        Case((5, 37), "no power of two: a masked tail"),
        Case((4, 1), "one column: every error is 0 or 4"),
        Case((2, 3, 24), "tokens: two leading dimensions"),
        Case((7,), "a single vector"),
        Case((2, 5000), "wider than the widest block: the loop over columns"),
        Case((258, 5), "more rows than are taken at a time on a CPU", closed_form=True),
        Case((6, 20), "summed", {"reduction": "sum"}),
        Case((6, 20), "one value an element", {"reduction": "none"}),
        Case((2, 5000), "one value an element, in a loop over columns", {"reduction": "none"}),
        Case((5, 37), "rows as they are", {"normalize": False}),
        Case((5, 37), "elements as they are", {"normalize": False, "reduction": "none"}),
    ),
    scales=mse_scales,
    rowwise=True,
    forward=cosine_rows,
    backward=cosine_rows,
    forward_arguments=partial(rows_arguments, "mse"),
    backward_arguments=partial(rows_arguments, "mse"),
)


def preprocess(images: Tensor, *, backend: str, size: tuple[int, int] = (4, 6), **options: Any) -> Tensor:
    return FD.preprocess(images, size, backend=backend, **options)


def preprocess_options(images: Tensor, size: tuple[int, int] = (4, 6), **options: Any) -> resize.Options:
    """As the public function fills them in."""
    given = {"input_range": (-1.0, 1.0), "mean": FD.IMAGENET_MEAN, "std": FD.IMAGENET_STD, "interpolation": "bilinear"}
    given |= {"antialias": False, "clamp": False, "out_dtype": images.dtype, "patch_size": None}
    return resize.Options(size, **(given | options))


def preprocess_scales(images: Tensor, grad_output: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Of a value, the largest finite pixel of its image as it is normalised; of a gradient, the largest grad_output
    times how many outputs read one input.
    """
    chosen = preprocess_options(images, **options)
    largest = images.detach().double().abs().flatten(1).nan_to_num(0, 0, 0).amax(1).clamp(max=1e300)
    value = largest * max(chosen.scale) + max(map(abs, chosen.shift))
    readers = math.prod(max(1, out / given) for out, given in zip(chosen.size, images.shape[2:], strict=True))
    gradient = grad_output.double().abs().amax() * max(chosen.scale) * readers
    return value.view(-1, *(1 for _ in grad_output.shape[1:])), gradient


PREPROCESS = Op(
    "preprocess",
    preprocess,
    (
        Case((2, 3, 3, 4), "enlarged, by no whole number"),
        Case((2, 3, 9, 17), "reduced: pixels that nobody reads"),
        Case((1, 3, 4, 6), "its own size"),
        Case((1, 3, 4, 9), "its own height"),
        Case((1, 3, 1, 1), "one pixel"),
        Case((2, 3, 5, 7), "one pixel out", {"size": (1, 1)}),
        Case((1, 3, 2, 1200), "far wider than the result: several segments"),
        Case((1, 3, 3, 5), "several blocks of columns", {"size": (2, 300)}),
        Case((9, 3, 2, 2), "several rows a program, and fewer in the last", {"size": (11, 3)}),
        Case((2, 3, 9, 17), "bicubic", {"interpolation": "bicubic"}),
        Case((2, 3, 3, 4), "bicubic, enlarged", {"interpolation": "bicubic"}),
        Case((2, 3, 9, 17), "antialiased", {"antialias": True}),
        Case((2, 3, 3, 4), "antialiased, enlarged", {"antialias": True}),
        Case((1, 3, 4, 9), "antialiased, its own height", {"antialias": True}),
        Case((2, 3, 9, 17), "bicubic and antialiased", {"interpolation": "bicubic", "antialias": True}),
        Case((1, 3, 2, 700), "antialiased, several segments", {"antialias": True, "size": (1, 20)}),
        Case((2, 3, 5, 7), "patches", {"patch_size": 2}),
        Case((2, 3, 9, 7), "clipped", {"clamp": True, "interpolation": "bicubic"}),
        Case((2, 3, 9, 7), "clipped patches", {"clamp": True, "antialias": True, "patch_size": 2}),
        Case((2, 3, 5, 5), "other statistics", {"input_range": (0.25, 3.0), "mean": (0.1, 0, 2), "std": (1, 2, 3)}),
        Case((2, 3, 5, 5), "another dtype", {"out_dtype": torch.float32}),
    ),
    scales=preprocess_scales,
    forward=resize.resize_fwd,
    backward=resize.resize_bwd,
    forward_arguments=lambda x: (x, *preprocess_options(x).launch),
    backward_arguments=lambda x, made: (
        torch.ones_like(made), x, (4, 6), preprocess_options(x).scale, [], "bilinear", False, 0,
    ),
    inputs=("images",),
    shape=lambda rows, width: (rows, 3, 3, min(width, 1200)),  # of several segments
)  # fmt: skip


def vicreg_scales(
    student: Tensor, teacher: Tensor, grad_output: Tensor, *, inv_weight: float = 25.0, var_weight: float = 10.0,
    cov_weight: float = 0.5, gamma: float = 1.0, eps: float = 1e-4, cov_reduction: str = "mean", unbiased: bool = False,
    route: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of the terms as they are summed, without their signs: c_ij is a sum of |x_ni x_nj|, its gradient one of their
    products with |x|. The diagonal, which eager leaves out, is no part of the unit. An x near 0 is a difference too,
    which is rounded as its column is."""
    y, g = student.double(), teacher.double()
    n, d = y.shape
    spare = max(n - 1, 1)
    x = y - y.mean(0)
    c = (x.T @ x / spare).fill_diagonal_(0)
    size = (x.abs().T @ x.abs() / spare).fill_diagonal_(0)
    away = x.abs() + x.square().mean(0).sqrt()
    sigma = (x.square().sum(0) / (spare if unbiased else n) + eps).sqrt()
    divisor = d * d if cov_reduction == "mean" else d
    value = inv_weight * (y - g).square().mean() + var_weight * (abs(gamma) + sigma.mean())
    value = (value + cov_weight * (c.abs() * size).sum() / divisor) * grad_output.abs()
    towards = 2 * inv_weight / (n * d) * (y.abs() + g.abs())
    pull = var_weight / (d * (spare if unbiased else n)) * away / sigma
    spread = 4 * cov_weight / (divisor * spare) * (away @ size)
    outer = grad_output.double().abs()
    smallest = torch.finfo(torch.float64).tiny  # where nothing is summed the result is 0, to the bit
    return value, ((towards + pull + spread) * outer).clamp(smallest), (towards * outer).clamp(smallest)


def vicreg_plan(rows: int, width: int) -> tuple:
    return make_plan(
        rows, width, inv_weight=25.0, var_weight=10.0, cov_weight=0.5, gamma=1.0, eps=1e-4, cov_reduction="mean",
        unbiased=False, route="auto",
    )  # fmt: skip


def vicreg_backward_arguments(student: Tensor, teacher: Tensor, *made: Tensor) -> tuple:
    ones = (torch.ones_like(made[0]) for _ in range(3))
    return (student, teacher, *made[3:], *ones, True, True, *vicreg_plan(*student.shape))


ALONE = {"inv_weight": 0.0, "var_weight": 0.0}  # so that the covariance cannot hide behind the other terms

VICREG = Op(
    "vicreg_loss",
    lambda student, teacher, **options: FD.vicreg_loss(student, teacher, **options).loss,
    (
        Case((16, 40), "fewer rows than columns: the product of rows"),
        Case((40, 16), "fewer columns: the product of columns"),
        Case((5, 37), "no power of two: masked tails"),
        Case((37, 5), "the same by columns"),
        Case((24, 24), "as many: by columns"),
        Case((23, 24), "one row less: by rows"),
        Case((25, 24), "one row more"),
        Case((6, 1), "one column, which has no covariance"),
        Case((2, 300), "two rows"),
        Case((70, 150), "more than one tile, off the diagonal too", ALONE),
        Case((150, 70), "the same by columns", ALONE),
        Case((20, 1100), "the product split over its depth", ALONE),
        Case((1100, 20), "the same by columns, and statistics of more than one run of rows"),
        Case((12, 30), "the other route", {"route": "covariance", **ALONE}),
        Case((30, 12), "the other route", {"route": "gram", **ALONE}),
        Case((12, 30), "as published", {"cov_reduction": "sum_over_d", "unbiased": True}),
        Case((30, 12), "as published, by columns", {"cov_reduction": "sum_over_d", "unbiased": True}),
        Case((9, 20), "every deviation below gamma", {"gamma": 5.0, "eps": 0.1, "inv_weight": 0.0, "cov_weight": 0.0}),
        Case((9, 20), "without the variance", {"var_weight": 0.0}),
    ),
    scales=vicreg_scales,
    poisoned=True,
    forward=vicreg_triton.vicreg_fwd,
    backward=vicreg_triton.vicreg_bwd,
    forward_arguments=lambda s, t: (s, t, *vicreg_plan(*s.shape)),
    backward_arguments=vicreg_backward_arguments,
)


def standardize(x: Tensor, *, backend: str, normalize: bool = True, eps: float = 1e-5) -> Tensor:
    """What mse_loss(whiten=True) does to each of its inputs before it compares them."""
    if backend == "reference":
        return prepare(*upcast(x), normalize, eps)
    return ops_standardize.standardize(x, normalize, eps, wide(x), backend)


def standardize_scales(
    x: Tensor, grad_output: Tensor, *, normalize: bool = True, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """With r the rounding of z - mean, |z| and the column's size, over what it is divided by: of y = (z - mean) /
    (s + eps) that r, and by as much as s is rounded y itself; of its gradient g, mean(g) and the product of
    (z - mean) / s with the sum of g y, each rounded so. Along a row of length one all of the row comes in."""
    z = x.double()
    norm = z.norm(dim=-1, keepdim=True).clamp(1e-12, 1e154) if normalize else torch.ones_like(z[:, :1])
    z, spare, g = F.normalize(z, dim=-1) if normalize else z, len(z) - 1, grad_output.double().abs()
    away, sigma = (z - z.mean(0)).abs(), z.std(0)
    rounding = (z.abs() + z.square().mean(0).sqrt()) / (sigma + eps)
    value = rounding + away / (sigma + eps) * rounding.square().mean(0).sqrt()
    size = torch.where(sigma == 0, 0, away / sigma)
    along = (size * (g * rounding).sum(0) + rounding * (g * size).sum(0)) / spare
    gradient = ((g + g.mean(0)) * (1 + rounding.square().mean(0).sqrt()) + along) / (sigma + eps)
    if normalize:
        gradient = gradient.norm(dim=-1, keepdim=True) / norm
    return value, gradient


AS_THEY_ARE = {"normalize": False}

STANDARDIZE = Op(
    "standardize",
    standardize,
    (
        Case((5, 37), "no power of two: masked tails"),
        Case((2, 24), "two rows, the fewest: every column is 1 and -1"),
        Case((6, 1), "one column: of rows of length one, constant but for the sign"),
        Case((3, 1300), "wider than any block: the loop over columns"),
        Case((530, 5), "more than one run of rows"),
        Case((5, 37), "rows as they are", AS_THEY_ARE),
        Case((530, 5), "rows as they are, in more than one run", AS_THEY_ARE),
        Case((6, 20), "an eps that counts", {"eps": 0.5, **AS_THEY_ARE}),
    ),
    scales=standardize_scales,
    forward=standardize_triton.standardize_fwd,
    backward=standardize_triton.standardize_bwd,
    forward_arguments=lambda x: (x, True, 1e-5, wide(x)),
    backward_arguments=lambda x, *made: (torch.ones_like(made[0]), made[0], x, *made[1:], True, 1e-5),
    inputs=("x",),
    shape=lambda rows, width: (max(rows, 2), width),
    part_of="mse_loss",
)
OPS = (COSINE, MSE, STANDARDIZE, PREPROCESS, VICREG)


def grad_output_of(out: Tensor) -> Tensor:
    """Not one, and not the same for every row."""
    return torch.linspace(0.5, 1.5, out.numel() + 1, dtype=out.dtype, device=out.device)[1:].view(out.shape)


def results(op: Op, inputs: tuple[Tensor, ...], backend: str, **options: Any) -> list[Tensor]:
    """The op's value, and the gradients of its inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = op.run(*leaves, backend=backend, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_output_of(out))]


def check_accuracy(op: Op, inputs: tuple[Tensor, ...], backend: str, **options: Any) -> None:
    """Against float64, in units of the op's scales: at most twice eager's error in the same dtypes, plus the floor.

    The oracle sees the inputs as they were rounded. What eager makes NaN or infinite must be the same here. An op that
    one element poisons must be NaN or infinite where eager and the oracle both are, and finite and right, or neither,
    where only eager overflows; in float64, where eager is the oracle, this holds for the value.
    """
    truth = results(op, tuple(x.double() for x in inputs), "reference", **options)
    eager = results(op, inputs, "reference", **options)
    ours = results(op, inputs, backend, **options)
    scales = op.scales(*inputs, grad_output_of(truth[0]), **options)
    wide = torch.finfo(eager[0].dtype).eps * op.floor
    if eager[0].dtype == torch.float64:
        wide *= 8  # the oracle is eager itself, whose own error is not counted: sums in another order differ by more
    for name, got, plain, true, scale in zip(("value", *op.inputs), ours, eager, truth, scales, strict=True):
        assert (got.dtype, got.shape) == (plain.dtype, plain.shape), name
        finite = plain.isfinite() & true.isfinite()
        if op.poisoned:
            lost = ~(plain.isfinite() | true.isfinite())
            if name == "value" or got.dtype != torch.float64:
                assert not got[lost].isfinite().any(), f"{name}: finite where eager is not"
            finite |= true.isfinite() & got.isfinite()
        else:
            assert_close(got[~finite], plain[~finite], equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")
        if not finite.any():
            continue
        true, unit = true[finite], scale.expand(true.shape)[finite]
        limits = torch.finfo(got.dtype)
        # The result's own rounding, to which a subnormal's last step is large.
        rounding = limits.eps * (true.abs().clamp(min=limits.smallest_normal) / unit).max().item()
        error = ((got[finite].double() - true).abs() / unit).max().item()
        plain = plain[finite]
        eagers = torch.where(plain.isfinite(), (plain.double() - true).abs() / unit, 0).max().item()
        allowed = 2 * eagers + wide + rounding
        assert error <= allowed, f"{name}: error {error:.3g} of its scale; eager's {eagers:.3g}, allowed {allowed:.3g}"
