"""Stage 2: packed rows, every dataset in one pod, or a big one in several."""

from flytekit import task
from flytekit.types.directory import FlyteDirectory

from controlllm.config import MixConfig, PackConfig, ValidationConfig
from controlllm.prepare import Piece
from tasks import cluster
from tasks.artifacts import DECK, Folder, local, one_line_errors, publish, stage_cache


@task(
    cache=stage_cache("prepare"),
    **cluster.runs("plan_pieces"),
)
@one_line_errors
def plan_pieces(data: FlyteDirectory, mix: MixConfig, pack: PackConfig) -> list[Piece]:
    """What the pods share among them."""
    from controlllm.prepare import pieces

    return pieces(local(data), mix, pack)


@task(
    cache=stage_cache("prepare piece"),
    **cluster.runs("prepare_piece"),
)
@one_line_errors
def prepare_piece(
    piece: Piece, base: FlyteDirectory, data: FlyteDirectory, mix: MixConfig, pack: PackConfig
) -> FlyteDirectory:
    """Chat template, targets, packing: the shards of some units of one dataset."""
    from controlllm.prepare import prepare_piece as prepare_piece_stage

    return publish(prepare_piece_stage(piece, local(base), local(data), mix, pack).path)


@task(
    cache=stage_cache("prepare"),
    **cluster.runs("prepare"),
    **DECK,
)
@one_line_errors
def prepare(
    base: FlyteDirectory,
    data: FlyteDirectory,
    mix: MixConfig,
    pack: PackConfig,
    validation: ValidationConfig | None,
    parts: list[FlyteDirectory | None],
) -> Folder:
    """All datasets, out of the pieces that pods made; what is missing is made here."""
    from controlllm.prepare import gather

    there = [local(part) for part in parts if part is not None]
    return publish(gather(there, local(base), local(data), mix, pack, validation).path)
