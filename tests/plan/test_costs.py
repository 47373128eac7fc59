"""What compiled programs cost, against what they must: products, loops, slices and collectives on TPU topologies."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from headshare_jax.model.mesh import make_mesh
from headshare_jax.plan.costs import program_costs, round_costs
from headshare_jax.plan.topology import compile_program, topology_devices

WIDTH, LAYERS, ROWS = 512, 6, 256
PRODUCT = 2 * ROWS * WIDTH * WIDTH
Axes = tuple[str | None, ...]


@pytest.fixture(scope="module")
def chips() -> Mesh:
    return make_mesh((1, 4, 1), topology_devices("v5e:2x2"))


def compiled(
    function: Callable[..., Any], mesh: Mesh, *arrays: tuple[tuple[int, ...], Axes], out: Axes = ()
) -> jax.stages.Compiled:
    """A program for bfloat16 arrays that lie on a mesh in this way."""

    def placed(axes: Axes) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes))

    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=placed(axes)) for shape, axes in arrays]
    return compile_program(jax.jit(function, out_shardings=placed(out)).lower(*shapes))


def text(function: Callable[..., Any], mesh: Mesh, *arrays: tuple[tuple[int, ...], Axes], out: Axes = ()) -> str:
    program = compiled(function, mesh, *arrays, out=out).as_text()
    assert program is not None
    return program


def products(x_md: jax.Array, weights_ldd: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x_md, weight_dd: (x_md @ weight_dd, None), x_md, weights_ldd)[0]


def test_a_loop_costs_as_often_as_it_runs(chips: Mesh) -> None:
    costs = program_costs(text(products, chips, ((ROWS, WIDTH), ()), ((LAYERS, WIDTH, WIDTH), ())))
    assert costs.flops == pytest.approx(LAYERS * PRODUCT, rel=1e-3)
    # Each layer's weights once; the rows stay in the chip's fast memory.
    read = 2 * LAYERS * WIDTH * WIDTH
    assert read <= costs.hbm_bytes < 1.05 * (read + 4 * ROWS * WIDTH)


def test_loops_within_loops_multiply(chips: Mesh) -> None:
    def repeated(x_md: jax.Array, weights_ldd: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 5, lambda _, x_md: products(x_md, weights_ldd), x_md)

    costs = program_costs(text(repeated, chips, ((ROWS, WIDTH), ()), ((LAYERS, WIDTH, WIDTH), ())))
    assert costs.flops == pytest.approx(5 * LAYERS * PRODUCT, rel=1e-3)


def test_the_round_of_an_open_ended_loop(chips: Mesh) -> None:
    def until_small(x_md: jax.Array, weights_ldd: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x_md: x_md[0, 0] > 1, lambda x_md: products(x_md, weights_ldd), x_md)

    program = text(until_small, chips, ((ROWS, WIDTH), ()), ((LAYERS, WIDTH, WIDTH), ()))
    assert round_costs(program).flops == pytest.approx(LAYERS * PRODUCT, rel=1e-3)


def test_the_round_of_a_program_without_such_a_loop(chips: Mesh) -> None:
    with pytest.raises(ValueError, match="unpack"):
        round_costs(text(products, chips, ((ROWS, WIDTH), ()), ((LAYERS, WIDTH, WIDTH), ())))


def test_where_nothing_loops_products_are_those_that_xla_counts_and_each_array_moves_once(chips: Mesh) -> None:
    def chain(x_md: jax.Array, *weights_dd: jax.Array) -> jax.Array:
        for weight_dd in weights_dd:
            x_md = jax.nn.silu(x_md @ weight_dd)
        return x_md

    # XLA copies most of the weights to fast memory first, in slices.
    wide = 2048
    program = compiled(chain, chips, *[((wide, wide), ())] * (1 + LAYERS))
    costs, counted = program_costs(program.as_text() or ""), program.cost_analysis()
    assert costs.flops == pytest.approx(2 * LAYERS * wide**3)
    assert costs.flops == pytest.approx(counted["flops"], rel=0.01)
    assert costs.hbm_bytes == pytest.approx(2 * (2 + LAYERS) * wide**2, rel=0.01)


def test_products_with_a_vector(chips: Mesh) -> None:
    costs = program_costs(text(products, chips, ((1, 4096), ()), ((2, 4096, 4096), ())))
    assert costs.flops == pytest.approx(2 * 2 * 4096**2, rel=1e-3)


def test_matrix_products_that_a_tpu_writes_as_convolutions(chips: Mesh) -> None:
    def scores(q_bnth: jax.Array, k_bnsh: jax.Array) -> jax.Array:
        return jnp.einsum("bnth,bnsh->bnts", q_bnth, k_bnsh)

    costs = program_costs(text(scores, chips, ((3, 5, 256, 128), ()), ((3, 5, 384, 128), ())))
    assert costs.flops == pytest.approx(2 * 3 * 5 * 256 * 384 * 128, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "move", "out", "sent"),
    [
        ("all-gather", partial(jax.lax.all_gather, tiled=True), (), 3),
        ("all-reduce", jax.lax.psum, (), 2 * 3 / 4),
        ("reduce-scatter", partial(jax.lax.psum_scatter, tiled=True), ("fsdp",), 3 / 4),
        ("all-to-all", partial(jax.lax.all_to_all, split_axis=1, concat_axis=0, tiled=True), (None, "fsdp"), 3 / 4),
        ("collective-permute", partial(jax.lax.ppermute, perm=[(0, 1), (1, 2), (2, 3), (3, 0)]), ("fsdp",), 1),
    ],
)
def test_collectives_send_what_a_ring_needs(
    chips: Mesh, kind: str, move: Callable[..., Any], out: Axes, sent: float
) -> None:
    rows, width = 1024, 2048

    def moved(x_md: jax.Array) -> Any:
        return jax.shard_map(
            lambda part_md: move(part_md, "fsdp"),
            mesh=chips,
            in_specs=PartitionSpec("fsdp"),
            out_specs=PartitionSpec(*out),
            check_vma=False,
        )(x_md)

    costs = program_costs(text(moved, chips, ((4 * rows, width), ("fsdp",)), out=out))
    assert costs.collective_bytes == {kind: pytest.approx(sent * 2 * rows * width)}
