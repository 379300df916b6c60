"""What each part of a training step has to multiply and to move: arithmetic on the model's dimensions, without a device.

    parts = count_parts(SIZES["base"], Batch(crops=11, samples=254_400))
    parts["feed-forward"].flop, parts["feed-forward"].bytes

FLOP are those of matrix products, two for a multiplication with its addition. Bytes are the fewest that a program with
bfloat16 activations and float32 statistics can move: a product reads its operands and writes its result once, and what
is done to single elements rides along. A floor follows from both: no program that computes the same is faster.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from hubert.core.frames import SAMPLE_RATE, num_frames
from hubert.settings.model import ModelConfig, total_stride
from hubert.training.masks import num_masked_frames

SHORT, LONG = 2, 4  # bytes of bfloat16 and of float32
BFLOAT16, FLOAT32 = "bfloat16", "float32"

FIRST_CONV = "first convolution, norm, GELU"
CONVS = "other convolutions, GELU"
PROJECTION = "projection"
POSITIONS = "positional convolution"
QUERY_KEY_VALUE = "attention: query, key, value"
SCORES = "attention: scores"
ATTENTION_OUTPUT = "attention: output"
FEED_FORWARD = "feed-forward"
NORMS = "norms, dropout, residual sums"
LOSS = "loss"
OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class Batch:
    """Crops of one length. The default is the peer's batch on one GPU: 2.8 million samples."""

    crops: int = 11
    samples: int = 254_400  # of each crop
    num_classes: int = 500

    @property
    def frames(self) -> int:
        """Frames of all crops."""
        return self.crops * num_frames(self.samples)

    @property
    def masked(self) -> int:
        """Frames of all crops that are masked, by the static rule."""
        return self.crops * num_masked_frames(num_frames(self.samples))

    @property
    def seconds(self) -> float:
        """Audio."""
        return self.crops * self.samples / SAMPLE_RATE


@dataclass(frozen=True)
class Product:
    """Matrices (rows, inner) times (inner, columns), `count` of them beside each other in a part."""

    name: str
    rows: int
    inner: int
    columns: int
    count: int = 1
    dtype: str = BFLOAT16

    @property
    def flop(self) -> float:
        """Of the forward pass."""
        return 2.0 * self.rows * self.inner * self.columns * self.count

    @property
    def elements(self) -> float:
        """Numbers that it reads and writes."""
        return float(self.count * (self.rows * self.inner + self.inner * self.columns + self.rows * self.columns))

    def backward(self) -> Iterator["Product"]:
        """Yield the two products of the backward pass: for the left operand, and for the right one."""
        for name, shape in (
            ("input", (self.rows, self.columns, self.inner)),
            ("weight", (self.inner, self.rows, self.columns)),
        ):
            yield Product(f"{self.name}, gradient of the {name}", *shape, self.count, self.dtype)


@dataclass
class Part:
    """One part of a step: FLOP by number format, and bytes, forward and backward together."""

    name: str
    forward: dict[str, float] = field(default_factory=dict)
    backward: dict[str, float] = field(default_factory=dict)
    recomputed: float = 0.0  # FLOP of the backward pass that repeat the forward pass, because storing would cost more
    bytes: float = 0.0
    products: list[Product] = field(default_factory=list)  # of the forward pass

    @property
    def flop(self) -> float:
        """All of them, whatever the format."""
        return sum(self.forward.values()) + sum(self.backward.values())

    def add(self, product: Product, *, gradients: float = 2.0, again: float = 0.0, moves: float | None = None) -> None:
        """Count a product.

        Args:
            product: of the forward pass.
            gradients: FLOP of its gradients, in forward passes.
            again: FLOP that the backward pass repeats, in forward passes.
            moves: bytes of both passes; by default those of three products of these sizes.
        """
        width = SHORT if product.dtype == BFLOAT16 else LONG
        self.products.append(product)
        self.forward[product.dtype] = self.forward.get(product.dtype, 0.0) + product.flop
        self.backward[product.dtype] = self.backward.get(product.dtype, 0.0) + (gradients + again) * product.flop
        self.recomputed += again * product.flop
        self.bytes += 3 * width * product.elements if moves is None else moves

    def seconds(self, rates: dict[str, float], memory: float) -> tuple[float, float]:
        """Return the least time for the products, and for moving the bytes, at rates in FLOP and bytes per second."""
        products = sum(
            flop / rates[dtype] for passes in (self.forward, self.backward) for dtype, flop in passes.items()
        )
        return products, self.bytes / memory


