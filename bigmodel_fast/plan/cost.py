"""What a training step costs: memory by part, and time by kind of work. Plain arithmetic on a model's shape.

Memory. Weights, gradients and AdamW's two averages are float32. What forward keeps for backward is counted tensor by
tensor from the models and the operators' save_for_backward: the residual stream (float32 under autocast too), what
each product reads, queries, keys and values, the MLP's products before its activation. Beside them stand working
memory of the largest operator's backward and a chunk of logits, never all [tokens, vocabulary] of them. On CPU the
operators keep up to 1 GiB of memory that was given back (core/scratch.h), and regions are used again only for requests
of their size. So activations and gradients, of which one fades while the other grows, stand side by side up to that
limit.

Time. Each kind of work takes flops / rate + bytes / bandwidth, two numbers that are measured on a machine at two shapes
(measure.py), or follow from data sheets (hardware.py); and each call of an operator takes its overhead. This is the
roofline of Williams et al. (2009), with a sum for the maximum, since packing and products do not overlap.
"""

from dataclasses import dataclass

from .shape import Layers, Shape

STATE = 4  # bytes of a weight, of its gradient, and of each of AdamW's two averages
BYTES = {"bf16": 2, "fp32": 4}  # of an activation
KEPT = 1 << 30  # the most memory that the CPU operators keep for later calls
LOGITS, FEWEST_TOKENS = 104 << 20, 256  # a chunk of logits takes at most so much, but has so many tokens at least
BLOCK_CLASSES = 4096  # of the vocabulary, whose gradients stand beside the logits
CALLS_OF_LAYER, CALLS_OF_STEP = 8, 8  # of operators, forward and backward together


@dataclass(frozen=True)
class Step:
    """How a step is run on one device.

    Args:
        batch: sequences in one pass; of seq2seq, pairs.
        context: tokens of a sequence; of seq2seq, of a pair.
        accumulation: passes in the step.
        recompute: each block keeps its input only, and is run again in backward (Chen et al. 2016).
        shards: devices that share weights, gradients and optimizer state (FSDP); 1: none do. Gradients of several
            passes are whole until the last has been made, and are sent once.
        cpu: on a CPU, where memory is pooled by size and weights are packed.
    """

    batch: int
    context: int
    dtype: str = "bf16"
    accumulation: int = 1
    recompute: bool = False
    shards: int = 1
    cpu: bool = True

    @property
    def tokens(self) -> int:
        """Of one pass."""
        return self.batch * self.context


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `peak` may be less than the sum: not everything is there at once."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    workspace: float
    peak: float

    def parts(self) -> dict[str, float]:
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "logits and loss": self.loss,
            "packed copies and workspace": self.workspace,
        }


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes read and written."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Rate:
    """Of one kind of work, per second."""

    flops: float
    bytes: float

    def seconds(self, work: Work) -> float:
        return work.flops / self.flops + work.bytes / self.bytes


# ---- memory ----


def activations_of_block(shape: Shape, step: Step, kind: Layers) -> float:
    """Bytes that one block keeps for its backward."""
    e = BYTES[step.dtype]
    norms = kind.norms * (4 * shape.width + e * shape.width + 8.0)  # the stream, float32; statistics; what comes of it
    rotated = shape.query + shape.key if shape.rotary else 0  # copies of queries and keys
    heads = e * (shape.query + 2 * shape.key + rotated + shape.query) + 8 * shape.heads  # and the result, statistics
    hidden = e * shape.hidden * (2 if shape.gated else 1)
    if kind.memory:  # queries and result, beside the keys and values of the encoder's tokens
        heads += e * 2 * shape.width + 8 * shape.heads
    return step.tokens * (kind.tokens * (norms + heads + hidden) + kind.memory * 2 * e * shape.width)


def input_of_block(shape: Shape, step: Step, kind: Layers) -> float:
    """Bytes of what goes into a block: the stream, and of a GPT what a norm has made of it."""
    normed = BYTES[step.dtype] * shape.width if shape.objective == "clm" else 0.0
    return step.tokens * kind.tokens * (4 * shape.width + normed)


