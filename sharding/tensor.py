"""Rule tables: how one layer is split over the devices of a stage.

Each table is a value. To compare another one, build an `AxisRules` and pass it; to
have it on the command line, add it to `RULES`.

In the pictures D F stand for the feed-forward weights, N for the heads, subscripts X
and Y for the mesh axes that split them; prices are what one device sends for one
layer and B T tokens, in units of B T D elements.
"""

from collections.abc import Mapping

from sharding.rules import AxisRules

# Column then row: D N_X, N_X D and D F_X, F_X D. One all-reduce of B T D behind
# attention and one behind the feed-forward layer. Shoeybi et al. 2019,
# arXiv:1909.08053, section 3. With more tensor devices than key/value heads, each
# head and its cache stand on several devices.
MEGATRON = AxisRules(
    name="megatron",
    table={
        "batch":        ("data",),
        "cache_batch":  ("data",),
        "seq":          (),
        "residual_seq": (),
        "cache_seq":    (),
        "embed":        (),
        "heads":        ("tensor",),
        "kv_heads":     ("tensor",),
        "head_dim":     (),
        "mlp":          ("tensor",),
        "vocab":        ("stage", "tensor"),
        "layers":       ("stage",),
    },
)  # fmt: skip

# Megatron with the residual stream split over positions: each all-reduce becomes a
# reduce-scatter and an all-gather of the same bytes together, and norms are not
# repeated. Korthikanti et al. 2022, arXiv:2205.05198, section 4. A single decoded
# position cannot be split, so decode is Megatron's.
SEQUENCE = AxisRules(
    name="sequence",
    table={**MEGATRON.table, "residual_seq": ("tensor",)},
    decode={"residual_seq": ()},
)

# Weights stay, split over two axes: D_X F_Y, F_Y D_X, with the residual stream split
# over D_X; every sequence is on every device, but each holds the cache of B/X of them.
# All-reduces of B T F/Y over X and B T D/X over Y: cheaper than one dimension once
# many devices share a layer. Pope et al. 2022, arXiv:2211.05102, section 3.2.2.
# Here X is the data axis: dp2_tp4 is a 2 x 4 grid, not two replicas.
TWO_D = AxisRules(
    name="two_d",
    table={
        **MEGATRON.table,
        "batch": (),
        "cache_batch": ("data",),
        "embed": ("data",),
    },
)

# The cache split over positions instead of heads: memory falls with the tensor degree
# even beyond the number of key/value heads. Decode gathers the queries (B D) and
# combines partial softmaxes over the tensor axis. "Flash-decoding", Dao et al. 2023;
# "Helix parallelism", arXiv:2507.07120.
KV_SEQ = AxisRules(
    name="kv_seq",
    table={**MEGATRON.table, "kv_heads": (), "cache_seq": ("tensor",)},
)

# Nothing inside a layer is split: the tensor axis only repeats work. The baseline.
REPLICATED = AxisRules(
    name="replicated",
    table={
        **MEGATRON.table,
        "heads": (),
        "kv_heads": (),
        "mlp": (),
        "vocab": ("stage",),
    },
)

RULES: Mapping[str, AxisRules] = {
    rules.name: rules for rules in (MEGATRON, SEQUENCE, TWO_D, KV_SEQ, REPLICATED)
}
