"""The names of array dimensions, and nothing else.

Every parameter and activation in `jaxllm` names each of its dimensions with one
of these strings, or with None where a dimension is never split. What a name
*means* on hardware is decided elsewhere, by an `AxisRules` table in
`sharding.rules`.

    name          letter  size
    batch         B       sequences in flight
    cache_batch   B       the same sequences, in the KV cache and in attention
    seq           T       query positions (1 while decoding)
    residual_seq  T       query positions of the residual stream between blocks
    cache_seq     S       key/value positions
    embed         D       residual stream width
    heads         K       groups of query heads that share one key/value head
    kv_heads      K       key/value heads of the cache
    head_dim      H       width of one head
    mlp           F       hidden width of the feed-forward layer
    vocab         V       tokens
    layers        L       decoder blocks

Never split, hence written None: the G query heads of one group (N = K * G query
heads in all), the G + 2 slots of a fused query/key/value projection, and the two
halves of a fused gate/up projection. P = H / 2 counts the pairs of coordinates that
rotary embedding turns. The letters are those of
https://jax-ml.github.io/scaling-book/transformers.

`batch` and `cache_batch` are told apart because a weight-stationary partition
keeps every sequence's residual stream on every device but splits the cache;
`seq` and `residual_seq` because sequence parallelism splits only the latter.
"""

AXES = (
    "batch",
    "cache_batch",
    "seq",
    "residual_seq",
    "cache_seq",
    "embed",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp",
    "vocab",
    "layers",
)
