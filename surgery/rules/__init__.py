"""One rule per operator: what it does to channel labels.

To teach surgery an operator: write a function (tracer, node) -> labels of its output in the file
of its kind, and add its line to `RULES`. An operator without a rule freezes the channels that
reach it; an elementwise operator needs none (torch tags them).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from paretoprune.surgery.program import resolve_target
from paretoprune.surgery.rules import (
    contraction,
    layers,
    norms,
    pointwise,
    recurrent,
    reductions,
    shapes,
)
from paretoprune.surgery.rules.base import Result, Rule

__all__ = ["RULES", "Result", "Rule", "rule_of"]

_RULES: dict[str, Rule] = {"pointwise": pointwise.pointwise, "getitem": shapes.getitem}
for _names, _rule in (
    ("conv1d conv2d conv3d", layers.convolution),
    ("conv_transpose1d conv_transpose2d conv_transpose3d", layers.transposed_convolution),
    ("embedding", layers.embedding),
    ("gru lstm rnn_tanh rnn_relu", recurrent.recurrent),
    ("gru_cell lstm_cell rnn_tanh_cell rnn_relu_cell", recurrent.cell),
    ("linear", contraction.linear),
    ("matmul mm bmm mv", contraction.matmul),
    ("addmm baddbmm", contraction.added_matmul),
    ("einsum", contraction.einsum),
    ("scaled_dot_product_attention", contraction.attention),
    ("batch_norm instance_norm", norms.batch_norm),
    ("layer_norm rms_norm", norms.layer_norm),
    ("group_norm", norms.group_norm),
    (
        "hardswish hardsigmoid silu gelu mish elu leaky_relu celu selu softplus log_sigmoid "
        "subtract multiply divide absolute negative where __and__ __or__ __xor__",
        pointwise.pointwise,
    ),
    ("prelu", pointwise.prelu),
    ("copy", pointwise.pointwise),
    (
        "dropout feature_dropout alpha_dropout contiguous clone detach alias to _to_copy type_as "
        "fill zero lift_fresh_copy zeros_like ones_like full_like rand_like randn_like",
        pointwise.same,
    ),
    (
        "mean sum amax amin max min var std var_mean std_mean prod any all linalg_vector_norm "
        "linalg_norm norm argmax argmin logsumexp",
        reductions.reduction,
    ),
    ("softmax _softmax log_softmax cumsum softmin logcumsumexp", reductions.along),
    (
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "adaptive_max_pool3d max_pool2d_with_indices upsample_nearest1d upsample_nearest2d "
        "upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d "
        "upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
        "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d",
        shapes.pooling,
    ),
    (
        "view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as",
        shapes.view,
    ),
    ("permute transpose t numpy_T mT movedim moveaxis swapaxes swapdims", shapes.permute),
    ("cat concat concatenate", shapes.concatenation),
    ("stack", shapes.stack),
    ("slice narrow", shapes.slicing),
    ("select", shapes.selection),
    ("chunk split split_with_sizes tensor_split", shapes.splitting),
    ("unbind", shapes.unbind),
    ("expand expand_as", shapes.expand),
    ("repeat tile", shapes.repeat),
    ("repeat_interleave", shapes.repeat_interleave),
    ("roll flip rot90", shapes.moving),
    ("triu tril", shapes.triangle),
    ("unfold", shapes.unfolding),
    ("index index_select", shapes.indexing),
    ("pad constant_pad_nd", shapes.padding),
    ("cosine_similarity", reductions.similarity),
    ("topk sort argsort", reductions.ordering),
    ("gather take_along_dim", shapes.gathering),
    ("pixel_shuffle col2im", shapes.joining),
    ("pixel_unshuffle im2col", shapes.spreading),
    ("channel_shuffle native_channel_shuffle", shapes.channel_shuffle),
    ("glu", shapes.glu),
    ("grid_sampler grid_sampler_2d grid_sampler_3d", shapes.sampling),
    ("max_unpool2d max_unpool3d", shapes.unpooling),
    (
        "new_zeros new_ones new_full new_empty empty_like zeros ones full arange eye "
        "scalar_tensor",
        shapes.unlabelled,
    ),
):
    _RULES |= dict.fromkeys((f"aten.{name}" for name in _names.split()), _rule)

RULES: Mapping[str, Rule] = MappingProxyType(_RULES)
"""Rules by operator, without overload and without the underscore of in-place forms."""


def rule_of(target: str) -> Rule | None:
    """Returns the rule of an operator, such as `aten.relu_.default`; None if it has none."""
    packet = target.rsplit(".", 1)[0]
    rule = RULES.get(packet) or RULES.get(packet.removesuffix("_"))
    if rule is None and torch.Tag.pointwise in getattr(resolve_target(target), "tags", ()):
        return RULES["pointwise"]
    return rule
