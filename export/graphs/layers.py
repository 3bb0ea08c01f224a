"""The layers of diffusion models, each a function from values to a value.

`key` is the layer's name in the checkpoint; images are [B,C,h,w], tokens [B,L,C].
"""

from __future__ import annotations

import numpy as np

from sld_edge.engines.errors import CheckpointError
from sld_edge.export.graphs.builder import GraphBuilder, Value


def linear(
    b: GraphBuilder, x: Value, key: str, inputs: int, outputs: int, *, bias: bool = True
) -> Value:
    """Linear layer on the last axis; its weight may also be a 1x1 convolution's."""
    weight = f"{key}.weight"
    if b.weights.shape(weight) == (outputs, inputs, 1, 1):
        b.weights.reshaped(weight, (outputs, inputs))
    # The checkpoint holds [out,in], MatMul wants [in,out].
    y = b.node("MatMul", x, b.weight(weight, (outputs, inputs), transpose=True), name=key)
    return b.node("Add", y, b.weight(f"{key}.bias", (outputs,)), name=key) if bias else y


def conv(
    b: GraphBuilder,
    x: Value,
    key: str,
    inputs: int,
    outputs: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    bias: bool = True,
) -> Value:
    """2-D convolution with half the kernel as padding."""
    return b.node(
        "Conv",
        x,
        b.weight(f"{key}.weight", (outputs, inputs, kernel, kernel)),
        *([b.weight(f"{key}.bias", (outputs,))] if bias else []),
        name=key,
        kernel_shape=[kernel, kernel],
        strides=[stride, stride],
        pads=[kernel // 2] * 4,
    )


def group_norm(
    b: GraphBuilder, x: Value, key: str, channels: int, groups: int, eps: float
) -> Value:
    """Group normalization of an image."""
    if channels % groups:
        raise CheckpointError(
            f"{b.weights.name}: {key} has {channels} channels",
            got=f"norm_num_groups {groups}",
            expected="a number that divides them",
        )
    scale, bias = f"{key}.weight", f"{key}.bias"
    if b.options.attention == "op" and b.options.precision == "fp16":
        return b.node(
            "GroupNormalization",
            x,
            b.weight(scale, (channels,)),
            b.weight(bias, (channels,)),
            name=key,
            num_groups=groups,
            epsilon=eps,
        )
    # FP32 is for the CPU, where ONNX Runtime would replace this operator by ten others.
    column = (channels, 1, 1)
    for name in (scale, bias):
        b.weights.reshaped(name, column)
    scales, biases = b.weight(scale, column), b.weight(bias, column)
    return decomposed_group_norm(b, x, scales, biases, groups=groups, eps=eps, name=key)


def decomposed_group_norm(
    b: GraphBuilder, x: Value, scale: Value, bias: Value, *, groups: int, eps: float, name: str
) -> Value:
    """Group normalization in operators of opset 20; scale and bias are [C,1,1].

    Each group [B,G,rest] is normalized as a whole, then each channel is scaled. Opset 20's own
    operator has a scale and bias per group, not per channel.
    """
    flat = b.node("Reshape", x, b.ints(0, groups, -1), name=f"{name}/groups", rank=3)
    ones = b.constant(np.ones(groups, b.dtype), f"ones/{groups}")
    zeros = b.constant(np.zeros(groups, b.dtype), f"zeros/{groups}")
    flat = b.node(
        "InstanceNormalization", flat, ones, zeros, name=f"{name}/normalized", epsilon=eps
    )
    y = b.node("Reshape", flat, b.sizes(x, 0, 4), name=f"{name}/image", rank=4)
    return b.node("Add", b.node("Mul", y, scale, name=name), bias, name=name)


def layer_norm(b: GraphBuilder, x: Value, key: str, channels: int, eps: float) -> Value:
    """Layer normalization of the last axis."""
    return b.node(
        "LayerNormalization",
        x,
        b.weight(f"{key}.weight", (channels,)),
        b.weight(f"{key}.bias", (channels,)),
        name=key,
        axis=-1,
        epsilon=eps,
    )


def silu(b: GraphBuilder, x: Value, name: str) -> Value:
    """`x * sigmoid(x)`."""
    return b.node("Mul", x, b.node("Sigmoid", x, name=f"{name}/sigmoid"), name=name)


def quick_gelu(b: GraphBuilder, x: Value, name: str) -> Value:
    """`x * sigmoid(1.702 x)`, the activation of OpenAI's CLIP."""
    scaled = b.node("Mul", x, b.scalar(1.702), name=f"{name}/scaled")
    return b.node("Mul", x, b.node("Sigmoid", scaled, name=f"{name}/sigmoid"), name=name)


def gelu(b: GraphBuilder, x: Value, name: str) -> Value:
    """The exact GELU, with the error function."""
    if b.options.attention == "op":
        return b.node("Gelu", x, name=name)
    # Older engines for opset 20 know Erf but not always Gelu.
    erf = b.node("Mul", x, b.scalar(2**-0.5), name=f"{name}/scaled")
    erf = b.node("Erf", erf, name=f"{name}/erf")
    gate = b.node("Add", erf, b.scalar(1), name=f"{name}/shifted")
    half = b.node("Mul", x, b.scalar(0.5), name=f"{name}/half")
    return b.node("Mul", half, gate, name=name)


def attention(
    b: GraphBuilder,
    q: Value,
    k: Value,
    v: Value,
    *,
    heads: int,
    channels: int,
    name: str,
    causal_length: int | None = None,
) -> Value:
    """Multi-head attention, `softmax(q k^T / sqrt(channels / heads)) v`; all [B,L,channels].

    `causal_length` is the fixed number of tokens where each token sees only itself and earlier
    tokens.
    """
    if channels % heads:
        raise CheckpointError(
            f"{b.weights.name}: {name} has {channels} channels",
            got=f"{heads} heads (attention_head_dim or num_attention_heads)",
            expected="a number that divides them",
        )
    size = channels // heads
    if b.options.attention == "op":
        causal = causal_length is not None
        return b.node(
            "Attention",
            q,
            k,
            v,
            name=name,
            q_num_heads=heads,
            kv_num_heads=heads,
            scale=size**-0.5,
            is_causal=int(causal),  # exactly 1: ONNX Runtime reads other numbers as "no"
        )
    # In FP16 the scores of an unscaled q can overflow.
    q = b.node("Mul", q, b.scalar(size**-0.5), name=f"{name}/q_scaled")
    q, k, v = (
        _heads_first(b, x, heads, size, f"{name}/{letter}", keys=letter == "k")
        for letter, x in (("q", q), ("k", k), ("v", v))
    )
    scores = b.node("MatMul", q, k, name=f"{name}/scores")
    if causal_length is not None:
        hidden = np.triu(np.full((causal_length, causal_length), -65504, b.dtype), k=1)
        scores = b.node("Add", scores, b.constant(hidden, "causal_mask"), name=f"{name}/causal")
    shares = b.node("Softmax", scores, name=f"{name}/shares", axis=-1)
    y = b.node("MatMul", shares, v, name=f"{name}/mixed")
    y = b.node("Transpose", y, name=f"{name}/heads_last", perm=[0, 2, 1, 3])
    return b.node("Reshape", y, b.ints(0, 0, channels), name=name, rank=3)


def _heads_first(
    b: GraphBuilder, x: Value, heads: int, size: int, name: str, *, keys: bool
) -> Value:
    x = b.node("Reshape", x, b.ints(0, 0, heads, size), name=f"{name}/split", rank=4)
    return b.node("Transpose", x, name=name, perm=[0, 2, 3, 1] if keys else [0, 2, 1, 3])


def tokens_from_image(b: GraphBuilder, x: Value, channels: int, name: str) -> Value:
    """Return an image [B,C,h,w] as tokens [B,h*w,C]."""
    x = b.node("Transpose", x, name=f"{name}/channels_last", perm=[0, 2, 3, 1])
    return b.node("Reshape", x, b.ints(0, -1, channels), name=f"{name}/tokens", rank=3)


def image_from_tokens(b: GraphBuilder, x: Value, like: Value, channels: int, name: str) -> Value:
    """Return tokens [B,h*w,C] as an image [B,C,h,w], with h and w of the image `like`."""
    # 0 keeps the batch of x: `like` may be narrow.
    sides = b.sizes(like, 2, 4)
    shape = b.node("Concat", b.ints(0), sides, b.ints(channels), name=f"{name}/shape", axis=0)
    x = b.node("Reshape", x, shape, name=f"{name}/image", rank=4)
    # In this order TensorRT, which keeps channels last, has nothing to move.
    return b.node("Transpose", x, name=f"{name}/channels_first", perm=[0, 3, 1, 2])


def resnet(
    b: GraphBuilder,
    x: Value,
    key: str,
    inputs: int,
    outputs: int,
    *,
    groups: int,
    eps: float,
    embedding: tuple[Value, int] | None = None,
) -> Value:
    """Residual block; `embedding` is the activated time embedding and its width, if any."""
    y = group_norm(b, x, f"{key}.norm1", inputs, groups, eps)
    y = conv(b, silu(b, y, f"{key}.act1"), f"{key}.conv1", inputs, outputs)
    if embedding is not None:
        value, width = embedding
        shift = linear(b, b.like(value, x), f"{key}.time_emb_proj", width, outputs)
        shift = b.node("Unsqueeze", shift, b.ints(2, 3), name=f"{key}.time_emb_proj/image", rank=4)
        y = b.node("Add", y, shift, name=f"{key}/timed")
    y = group_norm(b, y, f"{key}.norm2", outputs, groups, eps)
    y = conv(b, silu(b, y, f"{key}.act2"), f"{key}.conv2", outputs, outputs)
    if inputs != outputs:
        x = conv(b, x, f"{key}.conv_shortcut", inputs, outputs, kernel=1)
    return b.node("Add", x, y, name=key)


def upsample(
    b: GraphBuilder, x: Value, key: str, channels: int, *, like: Value | None = None
) -> Value:
    """Nearest neighbour, then convolution: to the size of `like`, or twice the size."""
    x = enlarged(b, x, key, like=like)
    return conv(b, x, f"{key}.conv", channels, channels)


def enlarged(b: GraphBuilder, x: Value, name: str, *, like: Value | None = None) -> Value:
    """Nearest neighbour: to the size of the image `like`, or twice the size."""
    if like is None:
        scales, sizes = b.constant(np.array([1, 1, 2, 2], np.float32), "scales/1_1_2_2"), None
    else:
        # Latents of odd size h halve to h//2+1; only the skip connection has h.
        scales = None
        sizes = b.node(
            "Concat", b.sizes(x, 0, 2), b.sizes(like, 2, 4), name=f"{name}/sizes", axis=0
        )
    return b.node(
        "Resize",
        x,
        None,
        *([scales] if sizes is None else [None, sizes]),
        name=f"{name}/resized",
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
