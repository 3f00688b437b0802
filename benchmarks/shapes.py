"""List every size that is measured, and why."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CPU, GPU = ("cpu",), ("cuda",)
FORWARD, BACKWARD = "forward", "forward + backward"


@dataclass(frozen=True, eq=False)
class Row:
    """One line of an op's table.

    shape: Shape of the op's first input: [rows, width] of a loss, [B, 3, H, W] of images.
    dtype: Dtype of the inputs, a name that torch has.
    options: What the op's declaration reads from it, such as size, out_dtype or layout.
    grad_output: Factor of a scalar's gradient: 1 is a plain backward(), anything else a weighted loss.
    tf32: Whether float32 matrix products may use TF32. TF32 has rows of its own, since its errors are larger.
    directions: The directions that are measured. Tables end with the last one.
    on: The kinds of device that it is for.
    quick: Whether it is in the quick selection. The report's sentence on an op is about its last quick row.
    """

    shape: tuple[int, ...]
    reason: str
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    grad_output: float = 1.0
    tf32: bool = False
    directions: tuple[str, ...] = (FORWARD, BACKWARD)
    on: tuple[str, ...] = CPU + GPU
    quick: bool = False

    def __str__(self) -> str:
        scaled = {} if self.grad_output == 1 else {"grad_output": self.grad_output}
        options = "".join(f" {key}={value}" for key, value in {**self.options, **scaled}.items())
        return f"{' x '.join(map(str, self.shape))} {self.dtype}{options}"

    @property
    def precision(self) -> str:
        """Return the precision of the arithmetic's inputs. Only times of one precision are compared."""
        return "TF32" if self.tf32 else {"bfloat16": "bf16", "float16": "fp16"}.get(self.dtype, "IEEE")


def read(text: str) -> Row:
    """Return the row whose line this is, with options as text."""
    *sizes, last = text.split(" x ")
    size, dtype, *options = last.split()
    return Row((*map(int, sizes), int(size)), "", dtype, dict(option.split("=") for option in options))


TOKENS = "patch tokens of 256 images of a ViT-L/14 at 224"
ROWS = (
    Row((256, 1024), "global tokens of one batch: launches and overhead count, not memory"),
    Row((257, 1000), "no multiple of any block, in either direction"),
    Row((4096, 1024), "columns lie together, as after a transposition", options={"layout": "transposed"}),
    Row((16384, 1024), "patch tokens of 64 images: larger than a CPU's caches", on=CPU, quick=True),
    Row((256, 1024), "global tokens as mixed precision trains them", "bfloat16", on=GPU),
    Row((65536, 1024), f"{TOKENS}, under a loss weight", "bfloat16", grad_output=0.25, on=GPU),
    Row((65536, 1024), TOKENS, on=GPU),
    Row((65536, 1024), f"{TOKENS}, as mixed precision trains them", "bfloat16", on=GPU, quick=True),
)  # of cosine and mse

WHITENED = Row(
    (4096, 1024), "columns standardised over all rows first, as rows of length one", options={"whiten": True}
)

AHEAD = (FORWARD,)  # of a frozen teacher that no gradient passes
IMAGES = (
    Row((32, 3, 256, 256), "a CPU's batch", options={"size": 224}, directions=AHEAD, on=CPU, quick=True),
    Row((8, 3, 512, 512), "the teacher's native size", options={"size": 518}, directions=AHEAD, on=CPU),
    Row((32, 3, 256, 256), "as a decoder gives them", "uint8", {"size": 224}, directions=AHEAD, on=CPU),
    Row((8, 3, 250, 333), "no ratio of whole numbers", options={"size": 224}, directions=AHEAD),
    Row((32, 3, 256, 240), "channels last", options={"size": 224, "layout": "channels_last"}, directions=AHEAD),
    Row((32, 3, 240, 256), "a gradient to the image, which stopgrad_image=False wants", options={"size": 224}),
    Row((256, 3, 256, 256), "bfloat16 throughout", "bfloat16", {"size": 224}, directions=AHEAD, on=GPU),
    Row((256, 3, 256, 256), "bytes", "uint8", {"size": 224, "out_dtype": "bfloat16"}, directions=AHEAD, on=GPU),
    Row((256, 3, 512, 512), "native size", options={"size": 518, "out_dtype": "bfloat16"}, directions=AHEAD, on=GPU),
    Row(
        (256, 3, 256, 256),
        "the recipe's batch into a bfloat16 teacher",
        options={"size": 224, "out_dtype": "bfloat16"},
        directions=AHEAD,
        on=GPU,
        quick=True,
    ),
)

BATCHES = (
    Row((256, 1024), "one batch of a ViT-L teacher: rows are fewer than columns", quick=True, on=CPU),
    Row((256, 8192), "a wide projector: eager's [D, D] product is 64 times what is needed"),
    Row((1024, 4096), "both large"),
    Row((4096, 1024), "rows are more than columns: no shorter product exists"),
    Row((257, 1000), "no multiple of any block, in either direction"),
    Row((256, 8192), "TF32 as users allow it", tf32=True, on=GPU),
    Row((4096, 1024), "TF32 as users allow it", tf32=True, on=GPU),
    Row((1024, 4096), "as mixed precision trains it", "bfloat16", on=GPU),
    Row((256, 1024), "one batch of a ViT-L teacher", quick=True, on=GPU),
)  # of vicreg

CLASS, PATCHES = {"needs": "global"}, {"needs": "patch"}
SMALL, LARGE = {"teacher": "vits14"}, {"teacher": "vitl14"}
TEACHERS = (
    Row((2, 3, 224, 224), "what a CPU bears", options=SMALL | CLASS, directions=AHEAD, on=CPU),
    Row((2, 3, 224, 224), "16 bits", "bfloat16", SMALL | CLASS, directions=AHEAD, on=CPU),
    Row((2, 3, 224, 224), "tokens are aligned", options=SMALL | PATCHES, directions=AHEAD, on=CPU),
    Row((256, 3, 224, 224), "the recipe's teacher", "bfloat16", LARGE | CLASS, directions=AHEAD, on=GPU, quick=True),
    Row((256, 3, 224, 224), "tokens are aligned", "bfloat16", LARGE | PATCHES, directions=AHEAD, on=GPU),
    Row((64, 3, 224, 224), "the weights as they are published", options=LARGE | CLASS, directions=AHEAD, on=GPU),
)

WHOLE = (BACKWARD,)
STEPS = (
    Row((2, 3, 256, 256), "what a CPU bears", options=SMALL, directions=WHOLE, on=CPU),
    Row((64, 3, 256, 256), "the recipe's teacher", "bfloat16", LARGE, directions=WHOLE, on=GPU, quick=True),
)
