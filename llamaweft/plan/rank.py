"""What one rank of several has of a model: the widths that are its own, what it holds, what it
gathers.

Under `tensor` a rank's model is one of fewer heads, a narrower MLP and a shorter vocabulary, with
the hidden size that it had; so whatever is reckoned from a config is right for a rank's. Under
`shard` the modules that are gathered (parallel/shard.py) are held in parts, and one layer, the
head or the embedding is whole at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from llamaweft.model.presets import LlamaConfig
from llamaweft.parallel.layout import Layout, check_model
from llamaweft.plan.memory import Workload
from llamaweft.plan.shapes import LINEARS, MLP, linear_weights, sizes
from llamaweft.plan.time import StepWork
from llamaweft.plan.whole import Whole
from llamaweft.weights.codecs import codec_of, encoded_bytes

ATTENTION = tuple(name for name in LINEARS if name not in MLP)
BY_INPUTS = ("o_proj", "down_proj")
"""What `tensor` cuts by columns (parallel/tensor.py)."""

TRAINED_BYTES = 4
"""Of a trained number and of its gradient: fp32."""


@dataclass(frozen=True)
class Unit:
    """A module that is gathered whole where weights are sharded.

    layer: its own; None for the embedding and the head. frozen_bytes: of its frozen matrices, as
    they are held. trained: numbers in its trained ones.
    """

    name: str
    layer: int | None
    frozen_bytes: int
    trained: int

    @property
    def held_bytes(self) -> int:
        return self.frozen_bytes + self.gradient_bytes

    @property
    def gradient_bytes(self) -> int:
        return TRAINED_BYTES * self.trained


def rank_config(config: LlamaConfig, layout: Layout) -> LlamaConfig:
    """The shape of what one rank multiplies with. Raises UserError where the model cannot be cut
    so."""
    if layout.tensor == 1:
        return config
    check_model(layout, config)
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // layout.tensor,
        num_key_value_heads=config.num_key_value_heads // layout.tensor,
        intermediate_size=config.intermediate_size // layout.tensor,
        vocab_size=config.vocab_size // layout.tensor,
        head_dim=config.head_dim,
    )


def of_rank(
    work: Workload, layout: Layout, codec: str, *, mapped: bool, packs: int | None = None
) -> Workload:
    """The Workload of one rank from that of a process that does all alone.

    codec: that frozen weights are held in. mapped: whether they are mapped files as long as they
    are not sharded or cut by columns, which take no memory that counts (a CPU). packs: in an
    optimizer step, over all ranks together; None: several for each. Of one process the Workload is
    as it was.

    Raises UserError where the model cannot be cut so, or the codec's blocks cannot.
    """
    if layout.world == 1:
        return work
    config = rank_config(work.config, layout)
    cut = replace(work, config=config, whole=_cut_whole(work, layout))
    if packs is not None:
        cut = replace(cut, accumulates=packs > layout.pack_ranks)
    found = units(cut, codec)
    frozen = sum(unit.frozen_bytes for unit in found)
    whole_bytes = _replicated_bytes(cut, codec)
    if layout.shard == 1:
        if layout.tensor == 1:
            return cut
        held = _copied_bytes(cut, codec) if mapped else frozen + whole_bytes
        return replace(cut, weight_bytes=held)
    trained = sum(unit.trained for unit in found)
    own = 0 if layout.offload else math.ceil(trained / layout.shard)
    held = 0 if layout.offload else math.ceil(frozen / layout.shard)
    return replace(
        cut,
        weight_bytes=held + (0 if mapped else whole_bytes),
        elsewhere_numbers=trained - own,
        gathered_bytes=_gathered_bytes(found),
    )


def host_bytes(work: Workload, layout: Layout, codec: str) -> int:
    """What a rank holds in the host's memory: its part of the weights and, of trained ones, of
    gradients and moments. work: of the rank."""
    if not layout.offload:
        return 0
    found = units(work, codec)
    each = TRAINED_BYTES * 2 + work.optimizer_bytes
    total = sum(unit.frozen_bytes + each * unit.trained for unit in found)
    return math.ceil(total / layout.shard)


def rank_step(step: StepWork, layout: Layout) -> StepWork:
    """A mean step of the rank that has the most packs. Ranks that have one less wait for it."""
    packs = math.ceil(step.packs / layout.pack_ranks - 1e-9)
    share = packs / step.packs
    return StepWork(step.tokens * share, step.labels * share, step.squares * share, packs)


def units(work: Workload, codec: str) -> list[Unit]:
    """The modules of a rank's Workload that are gathered whole where weights are sharded, in the
    order of a forward pass: the embedding, each layer's attention and MLP, the head; not embedding
    and head where they are one matrix. A task's own head, norms and adapters are not among them:
    all ranks hold those."""
    config, whole = work.config, work.whole or Whole()
    layers = range(config.num_hidden_layers)
    parts = [(i, n) for i in layers for n in (("self_attn", ATTENTION), ("mlp", MLP))]
    found = [_unit(name, i, _matrices(work, i, of), codec) for i, (name, of) in parts]
    if config.tie_word_embeddings:
        return found
    shape = (config.vocab_size, config.hidden_size)
    trained = work.trains_all or whole.embedding
    found.insert(0, _unit("embed_tokens", None, [(shape, trained)], codec))
    if work.head_outputs is None:
        trained = work.trains_all or whole.head
        found.append(_unit("lm_head", None, [(shape, trained)], codec))
    return found


Matrix = tuple[tuple[int, int], bool]
"""Shape, and whether it is trained."""


def _matrices(work: Workload, layer: int, names: tuple[str, ...]) -> list[Matrix]:
    size = sizes(work.config)
    trained = set(work.whole.linears) if work.whole else set()
    return [
        ((size[LINEARS[n][1]], size[LINEARS[n][0]]), work.trains_all or (layer, n) in trained)
        for n in names
    ]


def _unit(name: str, layer: int | None, matrices: list[Matrix], codec: str) -> Unit:
    place = f"model.{name}" if layer is None else f"model.layers.{layer}.{name}"
    kind = codec_of(f"{place}.weight", codec, 2)
    frozen = sum(encoded_bytes(kind, shape) for shape, trained in matrices if not trained)
    numbers = sum(rows * columns for (rows, columns), trained in matrices if trained)
    return Unit(name, layer, frozen, numbers)


def _replicated_bytes(work: Workload, codec: str) -> int:
    """Frozen bytes that every rank holds: norms, and a matrix that is embedding and head."""
    if work.trains_all:
        return 0
    config = work.config
    norms = TRAINED_BYTES * config.hidden_size * (2 * config.num_hidden_layers + 1)
    whole = work.whole or Whole()
    if not config.tie_word_embeddings or whole.embedding or whole.head:
        return norms
    kind = codec_of("model.embed_tokens.weight", codec, 2)
    return norms + encoded_bytes(kind, (config.vocab_size, config.hidden_size))


def _copied_bytes(work: Workload, codec: str) -> int:
    """Frozen bytes of what is cut by columns: rows of a mapped file are mapped too, columns are
    copied (weights/codecs.py)."""
    layers = range(work.config.num_hidden_layers)
    found = [_unit("", i, _matrices(work, i, BY_INPUTS), codec) for i in layers]
    return sum(unit.frozen_bytes for unit in found)


def _gathered_bytes(found: list[Unit]) -> int:
    """What is whole at a time, at most: a layer, and its MLP once more while that is gathered or
    its gradient is summed; the last layer and the head; or the embedding. A gradient of the head's
    and the embedding's is in the workspace already, and its copy for the sum is not."""
    of: dict[str, Unit] = {}
    for unit in found:
        if unit.name not in of or unit.held_bytes > of[unit.name].held_bytes:
            of[unit.name] = unit
    nothing = Unit("", None, 0, 0)
    mlp, head, embedding = (of.get(n, nothing) for n in ("mlp", "lm_head", "embed_tokens"))
    layer = of["self_attn"].held_bytes + mlp.held_bytes
    return max(
        layer + max(mlp.held_bytes, 2 * mlp.gradient_bytes),
        layer + head.held_bytes + max(head.held_bytes, head.gradient_bytes),
        embedding.held_bytes + max(embedding.held_bytes, embedding.gradient_bytes),
    )


def _cut_whole(work: Workload, layout: Layout) -> Whole | None:
    """What is trained whole of a rank's part of the matrices."""
    if work.whole is None or layout.tensor == 1:
        return work.whole
    whole, config = work.whole, work.config
    weights = linear_weights(config)
    ends = [whole.embedding, whole.head]
    matrices = any(ends) if config.tie_word_embeddings else sum(ends)
    numbers = sum(weights[name] for _, name in whole.linears)
    numbers += matrices * config.vocab_size * config.hidden_size
    largest = whole.largest
    if largest > config.hidden_size:  # a matrix, and no norm
        largest //= layout.tensor
    left = whole.parameters - numbers + numbers // layout.tensor
    return replace(whole, parameters=left, largest=largest)