def conv_rows(config: ModelConfig, batch: Batch) -> list[int]:
    """Return the rows of all crops after each convolution, before what no frame needs is cut off."""
    stride = total_stride(config.conv_layers)
    rows = batch.crops * -(-batch.samples // stride) * stride
    found = []
    for number, (_, kernel, step) in enumerate(config.conv_layers):
        if number == 0 and config.extractor_norm == "group":
            rows //= step  # the last windows reach into padding
        else:
            rows = (rows - kernel) // step + 1
        found.append(rows)
    return found


def count_parts(config: ModelConfig, batch: Batch) -> dict[str, Part]:
    """Return the parts of a step in the order of the forward pass: forward, backward, and AdamW."""
    frames, dim = batch.frames, config.dim
    parts = {
        part.name: part
        for part in (
            _first_conv(config, batch),
            _convs(config, batch),
            _projection(config, batch),
            _positions(config, batch),
            *_layers(config, batch),
            _loss(config, batch),
        )
    }
    # Norm and gradient are read, the gradient is set to zero, p, m and v are read and written, and a bfloat16 copy too.
    parts[OPTIMIZER] = Part(OPTIMIZER, bytes=count_parameters(config, batch.num_classes) * (9 * LONG + SHORT))
    # Before the first layer there is one more norm; each reads a sum's parts and writes sum and output, and back again.
    rows = 2 * _layer_rows(config, batch) + frames
    parts[NORMS].bytes = 8 * SHORT * rows * dim
    return parts


def _first_conv(config: ModelConfig, batch: Batch) -> Part:
    """The first convolution: its output is written once, and computed again where its gradient is needed."""
    channels, kernel, _ = config.conv_layers[0]
    rows = conv_rows(config, batch)[0]
    samples = batch.crops * batch.samples
    part = Part(FIRST_CONV)
    # The shift of the group norm is the weight of one column more. No gradient goes into the audio.
    inner = kernel + (config.extractor_norm == "group")
    moves = 3 * LONG * samples + 2 * SHORT * rows * channels
    part.add(Product("conv 1", rows, inner, channels, dtype=FLOAT32), gradients=1.0, again=1.0, moves=moves)
    return part


def _convs(config: ModelConfig, batch: Batch) -> Part:
    """The other convolutions as products on views; the input and the value before GELU are kept for the backward pass."""
    part = Part(CONVS)
    rows = conv_rows(config, batch)
    inputs = config.conv_layers[0][0]
    for number, (channels, kernel, stride) in enumerate(config.conv_layers[1:], 1):
        whole = 3 * (rows[number - 1] * inputs + kernel * inputs * channels + rows[number] * channels)
        whole += 2 * rows[number] * channels  # before GELU: written, and read again
        for start in range(0, kernel, stride):
            taps = min(stride, kernel - start)
            product = Product(f"conv {number + 1}, {taps} taps", rows[number], taps * inputs, channels)
            part.add(product, moves=SHORT * whole if start == 0 else 0.0)
        inputs = channels
    return part


def _projection(config: ModelConfig, batch: Batch) -> Part:
    channels = config.conv_layers[-1][0]
    part = Part(PROJECTION)
    part.add(Product("projection", batch.frames, channels, config.dim))
    part.bytes += 5 * SHORT * batch.frames * channels  # LayerNorm: in, out; gradient, in, gradient
    return part


def _positions(config: ModelConfig, batch: Batch) -> Part:
    width = config.dim // config.pos_conv_groups
    part = Part(POSITIONS)
    product = Product("positions", batch.frames, width * config.pos_conv_kernel, width, config.pos_conv_groups)
    weights = config.dim * width * config.pos_conv_kernel
    values = batch.frames * config.dim
    # The weight is normalised in float32: read and written, with its gradient read, both read again, and one written.
    part.add(product, moves=SHORT * (6 * values + 2 * values + 3 * weights) + 5 * LONG * weights)
    return part


def _layer_rows(config: ModelConfig, batch: Batch) -> int:
    """Return the frames that go through all layers together: the last one computes masked frames only."""
    return (config.num_layers - 1) * batch.frames + batch.masked


def _layers(config: ModelConfig, batch: Batch) -> Iterator[Part]:
    dim, layers, frames = config.dim, config.num_layers, batch.frames
    kinds = (("", frames, layers - 1), (", masked frames", batch.masked, 1))
    part = Part(QUERY_KEY_VALUE)
    part.add(Product("query, key, value", frames, dim, dim, 3 * layers))
    part.bytes -= 3 * SHORT * 2 * layers * frames * dim  # three products of one input
    yield part

    part, length = Part(SCORES), num_frames(batch.samples)
    for name, inner, columns in (
        ("scores", dim // config.num_heads, length),
        ("sums of values", length, dim // config.num_heads),
    ):
        # A fused kernel computes the scores again, one of the two products.
        product = Product(name, length, inner, columns, batch.crops * config.num_heads * layers)
        part.add(product, again=float(name == "scores"), moves=0.0)
    # q, k, v and the output; these and a gradient; three gradients.
    part.bytes = 12 * SHORT * layers * frames * dim
    yield part

    part = Part(ATTENTION_OUTPUT)
    for name, rows, count in kinds:
        part.add(Product(f"attention output{name}", rows, dim, dim, count))
    yield part

    part = Part(FEED_FORWARD)
    for name, rows, count in kinds:
        part.add(Product(f"feed-forward in{name}", rows, dim, config.ffn_dim, count))
        part.add(Product(f"feed-forward out{name}", rows, config.ffn_dim, dim, count))
    part.bytes += 2 * SHORT * _layer_rows(config, batch) * config.ffn_dim  # before GELU: written, and read again
    yield part
    yield Part(NORMS)


def _loss(config: ModelConfig, batch: Batch) -> Part:
    part = Part(LOSS)
    part.add(Product("final projection", batch.masked, config.dim, config.final_dim))
    part.add(Product("logits", batch.masked, config.final_dim, batch.num_classes, dtype=FLOAT32))
    part.bytes += 3 * SHORT * batch.frames * config.conv_layers[-1][0]  # the feature penalty
    return part


def count_parameters(config: ModelConfig, num_classes: int) -> int:
    """Return the number of weights that are trained."""
    total, inputs = 0, 1
    for number, (channels, kernel, _) in enumerate(config.conv_layers):
        total += channels * (inputs * kernel + config.conv_bias)
        total += 2 * channels * (config.extractor_norm == "layer" or number == 0)
        inputs = channels
    dim = config.dim
    total += 2 * inputs + dim * (inputs + 1) + dim  # norm, projection, mask embedding
    total += dim * dim // config.pos_conv_groups * config.pos_conv_kernel + config.pos_conv_kernel + dim + 2 * dim
    layer = 4 * dim * (dim + 1) + 2 * dim * config.ffn_dim + config.ffn_dim + dim + 4 * dim
    return total + config.num_layers * layer + config.final_dim * (dim + 1 + num_classes)
