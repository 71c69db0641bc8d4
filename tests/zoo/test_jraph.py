"""A graph network of Jraph, its functions in plain JAX; an example is a graph."""

import jax.numpy as jnp
import numpy as np
import pytest
from zoo import LABELS, WIDTH, B, check, cross_entropy, lenient, vectors

jraph = pytest.importorskip("jraph", reason="Jraph is in the extra zoo")

NODES, EDGES = 5, 8
_rng = np.random.default_rng(0)
# Of nodes, edges and globals from what GraphNetwork gives their functions.
INPUTS = {"edge": 3 * WIDTH + B, "node": 3 * WIDTH + B, "global": 2 * WIDTH + B}
OUTPUTS = {"edge": WIDTH, "node": WIDTH, "global": B}


def mlp(params):
    hidden = lambda x: jnp.tanh(x @ params["in"] + params["bias"])
    return jraph.concatenated_args(lambda x: hidden(x) @ params["out"])


def test_graph_network():
    draw = lambda *shape: _rng.normal(size=shape) / shape[0] ** 0.5
    params = {
        name: {"in": draw(k, 64), "bias": draw(64), "out": draw(64, OUTPUTS[name])}
        for name, k in INPUTS.items()
    }
    graphs = jraph.GraphsTuple(
        nodes=vectors(NODES, WIDTH),
        edges=vectors(EDGES, WIDTH),
        senders=_rng.integers(0, NODES, (B, EDGES)),
        receivers=_rng.integers(0, NODES, (B, EDGES)),
        n_node=np.full((B, 1), NODES),
        n_edge=np.full((B, 1), EDGES),
        globals=vectors(1, B),
    )

    def loss(params, example):
        graph, label = example
        functions = [mlp(params[name]) for name in ("edge", "node", "global")]
        network = jraph.GraphNetwork(*functions)
        for _ in range(2):
            graph = network(graph)
        return cross_entropy(graph.globals[0], label)

    with lenient():
        check(loss, params, (graphs, LABELS))