def memory(shape: Shape, step: Step) -> Memory:
    """Of a device at the fullest moment of a step."""
    e, t, parameters = BYTES[step.dtype], step.tokens, shape.parameters()
    weights = STATE * parameters / step.shards
    gradients = STATE * parameters / (step.shards if step.accumulation == 1 else 1)  # scattered after the last pass
    blocks = [activations_of_block(shape, step, kind) for kind in shape.kinds]
    activations: float = t * (4 + e) * shape.width  # the embedded tokens, and what the output layer reads
    if step.recompute:
        activations += shape.layers * sum(input_of_block(shape, step, kind) for kind in shape.kinds) + max(blocks)
    else:
        activations += shape.layers * sum(blocks)
    predicted = t * shape.predicted
    lent = min(predicted, STATE * shape.width // e) if step.cpu else 0  # tokens whose logits lie in a gradient
    chunk = min(predicted - lent, max(FEWEST_TOKENS, LOGITS // (e * shape.vocab_size)))
    block_of_classes = min(shape.vocab_size, BLOCK_CLASSES)  # whose gradients are made at a time
    loss: float = e * (chunk * shape.vocab_size + predicted * shape.width)
    loss += max(lent, chunk) * (e * block_of_classes + 4.0 * shape.width)
    if shape.tied:  # the table's other gradient, until it is added
        loss += 4.0 * shape.table
    within = t * max(kind.tokens for kind in shape.kinds)  # tokens of a block
    hidden = within * e * shape.hidden * (5 if shape.gated else 3)  # the hidden layer and its gradients as operands
    heads = shape.query + 2 * shape.key + (shape.query + shape.key if shape.rotary else 0)
    workspace: float = hidden + within * (e * (3 * shape.width + heads) + 2 * 4 * shape.width)  # gradients going down
    if step.cpu:
        workspace += e * shape.width * shape.hidden * (2 if shape.gated else 1)
        if step.accumulation > 1:  # packed once for all passes, forward and backward
            workspace += 2.0 * e * (shape.weights_of_layers + shape.table)
    if step.shards > 1:  # two blocks are gathered whole: the one that computes, and the next
        workspace += 2.0 * (e + STATE) * shape.weights_of_layer
    passing, lasting = activations + loss + workspace, gradients
    kept = float(KEPT if step.cpu else 0)
    peak = weights + 2 * weights + max(passing + min(kept, lasting), lasting + min(kept, passing))
    return Memory(weights, gradients, 2 * weights, activations, loss, workspace, peak)


# ---- time ----


def dense_work(rows: float, inner: int, out: int, dtype: str) -> Work:
    """x W^T and its two gradients: three products, each of which reads or writes all three matrices."""
    return Work(2.0 * rows * inner * out, BYTES[dtype] * rows * (inner + out) + 4.0 * inner * out) * 3


def attention_work(tokens: float, keys: float, query: int, key: int, dtype: str, memory: float | None = None) -> Work:
    """Forward and backward, two products and four, of tokens that see so many keys each.

    Args:
        memory: tokens that have the keys, if they are others.
    """
    holders = tokens if memory is None else memory
    return Work(12.0 * tokens * keys * query, 6.0 * BYTES[dtype] * (tokens * query + holders * key))


def loss_work(tokens: float, width: int, classes: int, dtype: str) -> Work:
    """Output layer and cross-entropy: three products, and the logits as often."""
    return Work(6.0 * tokens * width * classes, 3.0 * BYTES[dtype] * tokens * classes)


def norm_work(tokens: float, width: int, dtype: str) -> Work:
    """A norm with its residual, forward and backward: the stream is float32."""
    return Work(0.0, tokens * width * (4.0 * BYTES[dtype] + 20.0))


def optimizer_work(parameters: float) -> Work:
    """AdamW reads weight, gradient and averages and writes all but the gradient; its norm is taken before."""
    return Work(0.0, parameters * 4.0 * (7 + 1))


def step_work(shape: Shape, step: Step) -> dict[str, Work]:
    """Of a whole step on one device, by kind."""
    t, dtype, e = step.tokens, step.dtype, BYTES[step.dtype]
    products = [(shape.width, shape.query + 2 * shape.key), (shape.query, shape.width), (shape.hidden, shape.width)]
    products += [(shape.width, shape.hidden)] * (2 if shape.gated else 1)
    dense = attention = stream = Work()
    for kind in shape.kinds:
        rows, memory = t * kind.tokens, t * kind.memory
        dense += sum((dense_work(rows, inner, out, dtype) for inner, out in products), Work())
        attention += attention_work(rows, kind.keys * step.context, shape.query, shape.key, dtype)
        stream += norm_work(rows, shape.width, dtype) * kind.norms
        if memory:
            dense += dense_work(rows, shape.width, shape.width, dtype) * 2
            dense += dense_work(memory, shape.width, 2 * shape.width, dtype)
            attention += attention_work(rows, kind.memory * step.context, shape.query, shape.key, dtype, memory)
        if shape.objective != "clm":  # each sub-layer's input and its gradient change their dtype, and are dropped from
            stream += Work(0.0, kind.norms * rows * shape.width * (3.0 * e + 20.0))
    if shape.rotary:  # queries and keys are read and written, in both directions
        stream += Work(0.0, 4.0 * e * t * (shape.query + shape.key))
    again = 4 / 3 if step.recompute else 1.0  # backward is twice forward
    ends = norm_work(t, shape.width, dtype) + Work(
        0.0, 24.0 * t * shape.width + (16.0 if shape.tied else 4.0) * shape.table
    )
    head = dense_work(t * shape.predicted, shape.width, shape.width, dtype) if shape.objective == "mlm" else Work()
    passes = {
        "dense": dense * (shape.layers * again) + head,
        "attention": attention * (shape.layers * again),
        "stream": stream * (shape.layers * again) + ends,
        "loss": loss_work(t * shape.predicted, shape.width, shape.vocab_size, dtype),
    }
    work = {kind: w * step.accumulation for kind, w in passes.items()}
    return {**work, "optimizer": optimizer_work(shape.parameters() / step.shards)}


def step_seconds(shape: Shape, step: Step, rates: dict[str, Rate], call: float) -> dict[str, float]:
    """Time of a step on one device by kind of work.

    Args:
        rates: by kind.
        call: seconds that a call of an operator and of its backward take beside its work.
    """
    seconds = {kind: rates[kind].seconds(work) for kind, work in step_work(shape, step).items()}
    again = 4 / 3 if step.recompute else 1.0
    layers = shape.layers * len(shape.kinds)
    calls = layers * CALLS_OF_LAYER * again * step.accumulation + CALLS_OF_STEP
    return {**seconds, "calls": calls * call}
